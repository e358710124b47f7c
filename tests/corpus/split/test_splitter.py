"""Splitting: every piece fits as it is rendered, and every answer is learned exactly once."""

import json
import random
import re
import shutil
import sys
from itertools import accumulate

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_lora.cli import InputError
from llama_lora.corpus.records.conversation import Rejected
from llama_lora.corpus.split.splitter import Splitter
from llama_lora.corpus.split.token_counter import CUTS, Part, TokenCounter
from llama_lora.model.labels import IGNORE
from llama_lora.model.template import Template, load_tokenizer
from llama_lora.weights.llama_tokenizer import LLAMA3_SPLIT
from tests.conftest import run_here, run_script, shipped

SPLIT = "fastchat/data/split_long_conversation.py"
WORDS = "The assistant gives polite answers, and snake_case = 12345; 你好，世界。 naïve 🎂"
PIECES = [*WORDS.split(), "x" * 90, "\n\n", "\n", ". ", "7" * 40, "汉字" * 30]


def text(seed, length):
    """Text with words, sentences, paragraphs, long words and several scripts."""
    choose = random.Random(seed)
    parts = []
    while sum(map(len, parts)) < length:
        parts.append(choose.choice(PIECES))
        parts.append(choose.choice([" ", " ", " ", "", "  "]))
    return "".join(parts)[:length]


def conversation(seed, *lengths, system=None):
    head = [{"from": "system", "value": text(seed, system)}] if system else []
    turns = [
        {"from": ("human", "gpt")[i % 2], "value": text(f"{seed}{i}", length)}
        for i, length in enumerate(lengths)
    ]
    return {"id": "c", "source": "s", "conversations": head + turns}


def turn(value, number):
    return {"from": ("human", "gpt")[number % 2], "value": value}


def trained_on_the_shipped(backend, trainer):
    """`backend` with its model trained on the shipped English conversations."""
    backend.train_from_iterator(
        [turn["value"] for item in shipped("dummy_en.json") for turn in item["conversations"]],
        trainer,
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama3_like():
    """Byte-level BPE that keeps a whole word if it has a token, after Llama 3's split."""
    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return trained_on_the_shipped(
        backend,
        trainers.BpeTrainer(
            vocab_size=1200,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )


def unigram_like():
    """A Unigram model after SentencePiece's marking of spaces, of T5's and Gemma's kind."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return trained_on_the_shipped(
        backend,
        trainers.UnigramTrainer(
            vocab_size=800,
            special_tokens=["<unk>", "<s>", "</s>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )


def phrases_like():
    """BPE over whole lines, whose tokens reach over the ends of words."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return trained_on_the_shipped(
        backend,
        trainers.BpeTrainer(
            vocab_size=900,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=[chr(code) for code in range(32, 127)],
            show_progress=False,
        ),
    )


TEMPLATES = {  # by kind of tokenizer
    "sentencepiece": "vicuna_v1.1",
    "bytes": "model",
    "llama3": "vicuna_v1.1",
    "unigram": "vicuna_v1.1",
    "phrases": "vicuna_v1.1",
}


@pytest.fixture(scope="module")
def tokenizers(llama_tokenizer, byte_tokenizer):
    """One tokenizer of each kind."""
    return {
        "sentencepiece": llama_tokenizer,
        "bytes": byte_tokenizer,
        "llama3": llama3_like(),
        "unigram": unigram_like(),
        "phrases": phrases_like(),
    }


@pytest.fixture(scope="module")
def counters(tokenizers):
    made = {
        kind: TokenCounter(tokenizer.backend_tokenizer) for kind, tokenizer in tokenizers.items()
    }
    # GPT-NeoX's and Phi's kind: runs of spaces are added tokens, before which text is cut.
    with_spaces = Tokenizer.from_str(tokenizers["bytes"].backend_tokenizer.to_str())
    with_spaces.add_tokens([AddedToken(" " * count, normalized=False) for count in range(2, 9)])
    return made | {"spaces": TokenCounter(with_spaces)}


@pytest.fixture(scope="module")
def models_of(tmp_path_factory, tokenizers):
    """Their folders."""
    folders = {}
    for kind, tokenizer in tokenizers.items():
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer.save_pretrained(folder)
        folders[kind] = str(folder)
    return folders


@pytest.fixture(scope="module")
def splitters(models_of):
    """Splitters by kind of tokenizer and length, made once each."""
    made = {}

    def splitter(kind, length, overlong="continue"):
        key = kind, length, overlong
        if key not in made:
            made[key] = Splitter(models_of[kind], length, TEMPLATES[kind], overlong)
        return made[key]

    return splitter


def labelled(renderer, piece):
    """The tokens of a piece as it is trained, and its labels."""
    one = renderer.encode_batch([piece])[0]
    return one.ids, one.labels


SIGNS = st.text(alphabet="ab Z9_'.,;-(){}<>/s\n\t\r é汉👍🏽\u00a0\u0301\0", max_size=120)
COUNTED = [*TEMPLATES, "spaces"]


@pytest.mark.parametrize("kind", COUNTED)
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), signs=st.lists(SIGNS | st.just("</s>"), max_size=4))
def test_words_are_measured_as_the_whole_text_is(counters, kind, seed, signs):
    backend, counter = counters[kind].tokenizer, counters[kind]
    assert counter.by_words == (kind != "phrases")
    whole = text(seed, 200).join(signs)
    encoding = backend.encode(whole, add_special_tokens=False)
    starts = [start for start, _ in encoding.offsets]
    measured = counter.measure(whole)
    assert counter.length(whole) == len(measured) == len(starts)
    assert [measured.place(number) for number in range(len(starts) + 1)] == [*starts, len(whole)]
    for place in range(0, len(whole), 7):
        assert measured.before(place) == sum(start < place for start in starts)


@pytest.mark.parametrize("cut", CUTS)
@settings(max_examples=300, deadline=None)
@given(text=st.text("ab Z9_'.,-(\n\t é汉’\u00a0\0~!", max_size=12))
def test_words_end_exactly_where_tokens_must_not_reach_over(cut, text):
    over, word = cut
    *words, last = re.findall(word, text)
    assert ("".join(words), last, "" in words) == (text, "", False)
    ends = set(accumulate(map(len, words)))
    for place in range(1, len(text)):
        assert (place in ends) == bool(over.search(text[place - 1 : place + 1]))


AROUND = st.sampled_from(["", "</s>", "</s>USER: ", " ASSISTANT: ", "<|im_end|>\n", "  "]) | SIGNS


@pytest.mark.parametrize("kind", COUNTED)
@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    signs=st.lists(SIGNS | st.sampled_from(["</s>", "<|im_end|>", "    "]), min_size=1, max_size=4),
    around=st.tuples(AROUND, AROUND, AROUND),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_text_is_counted_by_its_measured_parts(counters, kind, seed, signs, around, cuts):
    """Wherever the parts are cut, whatever touches them, and if one of them is not there."""
    counter = counters[kind]
    one, other = text(seed, 200).join(signs), text(seed + 1, 60)
    start, end = sorted(round(cut * len(one)) for cut in cuts)
    parts = [Part(counter.measure(one), start, end), counter.measure(other).whole]
    before, between, after = around
    for whole in (
        before + one[start:end] + between + other + after,
        before + one[start:end] + after,
        before + other + after,
        between,
    ):
        length = len(counter.tokenizer.encode(whole, add_special_tokens=False))
        assert counter.length_with(whole, parts) == length


def test_only_what_is_around_measured_parts_is_counted(counters):
    counter = counters["sentencepiece"]
    measured = counter.measure("The assistant gives polite answers. " * 50)
    counted = []
    length, counter.length = counter.length, lambda text: counted.append(text) or length(text)
    whole = f"USER: {measured.text}</s>"
    assert counter.length_with(whole, [measured.whole]) == length(whole)
    assert sum(map(len, counted)) < 60


@pytest.mark.parametrize("named", ["LlamaTokenizer", "LlamaTokenizerFast", "TokenizersBackend", ""])
@pytest.mark.parametrize("kind", ["sentencepiece", "bytes", "slow"])
def test_a_tokenizer_is_as_transformers_loads_it(tmp_path, models_of, spm, kind, named):
    folder, config = tmp_path / "model", {"bos_token": "<s>", "eos_token": "</s>"}
    if kind == "slow":
        folder.mkdir()
        shutil.copy(spm, folder / "tokenizer.model")
    else:
        shutil.copytree(models_of[kind], folder)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["tokenizer_class"]
    config |= {"tokenizer_class": named} if named else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    whole = f"{text(1, 500)}</s>USER: a\n<|im_end|>  b"
    for of_llama in (False, True):
        if of_llama:
            (folder / "config.json").write_text('{"model_type": "llama"}')
        theirs = AutoTokenizer.from_pretrained(folder)
        assert load_tokenizer(folder)(whole)["input_ids"] == theirs(whole)["input_ids"]


def test_splitting_does_without_torch(tmp_path, models_of):
    folder, source = tmp_path / "base", tmp_path / "in.json"
    shutil.copytree(models_of["sentencepiece"], folder)
    config = {"model_type": "llama", "max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(config))
    source.write_text(json.dumps([conversation(1, 50, 600)]))
    flags = ["--in", source, "--out", tmp_path / "out.json", "--model-name", folder]
    command = [SPLIT, *map(str, flags), "--max-length", "256"]
    code = (
        f"import runpy, sys; sys.argv = {command}; runpy.run_path({SPLIT!r}, run_name='__main__'); "
        "sys.exit('torch' in sys.modules)"
    )
    done = run_script(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", TEMPLATES)
@settings(max_examples=60, deadline=None)
@example(seed=2454, lengths=[(0, 0), (0, 0), (2, 298)], system=399, window=128)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.tuples(*[st.integers(0, 900)] * 2), min_size=1, max_size=5),
    system=st.none() | st.integers(1, 400),
    window=st.sampled_from([128, 160, 256]),
)
def test_every_piece_fits_and_every_answer_is_whole(splitters, kind, seed, lengths, system, window):
    lengths = [length for pair in lengths for length in pair]
    splitter = splitters(kind, window)
    original = conversation(seed, *lengths, system=system)
    kept = splitter(original)
    assert kept.pairs == len(lengths) // 2
    assert not kept.dropped
    answers, questions = [], 0
    for piece in kept.conversations:
        ids, labels = labelled(splitter.renderer, piece)
        assert len(ids) <= window
        assert labels.count(IGNORE) < len(labels)
        assert piece["source"] == "s"
        turns = [turn for turn in piece["conversations"] if turn["from"] != "system"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert len(turns) == len(piece["conversations"]) - (system is not None)
        *whole, last = [turn["value"] for turn in turns[1::2]]
        new = last[piece.get("label_from", 0) :]
        if piece.get("label_from"):  # it goes on where the piece before it stopped
            assert not whole
            assert answers[-1].endswith(last[: piece["label_from"]])
            answers[-1] += new
        else:
            answers += [*whole, new]
            questions += len(turns) // 2
    wanted = [turn["value"] for turn in original["conversations"] if turn["from"] == "gpt"]
    assert answers == wanted
    assert questions == len(wanted)
    goes_on = [bool(piece.get("unfinished")) for piece in kept.conversations]
    continues = [bool(piece.get("label_from")) for piece in kept.conversations]
    assert goes_on[:-1] == continues[1:]
    assert not goes_on[-1]
    names = [piece["id"] for piece in kept.conversations]
    assert len(set(names)) == len(names)
    again = [splitter(piece) for piece in kept.conversations]
    assert [one.conversations for one in again] == [[piece] for piece in kept.conversations]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_answer_tokens_are_labelled_exactly_once(splitters, kind):
    whole = splitters(kind, 100_000)
    splitter = splitters(kind, 256)
    original = conversation(1, 80, 4000, 300, 200, 50, 2500)
    count = sum(label != IGNORE for label in labelled(whole.renderer, original)[1])
    pieces = splitter(original).conversations
    found = sum(
        sum(label != IGNORE for label in labelled(splitter.renderer, piece)[1]) for piece in pieces
    )
    assert abs(found - count) <= 0.01 * count


def test_what_fits_is_left_as_it_is_and_pairs_are_packed(splitters):
    splitter = splitters("sentencepiece", 256)
    short = conversation(2, 20, 30, 40, 30)
    assert splitter(short).conversations == [short]
    plain = [turn("The assistant gives polite answers.", i) for i in range(40)]
    pieces = splitter({"id": "c", "conversations": plain}).conversations
    turns = [piece["conversations"] for piece in pieces]
    for this, following in zip(turns, turns[1:], strict=False):
        one_more = {"conversations": this + following[:2]}
        assert len(labelled(splitter.renderer, one_more)[0]) > 256
    assert pieces[0]["id"] == "c_0"


def test_two_pairs_that_do_not_fit_together_are_both_kept(splitters):
    splitter = splitters("bytes", 128)
    plain = [turn("The assistant gives polite answers. " * 5, i) for i in range(4)]
    pieces = splitter({"id": "c", "conversations": plain}).conversations
    assert [piece["id"] for piece in pieces] == ["c_0", "c_2"]


def test_answers_are_cut_at_the_best_place(splitters):
    splitter = splitters("sentencepiece", 160)
    paragraphs = [f"The assistant gives {i} answers. They are polite." for i in range(40)]
    turns = [
        {"from": "human", "value": "Tell me."},
        {"from": "gpt", "value": "\n\n".join(paragraphs)},
    ]
    pieces = splitter({"id": "c", "conversations": turns}).conversations
    assert len(pieces) > 3
    for piece in pieces:
        assert piece["conversations"][1]["value"].endswith("polite.")


def test_truncate_and_drop_are_counted(splitters):
    original = conversation(5, 40, 3000, 40, 40)
    cut = splitters("bytes", 128, "truncate")(original)
    assert [piece["id"] for piece in cut.conversations] == ["c_0", "c_2"]
    assert cut.conversations[0]["unfinished"]
    assert (cut.pairs, cut.repairs["answers truncated"]) == (2, 1)
    dropped = splitters("bytes", 128, "drop")(original)
    assert [piece["conversations"] for piece in dropped.conversations] == [
        original["conversations"][2:]
    ]
    assert (dropped.pairs, dropped.dropped) == (1, {"longer than the window": 1})
    with pytest.raises(Rejected, match="longer than the window"):
        splitters("bytes", 128, "drop")(conversation(6, 40, 3000))


def test_a_long_question_loses_its_middle_and_is_counted(splitters):
    original = conversation(7, 5000, 50)
    kept = splitters("bytes", 128)(original)
    asked, whole = kept.conversations[0]["conversations"][0]["value"], original["conversations"][0]
    assert kept.repairs["questions shortened"] == 1
    start, end = asked.split(" … ")
    assert whole["value"].startswith(start)
    assert whole["value"].endswith(end)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_question_of_which_nothing_fits_is_as_long_as_it_is_said_to_be(splitters, kind):
    splitter = splitters(kind, 200)
    around = lambda text: [turn(text, 0), turn("", 1)]  # noqa: E731
    frame = splitter.length(around("a")) - splitter.counter.length("a")
    asked = splitter.shortened(splitter.counter.measure("word " * 50), 0, frame, around)
    assert (asked.text, asked.length) == (" … ", splitter.length(around(asked.text)))


def test_a_place_outside_of_the_answer_is_told_with_its_length(splitters):
    with pytest.raises(Rejected) as rejected:
        splitters("bytes", 128)({**conversation(1, 9, 9), "label_from": 10})
    assert rejected.value.detail == "it is 10, and the answer has 9 characters"


def test_a_window_that_the_template_fills_is_an_error(models_of):
    with pytest.raises(InputError, match="--max-length 40: expected at least"):
        Splitter(models_of["sentencepiece"], 40)


def test_the_script_splits_a_file_and_refuses_what_is_no_model(tmp_path, models_of):
    source, out = tmp_path / "in.json", tmp_path / "out.json"
    items = [conversation(seed, 50, 600, 50, 60) for seed in range(20)]
    items += [{"id": "bad", "conversations": [{"from": "gpt", "value": "a"}]}]
    items += [{**conversation(1, 9, 9), "label_from": "x"}]
    source.write_text(json.dumps(items))
    command = (SPLIT, "--in", source, "--out", out, "--max-length", 200)
    done = run_here(*command, "--model-name", models_of["sentencepiece"])
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    pieces = json.loads(out.read_text())
    assert last.startswith(f"read 22 · kept 20 in {len(pieces)} pieces · rejected 2: ")
    renderer = Template(Splitter(models_of["sentencepiece"], 200).renderer.tokenizer)
    assert all(len(labelled(renderer, piece)[0]) <= 200 for piece in pieces)
    assert len({piece["id"] for piece in pieces}) == len(pieces)
    for model in (tmp_path, tmp_path / "nothing"):
        done = run_here(*command, "--model-name", model)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
