"""The folder a conversion writes, whole or not at all whatever fails, and the command line."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch

from llama_lora.weights.hf_writer import write_folder
from llama_lora.weights.meta_checkpoint import open_meta_checkpoint
from tests.conftest import run_here, run_script
from tests.weights import reference_llama
from tests.weights.conversion import (
    HIDDEN,
    PARAMS,
    SCRIPT,
    contents,
    convert,
    meta_folder,
    refused,
    rewrite,
)


def test_folder_holds_exactly_what_a_model_needs(tmp_path, spm):
    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 1)
    source = meta_folder(tmp_path / "in", spm, PARAMS, shards)
    output = source / "output" / "7B"  # inside the input, as the README has it
    result = run_here(SCRIPT, "--input_dir", source, "--model_size", "7B", "--output_dir", output)
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


def test_model_in_the_way_survives_until_a_replacement_is_complete(tmp_path, spm):
    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 1)
    source = meta_folder(tmp_path / "in", spm, PARAMS, shards)
    arguments = ["--input_dir", source, "--model_size", "7B", "--output_dir", tmp_path / "out"]
    assert convert(*arguments) == 0
    before = contents(tmp_path / "out")
    assert "--overwrite replaces it" in refused(*arguments)
    assert contents(tmp_path / "out") == before

    rewrite(source, lambda s: s["layers.1.feed_forward.w2.weight"].fill_(math.inf), number=0)
    refused(*arguments, "--overwrite")
    assert contents(tmp_path / "out") == before

    rewrite(source, lambda s: s["layers.1.feed_forward.w2.weight"].fill_(0.5), number=0)
    (tmp_path / ".out.partial").mkdir()  # what a killed run leaves
    (tmp_path / ".out.partial" / "model.safetensors").write_text("half")
    assert convert(*arguments, "--overwrite", "--dtype", "bfloat16") == 0
    assert contents(tmp_path / "out") != before
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_folder_of_other_things_is_never_replaced(tmp_path, spm):
    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 1)
    source = meta_folder(tmp_path / "in", spm, PARAMS, shards)
    before = contents(source)
    for target in (source, source / "7B", source / "tokenizer.model"):
        arguments = ["--input_dir", source, "--model_size", "7B", "--output_dir", target]
        refused(*arguments, "--overwrite")
    assert contents(source) == before


def test_disk_too_small(tmp_path, spm, monkeypatch):
    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 1)
    source = meta_folder(tmp_path / "in", spm, PARAMS, shards)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10_000))
    line = refused("--input_dir", source, "--model_size", "7B", "--output_dir", tmp_path / "out")
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
    result = run_script(
        *[SCRIPT, "--input_dir", source, "--model_size", "7B", "--output_dir", tmp_path / "out"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/out: could not be written")
    assert "Traceback" not in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


MEASURED = """
import pathlib, sys, threading, time
from llama_lora.weights.hf_writer import write_folder
from llama_lora.weights.meta_checkpoint import open_meta_checkpoint

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
    )
    total, peak = map(int, result.stdout.split())
    assert total > 190_000_000
    assert peak < 2 * limit  # a shard, and the tensors it is being put together from


# ---------------------------------------------------------------- the command line


def test_help_says_what_the_defaults_are():
    result = run_here(SCRIPT, "--help")
    assert result.returncode == 0
    for flag in ("--input_dir", "--model_size", "--output_dir", "--gguf", "--dtype", "2GB"):
        assert flag in result.stdout


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
def test_usage_errors_exit_2(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_here(SCRIPT, *args)
    assert result.returncode == 2
    assert "usage: " in result.stderr
    assert not list(tmp_path.iterdir())


def test_missing_input_through_the_script(tmp_path):
    result = run_here(
        *[SCRIPT, "--input_dir", tmp_path / "nowhere", "--model_size", "7B"],
        *["--output_dir", tmp_path / "o"],
    )
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "found no such folder" in result.stderr
