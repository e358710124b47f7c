"""Folders are read alike by the pinned libraries and by older ones, down to the answers."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from llama_lora.chat.adapters import load
from llama_lora.model import adapter
from llama_lora.model.folder import base_fingerprint, older_libraries
from llama_lora.model.template import Template, load_template, load_tokenizer
from llama_lora.weights.merge_lora import merge
from tests.conftest import ROOT, run_here, shipped
from tests.train.compute import bases
from tests.weights import reference_llama
from tests.weights.conversion import PARAMS, convert, meta_folder
from tests.weights.merging import make_adapter, make_base

LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
# By what transformers 5 calls it: what older readers look for.
SPELLINGS = {
    "default": ({"rope_type": "default"}, None),
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}),
    "llama3": (LLAMA3, LLAMA3),
}


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def change(path: Path, *dropped: str, **settings) -> None:
    kept = {key: value for key, value in read(path).items() if key not in dropped}
    path.write_text(json.dumps(kept | settings), encoding="utf-8")


# ---- config.json ----


@pytest.mark.parametrize("kind", SPELLINGS)
def test_rotary_parameters_are_spelled_in_both_ways(tmp_path, kind):
    new, old = SPELLINGS[kind]
    new = {**new, "rope_theta": 500_000.0, "partial_rotary_factor": 0.5}
    LlamaConfig(rope_parameters=dict(new)).save_pretrained(tmp_path)
    older_libraries.amend(tmp_path)
    written = read(tmp_path / "config.json")
    assert written["rope_parameters"] == new
    assert (written["rope_theta"], written["partial_rotary_factor"]) == (500_000.0, 0.5)
    assert written.get("rope_scaling") == old
    found = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert {key: found[key] for key in new} == new


def test_a_converted_base_has_what_older_readers_look_for(llama3_base):
    config = read(llama3_base / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500_000.0
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert "rope_theta" not in config["rope_scaling"]
    tokenizer = read(llama3_base / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]


def test_a_merged_folder_has_them_although_its_base_has_not(tmp_path, random_base, random_lora):
    assert "rope_theta" not in read(random_base / "config.json")
    merge(random_base, random_lora, tmp_path / "out")
    assert read(tmp_path / "out" / "config.json")["rope_theta"] == 10_000.0
    tokenizer = read(tmp_path / "out" / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


OLD = {"rope_theta": 250_000.0, "rope_scaling": {"type": "linear", "factor": 3.0}}
GEMMA3 = {"rope_theta": 750_000.0, "rope_local_base_freq": 5_000.0}


def test_a_merged_folder_says_what_an_older_base_said(tmp_path, llama_tokenizer):
    base = make_base(tmp_path / "base", llama_tokenizer)
    change(base / "config.json", "rope_parameters", **OLD)
    merge(base, make_adapter(tmp_path / "lora", base), tmp_path / "out")
    merged = read(tmp_path / "out" / "config.json")
    assert {key: merged[key] for key in OLD} == OLD
    found = AutoConfig.from_pretrained(tmp_path / "out").rope_parameters
    assert (found["rope_type"], found["factor"], found["rope_theta"]) == ("linear", 3.0, 250_000.0)


@pytest.mark.parametrize("spelled", ["new", "old"])
def test_layers_that_differ_in_their_rotary_base_still_do(tmp_path, llama_tokenizer, spelled):
    base = bases.saved(tmp_path / "base", "gemma3", llama_tokenizer, **GEMMA3)
    if spelled == "old":
        change(base / "config.json", "rope_parameters", **GEMMA3)
    merge(base, make_adapter(tmp_path / "lora", base), tmp_path / "out")
    found = AutoConfig.from_pretrained(tmp_path / "out").rope_parameters
    assert {kind: of_kind["rope_theta"] for kind, of_kind in found.items()} == {
        "full_attention": 750_000.0,
        "sliding_attention": 5_000.0,
    }
    merged = read(tmp_path / "out" / "config.json")
    assert {key: merged[key] for key in GEMMA3 if key in merged} == (
        GEMMA3 if spelled == "old" else {}
    )


# ---- tokenizer_config.json ----


def test_a_list_of_special_tokens_has_its_older_name(tmp_path, byte_tokenizer):
    byte_tokenizer.save_pretrained(tmp_path)
    change(tmp_path / "tokenizer_config.json", extra_special_tokens=["<|im_start|>"])
    load_tokenizer(tmp_path).save_pretrained(tmp_path / "out")
    older_libraries.amend(tmp_path / "out")
    settings = read(tmp_path / "out" / "tokenizer_config.json")
    assert settings["additional_special_tokens"] == ["<|im_start|>"]
    assert "extra_special_tokens" not in settings
    assert load_tokenizer(tmp_path / "out").extra_special_tokens == ["<|im_start|>"]


@pytest.mark.parametrize("settings", [{"legacy": True}, {"add_prefix_space": False}])
def test_an_adapter_prompts_as_the_llama_tokenizer_it_was_trained_with(
    tmp_path, llama_tokenizer, settings
):
    base = make_base(tmp_path / "base", llama_tokenizer)
    path = base / "tokenizer_config.json"
    change(path, "tokenizer_class", tokenizer_class="LlamaTokenizer", **settings)
    lora = make_adapter(tmp_path / "lora", base)
    turns = shipped("dummy_en.json")[0]["conversations"]
    trained = Template(load_tokenizer(base)).encode(turns)
    assert load_template(lora).encode(turns) == trained


# ---- adapter_config.json ----


def test_an_adapter_has_the_keys_of_peft_0_13_and_what_says_more(tmp_path, random_base):
    plain = make_adapter(tmp_path / "plain", random_base)
    assert read(plain / adapter.CONFIG).keys() == older_libraries.PEFT_0_13
    more = make_adapter(tmp_path / "more", random_base, exclude_modules=["down_proj"])
    extra = read(more / adapter.CONFIG).keys() - older_libraries.PEFT_0_13
    assert extra == {"exclude_modules"}
    assert set(adapter.read_config(more).exclude_modules) == {"down_proj"}


def test_peft_finds_the_base_from_another_directory(tmp_path, llama_tokenizer, monkeypatch):
    make_base(tmp_path / "base", llama_tokenizer)
    monkeypatch.chdir(tmp_path)
    make_adapter(Path("lora"), Path("./base"))
    assert read(tmp_path / "lora" / adapter.CONFIG)["base_model_name_or_path"] == f"{tmp_path}/base"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = AutoPeftModelForCausalLM.from_pretrained("../lora")
    assert set(model.peft_config) == {"default"}


@pytest.fixture
def named(tmp_path, random_base) -> Path:
    """An adapter that names its base by an id on the Hub."""
    folder = make_adapter(tmp_path / "lora", random_base)
    adapter.complete(folder, random_base, "someone/llama")
    return folder


def test_an_id_on_the_hub_names_the_base_and_is_not_looked_up(named, random_base, caplog, recwarn):
    assert adapter.read_config(named).base_model_name_or_path == "someone/llama"
    assert base_fingerprint.same(named / adapter.WEIGHTS, random_base)
    load(random_base, named)
    merge(random_base, named, named.parent / "out")
    assert not [str(w.message) for w in recwarn if "someone/llama" in str(w.message)]
    assert "someone/llama" not in caplog.text


# ---- What older libraries make of them ----

QUESTIONS = [
    "Who are you?",
    "Name three colours of the rainbow.",
    "Write a haiku about the sea.",
    "What is 12 times 12?",
    "Explain in two sentences why the sky is blue.",
    "Translate into French: I like to read in the evening.",
]
LONG = " ".join(["The quick brown fox jumps over the lazy dog."] * 12)
NEW_TOKENS = 20


@pytest.fixture(scope="module")
def llama3_base(tmp_path_factory, tiktoken_model) -> Path:
    """A tiny model with Llama 3.1's rotary scaling, converted from Meta's format."""
    folder = tmp_path_factory.mktemp("llama3")
    params = PARAMS | {"use_scaled_rope": True, "rope_theta": 500_000.0}
    shards = reference_llama.random_shards(params, 600, 96, 1)
    source = meta_folder(folder / "meta", tiktoken_model, params, shards)
    words = "--input_dir", source, "--model_size", "7B", "--output_dir", folder / "base"
    assert convert(*words, "--dtype", "float32") == 0
    return folder / "base"


@pytest.fixture(scope="module")
def smollm2_base(tmp_path_factory, smollm2_gguf) -> Path:
    """The demo's base, whose rotary base is 100,000."""
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    assert convert("--gguf", smollm2_gguf, "--output_dir", folder) == 0
    return folder


def of_older_libraries(folders: list[Path], prompts: list[str], template: str) -> list[list[dict]]:
    """By folder and prompt: its token ids, the logits after them, and the greedy answer."""
    environment = ROOT / ".demo" / "older"
    assert (environment / "complete").is_file(), f"{environment} is missing: run `make test-slow`"
    asked = {
        "folders": [str(folder) for folder in folders],
        "messages": [[{"role": "user", "content": prompt}] for prompt in prompts],
        "template": template,
        "new_tokens": NEW_TOKENS,
    }
    done = subprocess.run(
        [environment / "bin" / "python3", ROOT / "tests/model/folder/older_answers.py"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=folders[0].parent,  # away from this project
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def of_generate(base: Path, lora: Path | None, prompts: list[str], folder: Path) -> list[str]:
    """The answers of generate.py, by prompt."""
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in prompts)
    )
    files = "--prompts_file", folder / "prompts.jsonl", "--output_file", folder / "answers.json"
    adapters = ["--lora_weights", lora] if lora else []
    greedy = "--temperature", "0", "--max_new_tokens", NEW_TOKENS
    done = run_here("generate.py", "--base_model", base, *adapters, *files, *greedy)
    assert done.returncode == 0, done.stderr
    return [item["conversations"][-1]["value"] for item in read(folder / "answers.json")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama3", "smollm2"])
def test_older_libraries_answer_the_same(tmp_path, monkeypatch, request, kind):
    monkeypatch.setenv("LLAMA_LORA_DTYPE", "float32")
    base = request.getfixturevalue(f"{kind}_base")
    lora = make_adapter(tmp_path / "lora", base, use_dora=kind == "llama3")
    merged = tmp_path / "merged"
    merge(base, lora, merged)
    prompts = [*QUESTIONS, LONG]
    older = of_older_libraries([base, lora, merged], prompts, load_template(base).jinja)
    assert older[0] != older[1]
    for folder, found in zip([base, lora, merged], older, strict=True):
        template = load_template(folder)
        model = AutoModelForCausalLM.from_pretrained(
            base if folder == lora else folder, dtype=torch.float32
        )
        if folder == lora:
            model = PeftModel.from_pretrained(model, lora)
        for prompt, theirs in zip(prompts, found, strict=True):
            ids = template.prompt_ids([{"from": "human", "value": prompt}])
            assert theirs["prompt"] == ids
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(torch.tensor(theirs["logits"]), logits, atol=1e-4, rtol=1e-5)
        ours = of_generate(*((base, lora) if folder == lora else (folder, None)), prompts, tmp_path)
        # generate.py leaves out the beginning of a character whose end is no longer written.
        assert [
            theirs["answer"].rstrip("\N{REPLACEMENT CHARACTER}").strip() for theirs in found
        ] == [answer.strip() for answer in ours]
