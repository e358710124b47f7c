"""Whether a base is the one that an adapter was trained on: by some of its weights, or its name."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_lora.chat.adapters import load
from llama_lora.model import adapter
from llama_lora.weights.merge_lora import merge
from tests.weights.merging import make_base


def said(caplog) -> list[str]:
    return [record.message for record in caplog.records if "trained on" in record.message]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_moved_base_is_the_same_in_any_16_bits(
    tmp_path, random_lora, llama_tokenizer, caplog, dtype
):
    moved = make_base(tmp_path / "moved", llama_tokenizer, dtype)
    merge(moved, random_lora, tmp_path / "out")
    load(moved, random_lora)
    assert not said(caplog)


def test_other_weights_of_the_same_shapes_are_used_and_said_once(
    tmp_path, random_base, random_lora, caplog
):
    merge(random_base, random_lora, tmp_path / "base")
    merge(tmp_path / "base", random_lora, tmp_path / "out")
    load(tmp_path / "base", random_lora)
    assert said(caplog) == [
        f"({random_lora} was trained on {random_base}; the weights in {tmp_path}/base differ)"
    ]


def test_only_the_name_is_known_where_an_adapter_has_no_values(
    tmp_path, random_base, random_lora, caplog
):
    renamed = shutil.copytree(random_base, tmp_path / "renamed")
    old = shutil.copytree(random_lora, tmp_path / "lora")
    save_file(load_file(random_lora / adapter.WEIGHTS), old / adapter.WEIGHTS)
    merge(renamed, old, tmp_path / "out")
    load(renamed, old)
    assert said(caplog) == [f"({old} was trained on {random_base}; the base here is {renamed})"]
