"""Answering with grouped queries: on cards whose fused kernels take none they are given none."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations import sdpa_attention

from llama_lora.cli import InputError
from llama_lora.hardware.cards import CARDS, CPU
from llama_lora.model import base
from llama_lora.model.grouped_query_attention import (
    UNGROUPED,
    implementation,
    sdpa_with_repeated_keys,
)


@pytest.fixture(scope="module", params=[1, 2, 4], ids="{}_key_heads".format)
def grouped(request, tmp_path_factory):
    """A model folder with four query heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=request.param,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("grouped")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def kernel(monkeypatch):
    """What each call of torch's kernel was given."""
    calls, own = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **others):
        calls.append((query.shape, key.shape, others.get("enable_gqa", False)))
        return own(query, key, value, **others)

    monkeypatch.setattr(sdpa_attention.torch.nn.functional, "scaled_dot_product_attention", watched)
    return calls


PADDED = [[1] * 12, [0] * 5 + [1] * 7]


@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
def test_answers_are_those_of_plain_attention(grouped, kernel, mask, monkeypatch):
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(1))
    options = {
        "attention_mask": None if mask is None else torch.tensor(mask),
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected = AutoModelForCausalLM.from_pretrained(grouped, attn_implementation="eager")
    expected = expected.generate(ids, **options)
    kernel.clear()
    monkeypatch.setattr(base, "present", lambda: CARDS["T4"])
    model = base.load_base(grouped, dtype=torch.float32, device="cpu")
    assert model.config._attn_implementation == UNGROUPED
    found = model.generate(ids, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=2e-5)
    heads = model.config.num_key_value_heads
    assert len(kernel) == 2 * 6  # layers and tokens
    assert all(query[1] == key[1] for query, key, _ in kernel)
    assert not any(grouping for *_, grouping in kernel)
    assert kernel[0][1][1] == 4  # the prompt: repeated for each query
    assert kernel[-1][1][1] == heads  # a single token: nothing repeated


def test_cards_whose_fused_kernels_take_grouped_queries():
    fused = {name for name, card in CARDS.items() if implementation(card) == "sdpa"}
    assert {"A100", "RTX 4090", CPU} <= fused
    assert not {"T4", "P100", "V100"} & fused


@pytest.mark.parametrize("asked", ["s_aux", "softcap"])
def test_what_plain_attention_has_not_is_refused(asked):
    row = torch.ones(1, 2, 4, 4)
    with pytest.raises(InputError, match="sinks or soft caps"):
        sdpa_with_repeated_keys(None, row, row, row, None, **{asked: torch.ones(2)})
