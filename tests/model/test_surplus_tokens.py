"""Tokens that a base has no embedding for do no harm as long as nothing uses them."""

import json
import shutil
from pathlib import Path

import pytest

from llama_lora.chat.adapters import load
from llama_lora.chat.batch import answers
from llama_lora.chat.sampling import Sampling
from llama_lora.cli import InputError
from llama_lora.model.template import load_tokenizer
from llama_lora.weights.gguf_reader import open_gguf
from tests.conftest import error_line, shipped
from tests.corpora import conversation, save
from tests.model.folder import readers
from tests.weights.merging import make_adapter, make_base

PAD, NOTE = "<pad>", "<note>"
BY_NOTE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<note>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def with_more_tokens(folder: Path, tokenizer, *, rows: int | None = None, special=True) -> Path:
    """A base of Llama 2's kind, to whose tokenizer a padding and a note were added afterwards.

    Its config names the padding, for which there is no row.
    """
    base = make_base(folder, tokenizer, **({"vocab_size": rows} if rows else {}))
    more = load_tokenizer(base)
    more.add_special_tokens({"pad_token": PAD})
    more.add_tokens([NOTE], special_tokens=special)
    more.save_pretrained(base)
    config = base / "config.json"
    settings = json.loads(config.read_text()) | {"pad_token_id": more.pad_token_id}
    config.write_text(json.dumps(settings))
    return base


@pytest.fixture(scope="module")
def base(tmp_path_factory, llama_tokenizer) -> Path:
    return with_more_tokens(tmp_path_factory.mktemp("surplus") / "base", llama_tokenizer)


@pytest.fixture(scope="module")
def lora(tmp_path_factory, base) -> Path:
    return make_adapter(tmp_path_factory.mktemp("surplus") / "lora", base)


def test_unused_tokens_are_no_obstacle_anywhere(tmp_path, base, lora):
    for script, done in readers.all_of(base, lora, tmp_path).items():
        assert done.returncode == 0, (script, done.stderr)
    trained = tmp_path / "output"
    again = tmp_path / "again"
    again.mkdir()
    for script, done in readers.all_of(base, trained, again).items():
        assert done.returncode == 0, (script, done.stderr)
    assert readers.generate(tmp_path / "merged").returncode == 0
    settings = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert (settings.get("pad_token_id") or 0) < 2000


def test_a_gguf_file_has_the_tokens_that_have_rows(tmp_path, base, lora):
    done = readers.merge(base, lora, tmp_path, "--gguf", "F32")
    assert done.returncode == 0, done.stderr
    read = open_gguf(tmp_path / "merged" / "merged-F32.gguf")
    assert read.config.vocab_size == len(read.tokenizer) == 2000


def test_a_batch_is_padded_with_a_token_that_has_a_row(base, lora):
    model, template, _ = load(base, lora)
    asked = [[{"from": "human", "value": text}] for text in ("a", "Who are you, and since when?")]
    settings = Sampling(temperature=0, max_new_tokens=4)
    together = {one.index: one.tokens for one in answers(model, template, asked, settings)}
    alone = [next(answers(model, template, [turns], settings)).tokens for turns in asked]
    assert [together[0], together[1]] == alone


def test_a_corpus_that_uses_one_is_refused_before_training(tmp_path, llama_tokenizer):
    base = with_more_tokens(tmp_path / "base", llama_tokenizer, special=False)
    items = [*shipped("dummy_en.json")[:4], conversation("marked", "Hi.", f"Look: {NOTE} here.")]
    save(tmp_path / "split.json", items)
    for script in ("train", "evaluate"):
        line = error_line(getattr(readers, script)(base, tmp_path))
        assert "conversation marked holds the token '" in line
        expected = f"{NOTE}', number 2,001 of the tokenizer in {base}, for which the base has no"
        assert f"{expected} embedding: it has 2,000" in line
    assert not (tmp_path / "output").exists()


def test_a_prompt_that_uses_one_is_one_line(tmp_path, llama_tokenizer, base):
    marked = with_more_tokens(tmp_path / "base", llama_tokenizer, special=False)
    line = error_line(readers.generate(marked, ask=f"What is {NOTE}?"))
    assert "the prompt holds the token '" in line
    assert f"{NOTE}', number 2,001" in line
    # What is typed is text: a special token is spelled out.
    assert readers.generate(base, ask=f"What is {PAD}?").returncode == 0


def test_a_template_that_uses_one_is_refused(tmp_path, base, lora):
    marked = shutil.copytree(base, tmp_path / "base")
    (marked / "chat_template.jinja").write_text(BY_NOTE)
    done = {
        "train": readers.train(marked, tmp_path, "--template", "model"),
        "generate": readers.generate(marked, "--template", "model"),
        "evaluate": readers.evaluate(marked, tmp_path),
    }
    for script, ended in done.items():
        line = error_line(ended)
        assert "its template uses number 2,001" in line, script
        assert line.endswith(f"the base {marked} has only 2,000"), script
    assert not (tmp_path / "output").exists()
    model, template, _ = load(marked)
    written = answers(model, template, [[{"from": "human", "value": "a"}]], Sampling())
    with pytest.raises(InputError, match="its template uses number 2,001"):
        next(written)


def test_a_vocabulary_that_text_needs_is_refused_before_training(tmp_path, llama_tokenizer):
    base = with_more_tokens(tmp_path / "base", llama_tokenizer, rows=1000)
    assert "its tokenizer has 2,002 tokens" in error_line(readers.train(base, tmp_path))


def test_an_output_folder_that_holds_a_model_is_refused(tmp_path, base):
    """The adapter's tokenizer and template would replace the base's."""
    own = shutil.copytree(base, tmp_path / "base")
    (tmp_path / "output").symlink_to(own)
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    line = error_line(readers.train(own, tmp_path))
    assert f"--output_dir {tmp_path}/output: holds a model" in line
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
