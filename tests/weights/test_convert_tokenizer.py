"""Tokenizers of checkpoints: the converted ones give the ids of the originals, on any text."""

import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llama_lora.cli import InputError
from llama_lora.weights.llama_tokenizer import choose_pad, llama3_special_tokens
from tests.weights import reference_llama
from tests.weights.conversion import (
    HIDDEN,
    PARAMS,
    SENTENCES,
    TEXTS,
    convert,
    meta_folder,
    refused,
    tiktoken_encoding,
)


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


def test_sentencepiece_that_changes_text_is_refused(tmp_path):
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
    line = refused("--input_dir", source, "--model_size", "7B", "--output_dir", tmp_path / "out")
    assert "byte-pair SentencePiece that leaves text as it is" in line
