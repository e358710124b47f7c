"""Batches: every answer is the one that its prompt gets alone."""

import logging

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from llama_lora.chat.adapters import load
from llama_lora.chat.batch import answers
from llama_lora.chat.sampling import Sampling, generator
from llama_lora.chat.streaming import Decoder
from llama_lora.cli import InputError
from llama_lora.model.base import load_base
from llama_lora.model.template import Template, load_tokenizer
from tests.chat.taught import ADAPTER_ANSWERS, GREEDY, WINDOW, config, fed, said

FIRST, SECOND, THIRD = ADAPTER_ANSWERS
ASKED = [
    [said("human", FIRST)],
    [said("system", "Be brief."), said("human", SECOND)],
    [said("human", THIRD), said("gpt", ADAPTER_ANSWERS[THIRD]), said("human", SECOND)],
    [said("human", "Tell me more. " * 8)],
    [said("human", "a")],
    [said("human", FIRST), said("gpt", ADAPTER_ANSWERS[FIRST]), said("human", SECOND)],
    [said("human", "答 🐦 </s> or <s>?")],
]


def one_by_one(model, template, asked, sampling) -> list[tuple]:
    """What a chat answers, each of `asked` in one of its own."""
    found = []
    for number, turns in enumerate(asked):
        decoder = Decoder(model, template)
        prompt = decoder.prompter.fit(turns, sampling.max_new_tokens)
        random = generator(model, sampling.seed, number)
        text = "".join(decoder.stream(prompt.ids, sampling, random))
        found.append((number, text, decoder.finish_reason))
    return found


def in_batches(*args, **kwargs) -> list[tuple]:
    return [(index, text, reason) for index, text, reason, _ in sorted(answers(*args, **kwargs))]


@pytest.fixture(scope="module")
def model(base, lora):
    return load(base, lora)[:2]


@pytest.fixture(scope="module")
def unstoppable(endless):
    return load(endless)[:2]


@pytest.mark.parametrize("size", [1, 2, 3, None])
def test_greedy_answers_are_those_of_a_chat(model, size):
    expected = one_by_one(*model, ASKED, GREEDY)
    assert expected[5] == (5, ADAPTER_ANSWERS[SECOND], "stop")
    assert in_batches(*model, ASKED, GREEDY, size) == expected


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0}, {"temperature": 0, "repetition_penalty": 1.3}, {"seed": 7}]
    + [{"seed": 7, "temperature": 1.5, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1}],
)
def test_answers_of_an_untaught_model_are_those_of_a_chat(unstoppable, changes):
    sampling = Sampling(**{"max_new_tokens": 24, **changes})
    expected = one_by_one(*unstoppable, ASKED, sampling)
    assert "length" in {reason for _, _, reason in expected}
    for size in (1, 3, None):
        assert in_batches(*unstoppable, ASKED, sampling, size) == expected


def test_random_numbers_are_the_conversations_own(unstoppable):
    sampling = Sampling(temperature=1.5, max_new_tokens=12, seed=3)
    asked = [ASKED[0]] * 3
    texts = [text for _, text, _ in in_batches(*unstoppable, asked, sampling)]
    assert len(set(texts)) == 3
    again = in_batches(*unstoppable, asked[:2], sampling, numbers=[2, 0])
    assert [text for _, text, _ in again] == [texts[2], texts[0]]
    unseeded = Sampling(temperature=1.5, max_new_tokens=12)
    others = {in_batches(*unstoppable, asked[:1], unseeded)[0][1] for _ in range(3)}
    assert len(others) == 3


def test_longest_prompts_come_first_and_batches_are_of_similar_length(model):
    passes = fed(model[0])
    order = [answer.index for answer in answers(*model, ASKED, GREEDY, 2)]
    prompts = [ids for ids in passes if len(ids) > 1]
    assert prompts == sorted(prompts, key=len, reverse=True)
    assert len(prompts) == 4
    assert sorted(order) == list(range(len(ASKED)))


def test_every_answer_stays_inside_the_window(base):
    """Rows of a batch reach the end of the window after different numbers of tokens."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config())
    with torch.no_grad():
        model.lm_head.weight[2] = 0
    template = Template(load_tokenizer(base))
    asked = [[said("human", "a" * length)] for length in (10, 60, 120)]
    found = sorted(answers(model, template, asked, Sampling(0, max_new_tokens=1000)))
    for answer, turns in zip(found, asked, strict=True):
        assert len(answer.tokens) == WINDOW - len(template.prompt_ids(turns))
        assert answer.finish_reason == "length"


def test_what_cannot_be_answered_says_why(model, caplog):
    long = [said("human", "And now?"), said("gpt", "b" * 300), said("human", FIRST)]
    asked = [
        [said("human", " \n")],
        [said("human", FIRST)],
        [said("human", "a " * WINDOW)],
        long,
    ]
    with caplog.at_level(logging.WARNING, "llama_lora"):
        found = in_batches(*model, asked, GREEDY)
    answered = ADAPTER_ANSWERS[FIRST], "stop"
    assert found == [(0, "", "empty"), (1, *answered), (2, "", "too_long"), (3, *answered)]
    assert [record.message for record in caplog.records] == [
        f"(1 conversations are longer than the model's window of {WINDOW} tokens: their oldest "
        "questions and answers are left out)"
    ]


def test_settings_of_the_base_do_not_apply(model):
    own = GenerationConfig(
        temperature=0.1, do_sample=True, suppress_tokens=list(range(3, 300)), eos_token_id=2
    )
    base = model[0].get_base_model()
    before, base.generation_config = base.generation_config, own
    try:
        assert in_batches(*model, ASKED[:2], GREEDY)[0][1] == ADAPTER_ANSWERS[FIRST]
        assert base.generation_config is own
    finally:
        base.generation_config = before


def small(most_rows: int):
    """A hook that refuses larger batches as a card does that has too little memory."""

    def refuse(_, inputs):
        if inputs[0].shape[0] > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return refuse


def test_batches_are_halved_where_memory_does_not_do(model, caplog):
    expected = in_batches(*model, ASKED, GREEDY)
    hook = model[0].get_input_embeddings().register_forward_pre_hook(small(2))
    try:
        with caplog.at_level(logging.WARNING, "llama_lora"):
            assert in_batches(*model, ASKED, GREEDY, 7) == expected
    finally:
        hook.remove()
    assert [record.message for record in caplog.records] == [
        "(out of memory with 7 at a time; from now on 3 at a time)",
        "(out of memory with 3 at a time; from now on 1 at a time)",
    ]
    hook = model[0].get_input_embeddings().register_forward_pre_hook(small(0))
    try:
        with pytest.raises(torch.OutOfMemoryError):
            in_batches(*model, ASKED, GREEDY)
    finally:
        hook.remove()


def test_scores_that_are_not_finite_are_refused(base):
    model, template, _ = load(base)
    with torch.no_grad():
        model.lm_head.weight *= float("inf")
    with pytest.raises(InputError, match="scores are not finite"):
        in_batches(model, template, ASKED, GREEDY)


QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Name three primes.",
    "Translate to German: The bird sings in the old tree, and nobody listens to it any more.",
    "def f(n):\n    return n\n\nWhat does this Python function do?",
    "你好，你是谁？",
    "Why is the sky blue? " * 12,
    "Hi",
]


@pytest.mark.slow
def test_smollm2(tmp_path, smollm2_gguf):
    """The demo's base in float32, with its own template."""
    from tests.weights.conversion import convert

    assert convert("--gguf", smollm2_gguf, "--output_dir", tmp_path / "base") == 0
    model = load_base(tmp_path / "base", dtype=torch.float32)
    template = Template(load_tokenizer(tmp_path / "base"), "model")
    asked = [[said("human", question)] for question in QUESTIONS]
    sampling = Sampling(temperature=0, max_new_tokens=64)
    expected = one_by_one(model, template, asked, sampling)
    assert "Paris" in expected[0][1]
    assert in_batches(model, template, asked, sampling, 8) == expected
