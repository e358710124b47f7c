"""Weights in Meta's layout become a Hugging Face folder that computes the same.

Everything is made here, from random weights and vocabularies trained on a few sentences.
"""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.weights import reference_llama
from tests.weights.conversion import (
    HIDDEN,
    PARAMS,
    contents,
    convert,
    meta_folder,
    model_logits,
    refused,
    rewrite,
)


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


def drop(name):
    return lambda folder: (folder / name).unlink()


def cut_off(folder: Path) -> None:
    path = folder / "7B" / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[:-5000])


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
def test_bad_checkpoint_is_one_line_and_leaves_nothing(tmp_path, spm, case):
    damage, expected = BAD_META[case]
    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 2)
    source = meta_folder(tmp_path / "in", spm, PARAMS, shards)
    damage(source)
    before = contents(tmp_path)
    output = tmp_path / "new" / "parents" / "out"
    line = refused(
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


def test_tokenizer_of_another_model_is_refused(tmp_path, tiktoken_model):
    shards = reference_llama.random_shards(PARAMS, 480, HIDDEN, 1)
    source = meta_folder(tmp_path / "in", tiktoken_model, PARAMS, shards)
    line = refused("--input_dir", source, "--model_size", "7B", "--output_dir", tmp_path / "out")
    assert "expected a tokenizer.model of 480 tokens" in line
    assert "found one of 600" in line
