"""A folder becomes a GGUF file that three readers take for the same model: ours, transformers', and
llama.cpp itself (slow, with `pip install -r requirements-export.txt`).
"""

import runpy
from itertools import islice
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from llama_lora.chat.adapters import load
from llama_lora.cli import InputError
from llama_lora.model.template import Template, load_tokenizer
from llama_lora.weights.gguf_reader import gguf_name, open_gguf
from llama_lora.weights.gguf_writer import FILE_TYPES, write
from llama_lora.weights.hf_reader import FolderWeights
from llama_lora.weights.hf_writer import parameter_shapes
from llama_lora.weights.llama_tokenizer import read_tokenizer_model
from llama_lora.weights.merge_lora import merge
from tests.weights.conversion import TEXTS, convert
from tests.weights.merging import SCRIPT, loaded, logits, make_adapter, make_base

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
# The largest error as a share of the largest value of a row: half a step, and float16's scale.
ERRORS = {"Q8_0": 1 / 220, "Q5_0": 1 / 15, "Q5_1": 1 / 30, "Q4_0": 1 / 7, "Q4_1": 1 / 14}


def with_template(tokenizer):
    return Template(tokenizer).tokenizer


@pytest.fixture
def llama3_tokenizer(tiktoken_model):
    return with_template(read_tokenizer_model(tiktoken_model, scaled_rope=True).tokenizer)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("kind", "stored"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")]
)
def test_unquantized_files_hold_every_value(tmp_path, llama_tokenizer, kind, stored, tied):
    folder = make_base(
        tmp_path / "model",
        with_template(llama_tokenizer),
        getattr(torch, stored),
        tie_word_embeddings=tied,
    )
    write(folder, tmp_path / "m.gguf", kind)
    weights, read = FolderWeights(folder), open_gguf(tmp_path / "m.gguf")
    for name in parameter_shapes(read.config):
        assert torch.equal(read.load(name), weights.load(name).float()), name
    ours = {key: getattr(weights.config, key) for key in read.config.to_dict() if key in KEPT}
    assert ours == {key: getattr(read.config, key) for key in ours}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(loaded(folder)), atol=1e-5, rtol=0)


KEPT = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
}


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR], ids=["llama3", "linear"])
def test_rotary_scaling_is_kept(tmp_path, llama3_tokenizer, rope):
    folder = make_base(
        tmp_path / "model",
        llama3_tokenizer,
        rope_parameters=rope,
        max_position_embeddings=131_072,
        hidden_size=64,
    )
    write(folder, tmp_path / "m.gguf", "F32")
    assert open_gguf(tmp_path / "m.gguf").config.rope_parameters == rope


@pytest.mark.parametrize("kind", ERRORS)
def test_quantized_files_round_and_keep_embeddings_and_head_finer(tmp_path, llama_tokenizer, kind):
    folder = make_base(tmp_path / "model", with_template(llama_tokenizer), hidden_size=64)
    write(folder, tmp_path / "m.gguf", kind)
    weights, read = FolderWeights(folder), open_gguf(tmp_path / "m.gguf")
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for name, shape in weights.shapes.items():
        exact, found = weights.load(name), read.load(name)
        if len(shape) == 1:
            assert stored[gguf_name(name)] == "F32"
            assert torch.equal(found, exact)
            continue
        ends = "embed_tokens" in name or "lm_head" in name
        assert stored[gguf_name(name)] == ("Q8_0" if ends else kind)
        error = (found - exact).abs().amax(1) / exact.abs().amax(1)
        assert 0 < error.max() < ERRORS["Q8_0" if ends else kind]
    assert open_gguf(tmp_path / "m.gguf").tokenizer.eos_token_id == 2


def test_rows_that_are_not_whole_blocks_are_float16(tmp_path, llama_tokenizer):
    folder = make_base(tmp_path / "model", with_template(llama_tokenizer), hidden_size=48)
    write(folder, tmp_path / "m.gguf", "Q4_0")
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert stored["blk.0.attn_q.weight"] == stored["token_embd.weight"] == "F16"
    assert stored["blk.0.ffn_down.weight"] == "Q4_0"
    assert open_gguf(tmp_path / "m.gguf").load("model.norm.weight").shape == (48,)


def test_names_are_llama_cpps(tmp_path, llama_tokenizer):
    folder = make_base(tmp_path / "model", with_template(llama_tokenizer))
    write(folder, tmp_path / "m.gguf", "F16")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    expected = [names.get_name(n, (".weight",)) for n in FolderWeights(folder).shapes]
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert [tensor.name for tensor in reader.tensors] == expected
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_F16
    assert reader.fields["llama.vocab_size"].contents() == len(llama_tokenizer)


def same_tokenizer(folder: Path, tmp_path: Path):
    """Export, read back, and compare ids, roles and the chat template; return what was read."""
    write(folder, tmp_path / "m.gguf", "F16")
    theirs, ours = open_gguf(tmp_path / "m.gguf").tokenizer, load_tokenizer(folder)
    for text in [*TEXTS, "a</s>b", "<|im_end|> x", "<0x41>", "x <note>y"]:
        assert theirs.encode(text) == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    for role in ("bos", "eos", "pad", "unk"):
        assert getattr(theirs, f"{role}_token") == getattr(ours, f"{role}_token")
    assert theirs.chat_template == ours.chat_template
    return gguf.GGUFReader(tmp_path / "m.gguf").fields


def test_sentencepiece_tokenizer(tmp_path, llama_tokenizer):
    folder = make_base(tmp_path / "model", with_template(llama_tokenizer))
    fields = same_tokenizer(folder, tmp_path)
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[:4] == [2, 3, 3, 6]
    assert kinds.count(6) == 256
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True


def test_scores_join_pieces_in_sentencepieces_order(tmp_path, spm):
    import sentencepiece

    original = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    tokenizer = with_template(read_tokenizer_model(spm, scaled_rope=False).tokenizer)
    write(make_base(tmp_path / "model", tokenizer), tmp_path / "m.gguf", "F16")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    tokens, scores = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores"))
    assert tokens == [original.id_to_piece(id) for id in range(original.vocab_size())]
    joined = [id for id in range(259, len(tokens)) if len(tokens[id]) > 1]
    assert joined
    ours = sorted(joined, key=lambda id: -scores[id])
    assert ours == sorted(joined, key=lambda id: -original.get_score(id))


def test_llama3_tokenizer(tmp_path, llama3_tokenizer):
    folder = make_base(tmp_path / "model", llama3_tokenizer, vocab_size=len(llama3_tokenizer) + 9)
    fields = same_tokenizer(folder, tmp_path)
    assert fields["tokenizer.ggml.pre"].contents() == "llama-bpe"
    tokens, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    assert len(tokens) == len(llama3_tokenizer) + 9
    assert tokens[-1] == f"[PAD{len(tokens) - 1}]"
    assert set(kinds[-9:]) == {5}
    assert set(kinds[344:-9]) == {3}


@pytest.mark.parametrize("cut", ["gpt-2", "smollm"])
def test_byte_level_tokenizer_with_a_user_defined_token(tmp_path, byte_tokenizer, cut):
    backend = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    if cut == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    roles = {f"{role}_token": getattr(byte_tokenizer, f"{role}_token") for role in ROLES}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    tokenizer.add_tokens(["<note>"])
    folder = make_base(tmp_path / "model", with_template(tokenizer))
    fields = same_tokenizer(folder, tmp_path)
    assert fields["tokenizer.ggml.pre"].contents() == cut
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["tokenizer.ggml.token_type"].contents()[-1] == 4


ROLES = ("bos", "eos", "unk", "pad")


def test_token_that_ends_an_answer_beside_eos_is_named(tmp_path, llama3_tokenizer):
    llama3_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}"
    )
    folder = make_base(tmp_path / "model", llama3_tokenizer)
    write(folder, tmp_path / "m.gguf", "F16")
    end = llama3_tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert end in open_gguf(tmp_path / "m.gguf").stop_ids


def unigram(llama_tokenizer, byte_tokenizer):
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("a", -1.0), ("b", -2.0)]
    return wrapped(Tokenizer(models.Unigram(pieces, unk_id=0)))


def cut_otherwise(llama_tokenizer, byte_tokenizer):
    backend = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.pre_tokenizer = byte_level
    return wrapped(backend)


def normalized(llama_tokenizer, byte_tokenizer):
    from tokenizers import normalizers

    backend = Tokenizer.from_str(llama_tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), backend.normalizer])
    return wrapped(backend)


def wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    names = list(backend.get_vocab())[:2]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=names[0], pad_token=names[1]
    )
    return with_template(tokenizer)


TOKENIZERS = {
    unigram: "expected a BPE tokenizer, found Unigram",
    cut_otherwise: "cuts text as one of llama-bpe, smollm, gpt-2, found another",
    normalized: "expected SentencePiece that leaves text as it is",
}


@pytest.mark.parametrize("make", TOKENIZERS, ids=lambda make: make.__name__)
def test_tokenizer_that_llama_cpp_has_not_is_refused(
    tmp_path, llama_tokenizer, byte_tokenizer, make
):
    tokenizer = make(llama_tokenizer, byte_tokenizer)
    folder = make_base(tmp_path / "model", tokenizer)
    with pytest.raises(InputError, match=TOKENIZERS[make]):
        write(folder, tmp_path / "m.gguf", "F16")


MODELS = {
    "expected a Llama without biases": {"attention_bias": True},
    "expected rope scaling default, linear or llama3, found dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    },
    "expected at most 1000 tokens": {"vocab_size": 1000},
}


@pytest.mark.parametrize("message", MODELS)
def test_model_that_gguf_has_no_place_for_is_refused(tmp_path, llama_tokenizer, message):
    folder = make_base(tmp_path / "model", with_template(llama_tokenizer), **MODELS[message])
    with pytest.raises(InputError, match=message):
        write(folder, tmp_path / "m.gguf", "F16")


def test_command_offers_the_kinds_there_are():
    """The script names them itself, so that its --help needs no torch."""
    assert runpy.run_path(str(SCRIPT))["GGUF_KINDS"] == list(FILE_TYPES)


def test_value_beyond_float16_is_refused(tmp_path, llama_tokenizer):
    folder = make_base(tmp_path / "model", with_template(llama_tokenizer), torch.bfloat16)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: weight * 1e6 for name, weight in weights.items()}, folder / "model.safetensors"
    )
    write(folder, tmp_path / "m.gguf", "BF16")
    with pytest.raises(InputError, match="has values beyond float16; use BF16 or F32"):
        write(folder, tmp_path / "m.gguf", "F16")


# llama.cpp itself


@pytest.fixture(scope="module")
def llama_cpp():
    reason = "pip install -r requirements-export.txt (builds llama.cpp, about 6 minutes)"
    return pytest.importorskip("llama_cpp", reason=reason)


@pytest.fixture(scope="module")
def smollm2_lora(tmp_path_factory, smollm2_gguf) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("smollm2")
    assert convert("--gguf", smollm2_gguf, "--output_dir", folder / "base") == 0
    return folder / "base", make_adapter(folder / "lora", folder / "base", r=8, lora_alpha=32)


def in_llama_cpp(llama_cpp, file: Path):
    """The model in `file`, with a cache of keys and values in float32 as transformers' is."""
    usual = llama_cpp.llama_cpp.llama_model_default_params

    def plain():
        """Without weights repacked for AMX, whose kernels fault on some virtual machines."""
        parameters = usual()
        parameters.use_extra_bufts = False
        return parameters

    with mock.patch.object(llama_cpp.llama_cpp, "llama_model_default_params", plain):
        return llama_cpp.Llama(
            str(file), n_ctx=512, n_batch=512, n_threads=2, type_k=0, type_v=0, verbose=False
        )


def greedy(model, ids: list[int], length: int) -> list[int]:
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            eos_token_id=None,
        )
    return out[0, len(ids) :].tolist()


QUESTIONS = ["What is the capital of France?", "  Write 2024 in words, né? 你好\n\n\t!"]


@pytest.mark.slow
def test_llama_cpp_answers_as_transformers_does(tmp_path, llama_cpp, smollm2_lora):
    base, lora = smollm2_lora
    merge(base, lora, tmp_path / "out", torch.float32, kinds=("F32", "Q8_0"))
    theirs = in_llama_cpp(llama_cpp, tmp_path / "out" / "out-F32.gguf")
    model, template, _ = load(tmp_path / "out")
    model = model.float()
    apart, changed = loaded(base), []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        ids = template.prompt_ids([{"from": "human", "value": question}])
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
        answer = greedy(model, ids, 60)
        changed.append(answer != greedy(apart, ids, 60))
        assert list(islice(theirs.generate(ids, temp=0.0), 60)) == answer
        said = theirs.create_chat_completion(messages, temperature=0.0, max_tokens=60)
        whole = said["choices"][0]["message"]["content"]
        ended = answer[: answer.index(2)] if 2 in answer else answer
        assert whole.strip() == template.tokenizer.decode(ended).strip()

    assert any(changed)
    coarse = in_llama_cpp(llama_cpp, tmp_path / "out" / "out-Q8_0.gguf")
    assert list(islice(coarse.generate(ids, temp=0.0), 8))


@pytest.mark.slow
@pytest.mark.parametrize("rope", [None, LLAMA3], ids=["plain", "llama3"])
def test_llama_cpp_reads_sentencepiece_and_scaled_rotation(
    tmp_path, llama_cpp, llama_tokenizer, rope
):
    changes = {"rope_parameters": rope} if rope else {}
    folder = make_base(
        tmp_path / "model", with_template(llama_tokenizer), hidden_size=64, **changes
    )
    write(folder, tmp_path / "m.gguf", "F32")
    theirs, ours = in_llama_cpp(llama_cpp, tmp_path / "m.gguf"), load_tokenizer(folder)
    for text in TEXTS:
        ids = ours.encode(text)
        found = theirs.tokenize(text.encode(), add_bos=True, special=True)
        assert found == ids or not text, text
    prompt = Template(ours, "model").prompt_ids([{"from": "human", "value": TEXTS[0]}])
    expected = greedy(loaded(folder), prompt, 40)
    assert list(islice(theirs.generate(prompt, temp=0.0), 40)) == expected


@pytest.mark.slow
def test_llama_cpp_quantizes_to_the_same_bytes(tmp_path, llama_cpp, llama_tokenizer):
    """The blocks are those of llama.cpp's own quantizer."""
    folder = make_base(tmp_path / "model", with_template(llama_tokenizer), hidden_size=64)
    write(folder, tmp_path / "exact.gguf", "F32")
    for kind in ("Q8_0", "Q4_0", "Q5_1"):
        write(folder, tmp_path / f"{kind}.gguf", kind)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        params.pure = True
        source, target = tmp_path / "exact.gguf", tmp_path / f"theirs-{kind}.gguf"
        paths = (str(path).encode() for path in (source, target))
        assert llama_cpp.llama_model_quantize(*paths, params) == 0
        files = (gguf.GGUFReader(path) for path in (tmp_path / f"{kind}.gguf", target))
        ours, theirs = ({t.name: t for t in file.tensors} for file in files)
        for name in ours:
            if "blk" in name and ours[name].tensor_type == theirs[name].tensor_type:
                assert np.array_equal(ours[name].data, theirs[name].data), (kind, name)
