"""The measured peak counts what the memory plan counts."""

import torch

from llama_lora.hardware.cards import CARDS, GIB
from llama_lora.train.memory.peak import peak_memory
from llama_lora.train.plan.forecast import room
from llama_lora.train.plan.memory_plan import CUDA_AT_START, CUDA_CONTEXT


def test_of_a_card_what_torch_does_not_see_is_counted(monkeypatch):
    """As the driver has it: 6 GiB are reserved now and 8 were, 0.5 are CUDA's own."""
    figures = {
        "is_available": True,
        "mem_get_info": (9.5 * GIB, 16 * GIB),
        "memory_reserved": 6 * GIB,
        "max_memory_reserved": 8 * GIB,
    }
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda figure=figure: figure)
    assert peak_memory() == 8.5 * GIB


def test_the_plan_counts_the_context_that_is_there_already(monkeypatch):
    """A card that is empty but for it is as large as one that is elsewhere."""
    card = CARDS["T4"]
    left = card.memory - CUDA_AT_START
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (left, card.memory))
    assert room(card, True, 1) == room(card, False, 1) == (card.memory, CUDA_CONTEXT)
