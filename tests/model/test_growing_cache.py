"""The cache of keys and values: answers are those with transformers' own, and little is copied."""

import pytest
import torch
from transformers import DynamicCache

from benchmarks.operators import Counted
from llama_lora.chat.batch import answers
from llama_lora.chat.sampling import Sampling, generator
from llama_lora.chat.session import Chat
from llama_lora.chat.streaming import Decoder
from llama_lora.model import growing_cache
from llama_lora.model.base import load_base
from llama_lora.model.grouped_query_attention import UNGROUPED
from llama_lora.model.growing_cache import STEP
from llama_lora.model.template import Template, load_tokenizer
from tests.train.compute import bases
from tests.weights.merging import make_base

KINDS = "llama", "mistral", "gemma3"  # the last two with windows of 16 tokens
# Sampled, since every score counts then.
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=STEP // 2, seed=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, llama_tokenizer):
    """Random bases with grouped queries."""

    def folder(kind: str):
        into, more = tmp_path_factory.mktemp(kind), {"max_position_embeddings": 2048}
        if kind == "llama":
            return make_base(into, llama_tokenizer, **more)
        return bases.saved(into, kind, llama_tokenizer, **more)

    return {kind: folder(kind) for kind in KINDS}


@pytest.fixture
def transformers_own(monkeypatch):
    """Until it is called, nothing changes; after that, caches are those of transformers."""

    def use() -> None:
        monkeypatch.setattr(growing_cache, "whole", lambda longest: DynamicCache())
        monkeypatch.setattr(
            growing_cache, "by_layer", lambda config, longest: DynamicCache(config=config)
        )

    return use


def conversation(model, template) -> list[str]:
    """Answers over several steps, with one that is asked for again and one that is broken off."""
    chat = Chat(model, template, SAMPLING)
    for number in range(3):
        list(chat.stream(f"And now {number}?"))
    list(chat.regenerate())
    pieces = chat.stream("Tell me more.")
    next(pieces), next(pieces)
    pieces.close()
    list(chat.stream("Who are you?"))
    assert len(template.prompt_ids([*chat.turns, chat.turns[0]])) > 2 * STEP
    return [turn["value"] for turn in chat.turns]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("llama", torch.float16),
        ("mistral", torch.float32),
        ("gemma3", torch.bfloat16),
    ],
)
def test_chats_are_those_with_transformers_own_cache(folders, kind, dtype, transformers_own):
    model, template = load_base(folders[kind], dtype=dtype), Template(load_tokenizer(folders[kind]))
    found = conversation(model, template)
    transformers_own()
    assert found == conversation(model, template)
    assert len(set(found[1::2])) == len(found) / 2


def test_chats_on_cards_without_grouped_queries(folders, transformers_own):
    model = load_base(folders["llama"])
    model.set_attn_implementation(UNGROUPED)
    template = Template(load_tokenizer(folders["llama"]))
    found = conversation(model, template)
    transformers_own()
    assert found == conversation(model, template)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_with_transformers_own_cache(folders, kind, transformers_own):
    model, template = load_base(folders[kind]), Template(load_tokenizer(folders[kind]))
    asked = [[{"from": "human", "value": "And now? " * times}] for times in (1, 9, 30)]
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=STEP, seed=5)
    found = list(answers(model, template, asked, sampling))
    assert max(len(answer.tokens) for answer in found) > STEP / 2
    transformers_own()
    assert found == list(answers(model, template, asked, sampling))


def test_layers_with_a_window_hold_no_more_in_a_batch(folders):
    model = load_base(folders["gemma3"])
    cache = growing_cache.by_layer(model.config, 400)
    with torch.inference_mode():
        model(torch.arange(3, 303)[None], past_key_values=cache)
    windowed, full = cache.layers
    assert (windowed.keys.shape[2], full.keys.shape[2]) == (bases.WINDOW - 1, 300)


def copied_bytes(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    """What is copied for each of `count` tokens after the first."""
    sampling = Sampling(temperature=0, max_new_tokens=count + 1)
    tokens = decoder.tokens(prompt, sampling, generator(decoder.model, 0))
    next(tokens)
    found = []
    for _ in range(count):
        with Counted() as counted:
            next(tokens)
        found.append(counted.copied)
    return found


def test_a_token_copies_no_more_however_many_there_are(folders, transformers_own):
    model, template = load_base(folders["llama"]), Template(load_tokenizer(folders["llama"]))
    with torch.no_grad():
        model.lm_head.weight[2] = 0  # so that the end is never the likeliest
    prompt = list(range(3, 103))
    found = copied_bytes(Decoder(model, template), prompt, 2 * STEP)
    per_token = min(found)
    layers, heads, size = 2, 2, 8
    larger = {at: bytes for at, bytes in enumerate(found, len(prompt)) if bytes > per_token}
    assert list(larger) == [STEP, 2 * STEP]  # tokens that were held before
    for held, bytes in larger.items():
        assert bytes - per_token == 2 * layers * heads * held * size * 4
    transformers_own()
    own = copied_bytes(Decoder(model, template), prompt, 2 * STEP)
    assert own[-1] > own[0] > per_token
    assert sum(found) < sum(own) / 25


def test_memory_is_taken_in_steps_and_never_more_than_can_be_needed():
    room, longest = growing_cache.Room(longest=STEP + 40), STEP + 40
    states = torch.arange(longest + 1.0).view(1, 1, -1, 1)
    kept = room.append(0, states[:, :, :3])
    taken = [kept.untyped_storage().nbytes() // 4]
    for held in range(3, longest):
        kept = room.append(held, states[:, :, held : held + 1])
        taken.append(kept.untyped_storage().nbytes() // 4)
    assert torch.equal(kept, states[:, :, :longest])
    assert set(taken) == {STEP, longest}
    # Should it be needed after all, it is there.
    assert torch.equal(room.append(longest, states[:, :, longest:]), states)
