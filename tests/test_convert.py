"""Weights: Meta's layout and GGUF become a Hugging Face folder that computes the same.

Everything is made here, from random weights and vocabularies trained on a few sentences.
"""

import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from base64 import b64decode, b64encode
from pathlib import Path

import gguf
import numpy as np
import pytest
import reference_llama
import sentencepiece
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llama_lora.cli import InputError
from llama_lora.model.hf_folder import write_folder
from llama_lora.model.llama_tokenizer import LLAMA3_SPLIT, choose_pad, llama3_special_tokens
from llama_lora.model.meta_checkpoint import open_meta_checkpoint

SCRIPT = Path(__file__).parents[1] / "convert_llama_weights_to_hf.py"
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n\treturn",
    "Ein Vogel in der Hand ist besser als zwei auf dem Dach. Où est la bibliothèque ?",
    "今天天气很好，我们去公园散步吧。 今日は天気がいいですね。",
    "Сколько стоит этот хлеб? 1234567890 3.14159 {'key': [1, 2, 3]}",
]
TEXTS = [
    *SENTENCES,
    "",
    " ",
    "\n",
    "  leading",
    "trailing   ",
    "a  2024\t\t1\r\n\r\nb",
    "                               x",
    "👍🏽 🇩🇪 \u200b é e\u0301 ﬁ Ａ½ \u00a0 \u3000",
    "it's WE'LL <tag> </tag> \\n",
]
PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": -1}
HIDDEN = 96


@pytest.fixture(scope="module")
def spm(tmp_path_factory) -> Path:
    """A SentencePiece model of LLaMA's kind."""
    folder = tmp_path_factory.mktemp("spm")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def tiktoken_model(tmp_path_factory) -> Path:
    """A tiktoken vocabulary of Llama 3's kind: 344 tokens, and the 256 special ones."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trained.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=344,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    letters = byte_of_letter()
    tokens = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    lines = [b64encode(bytes(letters[c] for c in token)) + b" %d" % rank for token, rank in tokens]
    path = tmp_path_factory.mktemp("tiktoken") / "tokenizer.model"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def tiktoken_ranks(path: Path) -> dict[bytes, int]:
    pairs = (line.split() for line in path.read_bytes().splitlines())
    return {b64decode(token): int(rank) for token, rank in pairs}


def tiktoken_encoding(path: Path) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "test", pat_str=LLAMA3_SPLIT, mergeable_ranks=tiktoken_ranks(path), special_tokens={}
    )


def meta_folder(folder: Path, tokenizer: Path, params: dict, shards, size: str = "7B") -> Path:
    """Lay a checkpoint out as Meta does: tokenizer.model above the folder of one size."""
    reference_llama.write_shards(folder / size, params, shards)
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return folder


def convert(*args) -> int:
    """Run the script's own functions on a command line, in this process; return the exit code."""
    spec = importlib.util.spec_from_file_location("convert_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    argv, sys.argv = sys.argv, [str(SCRIPT), *map(str, args)]
    try:
        script.main(script.parse_args())
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv
    return 0


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def refused(capsys, *args) -> str:
    """The one line a failing conversion prints."""
    assert convert(*args) == 1
    error = capsys.readouterr().err.splitlines()
    lines = [line for line in error if line.startswith("error: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in "".join(error)
    return lines[0]


def model_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder"
        for path in sorted(folder.rglob("*"))
    }


# ---------------------------------------------------------------- Meta's layout


@pytest.mark.parametrize("generation", ["llama2", "llama3"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
@pytest.mark.parametrize("count", [1, 2])
def test_same_logits_as_metas_formulation(
    tmp_path, spm, tiktoken_model, count, kv_heads, tied, generation
):
    scaled = generation == "llama3"
    vocab_size = 600 if scaled else 480
    params = PARAMS | {"n_kv_heads": kv_heads, "use_scaled_rope": scaled}
    shards = reference_llama.random_shards(
        params, vocab_size, HIDDEN, count, tied=tied, vocab_parallel=scaled
    )
    source = meta_folder(tmp_path / "in", tiktoken_model if scaled else spm, params, shards)
    output = tmp_path / "out" / "7B"
    arguments = ["--input_dir", source, "--model_size", "7B", "--output_dir", output]
    assert convert(*arguments, "--dtype", "float32") == 0

    tokens = torch.randint(0, vocab_size, (300,), generator=torch.Generator().manual_seed(1))
    params |= {"rope_theta": 500_000.0 if scaled else 10_000.0}
    scale = (32.0 if tied else 8.0) if scaled else None
    expected = reference_llama.logits(params, shards, tokens, scale=scale)
    torch.testing.assert_close(model_logits(output, tokens), expected, atol=1e-4, rtol=0)
    if scaled:  # the comparison would notice the wrong scaling
        other = reference_llama.logits(params, shards, tokens, scale=40.0 - scale)
        assert (other - expected).abs().max() > 1e-3

    config = json.loads((output / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied
    assert config["vocab_size"] == vocab_size
    assert config["intermediate_size"] == HIDDEN
    assert config["num_key_value_heads"] == kv_heads
    assert config["max_position_embeddings"] == (131_072 if scaled else 4_096)


def test_more_shards_than_key_value_heads(tmp_path, spm):
    params = PARAMS | {"n_kv_heads": 2}
    shards = reference_llama.random_shards(params, 480, HIDDEN, 4)
    source = meta_folder(tmp_path / "in", spm, params, shards)
    arguments = ["--input_dir", source, "--model_size", "7B", "--output_dir", tmp_path / "out"]
    assert convert(*arguments, "--dtype", "float32") == 0
    tokens = torch.arange(3, 300)
    expected = reference_llama.logits(params, shards, tokens)
    torch.testing.assert_close(model_logits(tmp_path / "out", tokens), expected, atol=1e-4, rtol=0)


def test_output_projection_equal_to_the_embeddings_is_tied(tmp_path, tiktoken_model):
    params = PARAMS | {"use_scaled_rope": True, "rope_theta": 500_000.0}
    shards = reference_llama.random_shards(params, 600, HIDDEN, 1, tied=True, vocab_parallel=True)
    shards[0]["output.weight"] = shards[0]["tok_embeddings.weight"]
    # As newer downloads lie: everything in one folder, whatever size is asked for.
    reference_llama.write_shards(tmp_path / "in", params, shards)
    (tmp_path / "in" / "tokenizer.model").write_bytes(tiktoken_model.read_bytes())
    for extra in ([], ["--model_size", "1B", "--overwrite"]):
        assert (
            convert("--input_dir", tmp_path / "in", "--output_dir", tmp_path / "out", *extra) == 0
        )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert config["rope_parameters"]["factor"] == 32.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"norm_eps": 1e-6}, {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}),
        ({"rope_theta": 1e6}, {"max_position_embeddings": 16384}),
        ({"vocab_size": 480}, {"vocab_size": 480}),
        ({"multiple_of": 32, "ffn_dim_multiplier": 0.5}, {"intermediate_size": HIDDEN}),
    ],
)
def test_config_follows_params_and_tensors(tmp_path, spm, changes, expected):
    params = PARAMS | changes
    shards = reference_llama.random_shards(params, 480, HIDDEN, 1)
    source = meta_folder(tmp_path / "in", spm, params, shards, size="13B")
    arguments = ["--input_dir", source, "--model_size", "13B", "--output_dir", tmp_path / "out"]
    assert convert(*arguments) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": changes.get("rope_theta", 10_000.0),
    }


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_kept_to_the_bit(tmp_path, spm, stored):
    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 2, dtype=stored)
    for shard in shards:  # older checkpoints carry these; they are computed, not learned
        shard["rope.freqs"] = torch.ones(8, dtype=torch.float32)
        shard["layers.0.attention.inner_attention.rope.freqs"] = torch.ones(8)
    source = meta_folder(tmp_path / "in", spm, PARAMS, shards)
    arguments = ["--input_dir", source, "--model_size", "7B", "--output_dir", tmp_path / "out"]
    assert convert(*arguments, "--max_shard_size", "50KB") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == stored
    joined = torch.cat([shard["layers.1.feed_forward.w2.weight"] for shard in shards], 1)
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, joined)
    joined = torch.cat([shard["tok_embeddings.weight"] for shard in shards], 1)
    assert torch.equal(model.model.embed_tokens.weight, joined)

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    assert all((tmp_path / "out" / f).stat().st_size < max(50_000, largest) + 2_000 for f in files)


def test_folder_holds_exactly_what_a_model_needs(tmp_path, spm):
    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 1)
    source = meta_folder(tmp_path / "in", spm, PARAMS, shards)
    output = source / "output" / "7B"  # inside the input, as the README has it
    result = run("--input_dir", source, "--model_size", "7B", "--output_dir", output)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"wrote {output}: ")
    assert result.stdout.count("\n") == 1
    assert {path.name for path in output.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in source.iterdir()} == {"7B", "output", "tokenizer.model"}
    assert [path.name for path in (source / "output").iterdir()] == ["7B"]
    config = json.loads((output / "config.json").read_text())
    assert config["dtype"] == "float16"  # float32 in, 16 bits out
    ids = (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"])
    assert ids == (1, 2, 0)
    assert (output / "model.safetensors").stat().st_mode & 0o777 == (
        (output / "config.json").stat().st_mode & 0o777
    )


def drop(name):
    return lambda folder: (folder / name).unlink()


def cut_off(folder: Path) -> None:
    path = folder / "7B" / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[:-5000])


def rewrite(folder: Path, change, number: int = 1) -> None:
    path = folder / "7B" / f"consolidated.{number:02}.pth"
    shard = torch.load(path)
    change(shard)
    torch.save(shard, path)


def narrow(shard) -> None:
    shard["layers.1.attention.wo.weight"] = torch.zeros(64, 7)


def rename_shard(folder: Path) -> None:
    (folder / "7B" / "consolidated.00.pth").rename(folder / "7B" / "consolidated.02.pth")


def edit_params(folder: Path, **changes) -> None:
    path = folder / "7B" / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD_META = {
    "no params": (drop("7B/params.json"), "expected .*params.json"),
    "no tokenizer": (drop("tokenizer.model"), "expected .*tokenizer.model"),
    "last shard missing": (drop("7B/consolidated.01.pth"), "expected 2 files .* found 1"),
    "first shard missing": (
        rename_shard,
        "expected consolidated.00.pth, consolidated.01.pth, found consolidated.01.pth",
    ),
    "cut off": (cut_off, "consolidated.00.pth: expected a PyTorch checkpoint, found damage"),
    "not a checkpoint": (
        lambda f: (f / "7B/consolidated.00.pth").write_text("hello"),
        "consolidated.00.pth: expected a PyTorch checkpoint",
    ),
    "empty file": (
        lambda f: (f / "7B/consolidated.01.pth").write_bytes(b""),
        "consolidated.01.pth: expected a PyTorch checkpoint",
    ),
    "wrong shape": (
        lambda f: rewrite(f, narrow),
        r"expected layers.1.attention.wo.weight to be \(64, 64\).* found \(64, 32\), \(64, 7\)",
    ),
    "missing tensor": (
        lambda f: rewrite(f, lambda s: s.pop("layers.1.ffn_norm.weight")),
        "consolidated.01.pth: layers.1.ffn_norm.weight is missing",
    ),
    "unknown tensor": (
        lambda f: rewrite(f, lambda s: s.update({"vision_model.x": torch.ones(1)})),
        "expected only the tensors of a Llama text model of 2 layers, found vision_model.x",
    ),
    "more layers than told": (lambda f: edit_params(f, n_layers=1), "of 1 layers, found layers.1"),
    "params not JSON": (
        lambda f: (f / "7B/params.json").write_text("{'dim': 64}"),
        "params.json: expected JSON",
    ),
    "params null": (lambda f: edit_params(f, dim=None), "whole number 'dim', found None"),
    "heads do not divide": (lambda f: edit_params(f, n_heads=5), "multiple of 2·n_heads"),
    "vocab_size": (
        lambda f: edit_params(f, vocab_size=32000),
        "vocab_size 32000 .* found 480 rows",
    ),
    "embeddings missing": (
        lambda f: rewrite(f, lambda s: s.pop("tok_embeddings.weight")),
        "consolidated.01.pth: tok_embeddings.weight is missing",
    ),
    "NaN": (
        lambda f: rewrite(f, lambda s: s["layers.1.feed_forward.w2.weight"].fill_(math.nan)),
        "model.layers.1.mlp.down_proj.weight holds NaN",
    ),
    "beyond float16": (
        lambda f: rewrite(f, lambda s: s["layers.1.feed_forward.w2.weight"].fill_(1e6)),
        "values beyond float16.*--dtype bfloat16",
    ),
    "tokenizer damaged": (
        lambda f: (f / "tokenizer.model").write_bytes(b"\0" * 100),
        "tokenizer.model: expected a SentencePiece model or a tiktoken vocabulary",
    ),
}


@pytest.mark.parametrize("case", BAD_META)
def test_bad_checkpoint_is_one_line_and_leaves_nothing(tmp_path, capsys, spm, case):
    damage, expected = BAD_META[case]
    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 2)
    source = meta_folder(tmp_path / "in", spm, PARAMS, shards)
    damage(source)
    before = contents(tmp_path)
    output = tmp_path / "new" / "parents" / "out"
    line = refused(
        capsys,
        "--input_dir",
        source,
        "--model_size",
        "7B",
        "--output_dir",
        output,
        "--max_shard_size",
        "50KB",
    )
    assert re.search(expected, line), line
    assert contents(tmp_path) == before


def test_tokenizer_of_another_model_is_refused(tmp_path, capsys, tiktoken_model):
    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 1)
    source = meta_folder(tmp_path / "in", tiktoken_model, PARAMS, shards)
    line = refused(
        capsys, "--input_dir", source, "--model_size", "7B", "--output_dir", tmp_path / "out"
    )
    assert "expected a tokenizer.model of 480 tokens" in line
    assert "found one of 600" in line


def test_model_in_the_way_survives_until_a_replacement_is_complete(tmp_path, capsys, spm):
    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 1)
    source = meta_folder(tmp_path / "in", spm, PARAMS, shards)
    arguments = ["--input_dir", source, "--model_size", "7B", "--output_dir", tmp_path / "out"]
    assert convert(*arguments) == 0
    before = contents(tmp_path / "out")
    assert "--overwrite replaces it" in refused(capsys, *arguments)
    assert contents(tmp_path / "out") == before

    rewrite(source, lambda s: s["layers.1.feed_forward.w2.weight"].fill_(math.inf), number=0)
    refused(capsys, *arguments, "--overwrite")
    assert contents(tmp_path / "out") == before

    rewrite(source, lambda s: s["layers.1.feed_forward.w2.weight"].fill_(0.5), number=0)
    (tmp_path / ".out.partial").mkdir()  # what a killed run leaves
    (tmp_path / ".out.partial" / "model.safetensors").write_text("half")
    assert convert(*arguments, "--overwrite", "--dtype", "bfloat16") == 0
    assert contents(tmp_path / "out") != before
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_folder_of_other_things_is_never_replaced(tmp_path, capsys, spm):
    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 1)
    source = meta_folder(tmp_path / "in", spm, PARAMS, shards)
    before = contents(source)
    for target in (source, source / "7B", source / "tokenizer.model"):
        arguments = ["--input_dir", source, "--model_size", "7B", "--output_dir", target]
        refused(capsys, *arguments, "--overwrite")
    assert contents(source) == before


def test_disk_too_small(tmp_path, capsys, spm, monkeypatch):
    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 1)
    source = meta_folder(tmp_path / "in", spm, PARAMS, shards)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10_000))
    line = refused(
        capsys, "--input_dir", source, "--model_size", "7B", "--output_dir", tmp_path / "out"
    )
    assert "the disk has 0.00 GB free" in line
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


def test_interrupted_conversion_leaves_nothing(tmp_path, spm):
    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 1)
    source = meta_folder(tmp_path / "in", spm, PARAMS, shards)
    checkpoint = open_meta_checkpoint(source, "7B")

    def interrupt(name: str) -> torch.Tensor:
        if "layers.1" in name:
            assert list(tmp_path.glob(".out.partial/*.safetensors"))
            raise KeyboardInterrupt
        return checkpoint.load(name)

    interrupted = dataclasses.replace(checkpoint, load=interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_folder(interrupted, tmp_path / "out", max_shard_size=20_000)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


@pytest.mark.skipif(sys.platform == "win32", reason="sets a POSIX limit")
def test_failing_disk_is_one_line_and_leaves_nothing(tmp_path, spm):
    import resource

    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 1)
    source = meta_folder(tmp_path / "in", spm, PARAMS, shards)
    result = run(
        *["--input_dir", source, "--model_size", "7B", "--output_dir", tmp_path / "out"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/out: could not be written")
    assert "Traceback" not in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


MEASURED = """
import pathlib, sys, threading, time
from llama_lora.model.hf_folder import write_folder
from llama_lora.model.meta_checkpoint import open_meta_checkpoint

def anonymous():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

source, target, limit = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
checkpoint = open_meta_checkpoint(source, "7B")
start = peak = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
written = write_folder(checkpoint, target, max_shard_size=limit)
done = True
thread.join()
print(written.bytes, peak - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_is_about_one_output_shard(tmp_path, spm):
    params = PARAMS | {"dim": 1024, "n_heads": 8, "n_layers": 6}
    shards = reference_llama.random_shards(params, 480, 4096, 2, dtype=torch.bfloat16)
    source = meta_folder(tmp_path / "in", spm, params, shards)
    limit = 25_000_000
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "out"), str(limit)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    total, peak = map(int, result.stdout.split())
    assert total > 190_000_000
    assert peak < 2 * limit  # a shard, and the tensors it is being put together from


# ---------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def llama2_folder(tmp_path_factory, spm) -> Path:
    folder = tmp_path_factory.mktemp("llama2")
    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 1)
    source = meta_folder(folder / "in", spm, PARAMS, shards)
    assert convert("--input_dir", source, "--model_size", "7B", "--output_dir", folder / "out") == 0
    return folder / "out"


@pytest.fixture(scope="module")
def llama3_folder(tmp_path_factory, tiktoken_model) -> Path:
    folder = tmp_path_factory.mktemp("llama3")
    params = PARAMS | {"rope_theta": 500_000.0}
    shards = reference_llama.random_shards(params, 600, HIDDEN, 1)
    source = meta_folder(folder / "in", tiktoken_model, params, shards)
    assert convert("--input_dir", source, "--model_size", "7B", "--output_dir", folder / "out") == 0
    return folder / "out"


@pytest.fixture(scope="module")
def pairs(llama2_folder, llama3_folder, spm, tiktoken_model):
    """Each converted tokenizer, as AutoTokenizer reads it back, with its original's `encode`."""
    original = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    encoding = tiktoken_encoding(tiktoken_model)
    return [
        (AutoTokenizer.from_pretrained(llama2_folder), original.encode),
        (
            AutoTokenizer.from_pretrained(llama3_folder),
            lambda text: encoding.encode(text, disallowed_special=()),
        ),
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_original_tokenizers(pairs, text):
    for converted, encode in pairs:
        assert converted.encode(text, add_special_tokens=False) == encode(text)
        assert converted.encode(text) == [converted.bos_token_id, *encode(text)]
        assert converted.decode(converted.encode(text), skip_special_tokens=True) == text


@settings(max_examples=300, deadline=None)
@given(
    st.text(
        st.one_of(
            st.sampled_from(" \n\t▁ab'1.🇩é日\u0301\u00a0"),
            st.characters(exclude_categories=["Cs"], exclude_characters="<"),
        ),
        max_size=40,
    )
)
def test_ids_are_the_original_tokenizers_on_any_text(pairs, text):
    for converted, encode in pairs:
        assert converted.encode(text, add_special_tokens=False) == encode(text)


def test_special_tokens(llama2_folder, llama3_folder):
    tokenizer = AutoTokenizer.from_pretrained(llama2_folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<s>",
        "</s>",
        "<unk>",
    )
    assert tokenizer.eos_token_id in tokenizer.encode("a</s>b")

    tokenizer = AutoTokenizer.from_pretrained(llama3_folder)
    assert len(tokenizer) == 600
    assert tokenizer.bos_token_id == 344
    assert tokenizer.eos_token == "<|end_of_text|>"
    assert tokenizer.pad_token_id == 344 + 4
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.encode("<|eot_id|>", add_special_tokens=False) == [344 + 9]
    generation = json.loads((llama3_folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [345, 344 + 9]


def test_llama3_special_tokens_in_both_spellings():
    for scaled in (False, True):
        tokens = llama3_special_tokens(scaled)
        assert len(set(tokens)) == 256
        assert tokens.index("<|start_header_id|>") == 6
        assert tokens.index("<|eot_id|>") == 9
    assert llama3_special_tokens(False)[-1] == "<|reserved_special_token_250|>"
    assert llama3_special_tokens(True)[4] == "<|finetune_right_pad_id|>"
    assert llama3_special_tokens(True)[-1] == "<|reserved_special_token_247|>"


@pytest.mark.parametrize(
    ("special", "unk", "pad", "expected"),
    [
        (["<s>", "</s>", "<unk>"], "<unk>", None, "<unk>"),
        (["<s>", "</s>", "<pad>"], None, "<pad>", "<pad>"),
        (["<s>", "</s>", "<unk>", "[PAD]"], "<unk>", "</s>", "[PAD]"),
        (["<s>", "</s>", "<|reserved_0|>"], "</s>", "</s>", "<|reserved_0|>"),
    ],
)
def test_padding_is_a_token_of_the_vocabulary_and_never_eos(special, unk, pad, expected):
    assert choose_pad(Path("x"), special, {"<s>", "</s>"}, unk, pad) == expected


def test_no_token_for_padding():
    with pytest.raises(InputError, match="for padding"):
        choose_pad(Path("x"), ["<s>", "</s>"], {"<s>", "</s>"}, None, "</s>")


def test_sentencepiece_that_changes_text_is_refused(tmp_path, capsys):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        minloglevel=2,
    )
    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 1)
    source = meta_folder(tmp_path / "in", tmp_path / "tokenizer.model", PARAMS, shards)
    line = refused(
        capsys, "--input_dir", source, "--model_size", "7B", "--output_dir", tmp_path / "out"
    )
    assert "byte-pair SentencePiece that leaves text as it is" in line


# ---------------------------------------------------------------- GGUF


def tiny_model(tied: bool, vocab_size: int, rope: dict | None = None) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=131_072 if rope else 512,
        rms_norm_eps=1e-5,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(path: Path, model, tokenizer, kind=gguf.GGMLQuantizationType.F32, **changes) -> None:
    """Write `model` as llama.cpp's converter does; quantising also rounds `model`'s own weights.

    `tokenizer` is a function that adds its keys to the writer.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokenizer(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        stored = gguf.GGMLQuantizationType.F32 if array.ndim == 1 else kind
        data = gguf.quants.quantize(array, stored)
        parameter.data = torch.from_numpy(gguf.quants.dequantize(data, stored).copy())
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:  # rows are permuted, so that blocks along a row stay as they are
                data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=stored)
    if config.rope_parameters["rope_type"] == "llama3":
        scale = config.rope_parameters["factor"]
        plain = reference_llama.rotations(16, 2, config.rope_parameters["rope_theta"], None)[1]
        scaled = reference_llama.rotations(16, 2, config.rope_parameters["rope_theta"], scale)[1]
        writer.add_tensor("rope_freqs.weight", (plain.angle() / scaled.angle()).numpy())
    for name, tensor in changes.get("extra", {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def spm_keys(path: Path, pad: int | None = None):
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(original.vocab_size())

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([original.id_to_piece(id) for id in ids])
        writer.add_token_scores([original.get_score(id) for id in ids])
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(ids) - 259))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        if pad is not None:
            writer.add_pad_token_id(pad)

    return add


def bpe_keys(path: Path, pre: str, template: str | None = None):
    """A byte-level vocabulary with a merge for every token, as llama.cpp lists them."""
    letter = {byte: letter for letter, byte in byte_of_letter().items()}
    ranks = tiktoken_ranks(path)

    def spell(token: bytes) -> str:
        return "".join(letter[byte] for byte in token)

    merges = [
        f"{spell(token[:cut])} {spell(token[cut:])}"
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    tokens = [spell(token) for token in ranks] + ["<|a|>", "<|b|>", "<|c|>", "<|d|>"]

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([1] * len(ranks) + [3] * 4)
        writer.add_token_merges(merges)
        writer.add_bos_token_id(344)
        writer.add_eos_token_id(345)
        writer.add_pad_token_id(345)
        if template:
            writer.add_chat_template(template)

    return add


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_gguf_gives_the_source_models_logits(tmp_path, spm, kind, tied):
    model = tiny_model(tied, 480)
    write_gguf(tmp_path / "m.gguf", model, spm_keys(spm, pad=2), gguf.GGMLQuantizationType[kind])
    arguments = ["--gguf", tmp_path / "m.gguf", "--output_dir", tmp_path / "out"]
    assert convert(*arguments, "--dtype", "float32") == 0
    tokens = torch.arange(3, 300)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    torch.testing.assert_close(model_logits(tmp_path / "out", tokens), expected, atol=1e-4, rtol=0)

    assert convert(*arguments, "--overwrite") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == ("bfloat16" if kind == "BF16" else "float16")
    assert config["tie_word_embeddings"] is tied
    assert "gguf" not in json.dumps(config).lower()
    assert "quantization_config" not in config
    assert "_name_or_path" not in config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)  # the file said pad is eos
    original = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    for text in TEXTS:
        assert tokenizer.encode(text) == [1, *original.encode(text)]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_keeps_llama3_rotary_scaling(tmp_path, tiktoken_model, factor):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_model(False, 348, rope)
    write_gguf(tmp_path / "m.gguf", model, bpe_keys(tiktoken_model, "llama-bpe"))
    arguments = ["--gguf", tmp_path / "m.gguf", "--output_dir", tmp_path / "out"]
    assert convert(*arguments, "--dtype", "float32") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"] == rope
    tokens = torch.arange(0, 300)
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    torch.testing.assert_close(model_logits(tmp_path / "out", tokens), expected, atol=1e-4, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    encoding = tiktoken_encoding(tiktoken_model)
    for text in TEXTS:
        ids = encoding.encode(text, disallowed_special=())
        assert tokenizer.encode(text) == [344, *ids]  # llama-bpe adds bos unless the file says no


def test_gguf_smollm_splits_digits_and_keeps_the_chat_template(tmp_path, tiktoken_model):
    template = "{% for m in messages %}<|a|>{{ m['content'] }}<|b|>{% endfor %}"
    keys = bpe_keys(tiktoken_model, "smollm", template)
    write_gguf(tmp_path / "m.gguf", tiny_model(True, 348), keys)
    assert convert("--gguf", tmp_path / "m.gguf", "--output_dir", tmp_path / "out") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == template
    assert tokenizer.pad_token == "<|c|>"
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|a|>hi<|b|>"
    assert tokenizer.tokenize("in  2024")[-5:] == ["ĠĠ", "2", "0", "2", "4"]
    assert tokenizer.encode("hi")[0] != tokenizer.bos_token_id


def truncated(path: Path, spm: Path, keep: float) -> None:
    write_gguf(path, tiny_model(True, 480), spm_keys(spm))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


BAD_GGUF = {
    "missing": (lambda p, s: None, "No such file"),
    "not GGUF": (
        lambda p, s: p.write_bytes(b"PK\3\4" + bytes(99)),
        "expected a GGUF file, found one",
    ),
    "empty": (
        lambda p, s: p.write_bytes(b""),
        "expected a GGUF file, found one that begins with b''",
    ),
    "only magic": (lambda p, s: p.write_bytes(b"GGUF"), "cut off or damaged"),
    "header cut": (lambda p, s: truncated(p, s, 0.02), "cut off or damaged"),
    "tensors cut": (lambda p, s: truncated(p, s, 0.9), "cut off or damaged"),
    "architecture": (
        lambda p, s: write_gguf(p, tiny_model(True, 480), spm_keys(s), architecture="qwen2"),
        "expected the architecture 'llama', found 'qwen2'",
    ),
    "unknown tensor": (
        lambda p, s: write_gguf(
            p,
            tiny_model(True, 480),
            spm_keys(s),
            extra={"blk.0.attn_q.bias": np.zeros(64, dtype=np.float32)},
        ),
        "expected only the tensors of a Llama model, found blk.0.attn_q.bias",
    ),
    "vocabulary": (
        lambda p, s: write_gguf(p, tiny_model(True, 320), spm_keys(s)),
        "expected at most 320 tokens.* found 480",
    ),
    "no tokenizer": (
        lambda p, s: write_gguf(p, tiny_model(True, 480), lambda writer: None),
        "expected the key 'tokenizer.ggml.model'",
    ),
}


@pytest.mark.parametrize("case", BAD_GGUF)
def test_bad_gguf_is_one_line_and_leaves_nothing(tmp_path, capsys, spm, case):
    damage, expected = BAD_GGUF[case]
    damage(tmp_path / "m.gguf", spm)
    before = contents(tmp_path)
    line = refused(capsys, "--gguf", tmp_path / "m.gguf", "--output_dir", tmp_path / "a" / "out")
    assert re.search(expected, line), line
    assert contents(tmp_path) == before


def test_gguf_unknown_text_cutting_is_refused(tmp_path, capsys, tiktoken_model):
    write_gguf(tmp_path / "m.gguf", tiny_model(True, 348), bpe_keys(tiktoken_model, "viking"))
    line = refused(capsys, "--gguf", tmp_path / "m.gguf", "--output_dir", tmp_path / "out")
    assert "expected tokenizer.ggml.pre to be one of" in line
    assert "found 'viking'" in line


@pytest.mark.slow
def test_smollm2(tmp_path, smollm2_gguf):
    """The demo's base model: the weights transformers reads, in float16, and its answers."""
    assert convert("--gguf", smollm2_gguf, "--output_dir", tmp_path / "out") == 0
    path = Path(smollm2_gguf)
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert ours.dtype == torch.float16
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[name].half()), name

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.pad_token == "<|endoftext|>"
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = ours.float().generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


# ---------------------------------------------------------------- the command line


def test_help_is_fast_and_says_what_the_defaults_are():
    started = time.monotonic()
    result = run("--help")
    assert result.returncode == 0
    for flag in ("--input_dir", "--model_size", "--output_dir", "--gguf", "--dtype", "2GB"):
        assert flag in result.stdout
    imported = subprocess.run(
        [sys.executable, "-X", "importtime", str(SCRIPT), "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert "torch" not in imported
    assert "transformers" not in imported
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "args",
    [
        ["--output_dir", "x"],
        ["--input_dir", "a", "--gguf", "b", "--output_dir", "x"],
        ["--gguf", "b", "--model_size", "7B", "--output_dir", "x"],
        ["--input_dir", "a", "--output_dir", "x", "--max_shard_size", "lots"],
        ["--input_dir", "a", "--output_dir", "x", "--dtype", "int8"],
    ],
)
def test_usage_errors_exit_2(args, tmp_path):
    result = run(*args, cwd=tmp_path)
    assert result.returncode == 2
    assert "usage: " in result.stderr
    assert not list(tmp_path.iterdir())


def test_missing_input_through_the_script(tmp_path):
    result = run(
        "--input_dir", tmp_path / "nowhere", "--model_size", "7B", "--output_dir", tmp_path / "o"
    )
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "found no such folder" in result.stderr
