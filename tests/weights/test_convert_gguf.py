"""GGUF becomes a Hugging Face folder that computes the same."""

import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.weights import reference_llama
from tests.weights.conversion import (
    TEXTS,
    byte_of_letter,
    contents,
    convert,
    model_logits,
    refused,
    tiktoken_encoding,
    tiktoken_ranks,
)


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
def test_bad_gguf_is_one_line_and_leaves_nothing(tmp_path, spm, case):
    damage, expected = BAD_GGUF[case]
    damage(tmp_path / "m.gguf", spm)
    before = contents(tmp_path)
    line = refused("--gguf", tmp_path / "m.gguf", "--output_dir", tmp_path / "a" / "out")
    assert re.search(expected, line), line
    assert contents(tmp_path) == before


def test_gguf_unknown_text_cutting_is_refused(tmp_path, tiktoken_model):
    write_gguf(tmp_path / "m.gguf", tiny_model(True, 348), bpe_keys(tiktoken_model, "viking"))
    line = refused("--gguf", tmp_path / "m.gguf", "--output_dir", tmp_path / "out")
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
