"""Memory that runs out in a chat: the answer ends with a line, and the chat goes on."""

import io
import sys
import weakref
from functools import partial

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from llama_lora.chat import web
from llama_lora.chat.adapters import load, load_adapters
from llama_lora.chat.answer_file import save_conversation
from llama_lora.chat.batch import answers
from llama_lora.chat.console import Console
from llama_lora.chat.out_of_memory import OutOfMemory
from llama_lora.chat.session import Chat
from tests.chat.taught import ADAPTER_ANSWERS, BASE_ANSWERS, GREEDY, generate, said

FIRST, SECOND, THIRD = BASE_ANSWERS
DEFAULTS = ("", 0, 1, 0, 1, 80)  # the page's system message and sliders


@pytest.fixture
def card(monkeypatch):
    """A card with memory for as many tokens, or for as many rows of more tokens than that.

    The second layer is the one that finds none left.
    """
    own = LlamaDecoderLayer.forward

    def holds(most: int, rows: int = 0) -> None:
        def forward(self, hidden_states, *args, position_ids, **others):
            full = position_ids.max() >= most and len(hidden_states) > rows
            if full and self.self_attn.layer_idx == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return own(self, hidden_states, *args, position_ids=position_ids, **others)

        monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)

    return holds


@pytest.fixture
def lengths(base, lora):
    """The tokens of the prompt and the answer to each question, asked alone."""
    _, template, _ = load(base, lora)

    def count(text: str) -> int:
        return len(template.tokenizer.encode(text, add_special_tokens=False))

    return {
        question: (len(template.prompt_ids([said("human", question)])), count(f" {answer}"))
        for question, answer in ADAPTER_ANSWERS.items()
    }


def test_an_answer_ends_with_a_line(base, lora, card, lengths):
    prompt, tokens = lengths[FIRST]
    card(prompt + tokens - 4)
    asked = ("--base_model", base, "--lora_weights", lora, "--temperature", 0, "--prompt", FIRST)
    done = generate(*asked)
    assert done.returncode == 1
    # A token comes from a pass over the one before it, so one more than is held.
    assert done.stderr.splitlines()[-1] == (
        f"error: out of memory: after a prompt of {prompt} tokens, {tokens - 3} of the answer "
        "fitted; what takes less: a shorter question, a shorter system message, "
        "a lower --max_new_tokens, --load_4bit"
    )
    begun = done.stdout.removesuffix("\n")
    assert ADAPTER_ANSWERS[FIRST].startswith(begun)
    assert 0 < len(begun) < len(ADAPTER_ANSWERS[FIRST])
    card(prompt - 1)
    done = generate(*asked, "--load_4bit")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        f"error: out of memory: a prompt of {prompt} tokens does not fit; what takes less: "
        "a shorter question, a shorter system message"
    )


def piped(*lines: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()))


def test_the_next_lines_of_a_pipe_are_answered(base, lora, card, lengths, monkeypatch):
    card(sum(lengths[FIRST]) + 5)
    monkeypatch.setattr(sys, "stdin", piped(FIRST, SECOND, "/reset", THIRD))
    done = generate("--base_model", base, "--lora_weights", lora, "--temperature", 0)
    assert done.stdout == f"{ADAPTER_ANSWERS[FIRST]}\n{ADAPTER_ANSWERS[THIRD]}\n"
    _, short, reset, error = done.stderr.splitlines()
    assert short.startswith("(out of memory: a prompt of ")
    assert "; what takes less: /reset, a shorter system message, --load_4bit)" in short
    assert reset == "(the conversation is forgotten)"
    assert error == "error: answers cut short because memory ran out: 1"
    assert done.returncode == 1


def test_a_chat_in_a_terminal_goes_on(adapters, card, lengths, monkeypatch, capsys):
    card(sum(lengths[SECOND]) - 4)
    keys = piped(SECOND, "/reset", THIRD)
    monkeypatch.setattr(keys, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", keys)
    chat = Chat(adapters.model, adapters.first, GREEDY)
    Console(chat, adapters, partial(save_conversation, mine=set())).run()
    out, err = capsys.readouterr()
    begun, rest = out.split("\n", 1)
    assert ADAPTER_ANSWERS[SECOND].startswith(begun)
    assert begun
    assert rest == f"{ADAPTER_ANSWERS[THIRD]}\n"
    assert "what takes less: /reset, " in err.splitlines()[0]
    assert chat.turns == [said("human", THIRD), said("gpt", ADAPTER_ANSWERS[THIRD])]


def test_what_was_said_is_kept_and_the_rest_is_right(base, lora, oracle, card):
    model, template, _ = load(base, lora)
    chat = Chat(model, template, GREEDY)
    list(chat.stream(FIRST))
    prompt = len(template.prompt_ids([*chat.turns, said("human", SECOND)]))
    card(prompt + 5)
    with pytest.raises(OutOfMemory, match=f"a prompt of {prompt} tokens, 6 of the answer"):
        list(chat.stream(SECOND))
    assert chat.turns[-2] == said("human", SECOND)
    assert ADAPTER_ANSWERS[SECOND].startswith(chat.turns[-1]["value"])
    assert not chat.stopped
    card(10_000)
    values = [turn["value"] for turn in chat.turns]
    assert "".join(chat.stream(THIRD)) == oracle([*values, THIRD])


def test_the_page_says_so_beside_the_answer(adapters, card, lengths):
    answering = web.Answering(adapters, GREEDY)
    *_, (_, _, left, right, _) = answering.ask(FIRST, "one", "base", [], [], *DEFAULTS)
    card(sum(lengths[FIRST]) + 5)
    *_, (_, _, left, _, notes) = answering.ask(SECOND, "one", "base", left, right, *DEFAULTS)
    assert left[-1] == said("human", SECOND)
    assert notes.startswith("one: out of memory: a prompt of ")
    assert "; what takes less: a new chat, a shorter system message, --load_4bit" in notes
    updates = list(answering.ask(THIRD, "one", "base", [], [], *DEFAULTS))
    assert updates[-1][2][-1] == said("gpt", ADAPTER_ANSWERS[THIRD])
    assert updates[-1][3][-1] == said("gpt", BASE_ANSWERS[THIRD])
    assert updates[-1][4] == ""


@pytest.fixture
def left(monkeypatch):
    """The keys and values that are still there whenever the card is to give back what is free."""
    caches, found = weakref.WeakSet(), []
    own = LlamaModel.forward

    def forward(self, *args, past_key_values, **others):
        caches.add(past_key_values)
        return own(self, *args, past_key_values=past_key_values, **others)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append(list(caches)))
    return found


@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_memory_is_free_again(base, lora, card, left, quantization):
    adapters, _ = load_adapters(base, {"one": lora}, quantization)
    chat = Chat(adapters.model, adapters.first, GREEDY)
    list(chat.stream(FIRST))
    card(len(adapters.first.prompt_ids([*chat.turns, said("human", SECOND)])) + 5)
    with pytest.raises(OutOfMemory):
        list(chat.stream(SECOND))
    assert left == [[]]


def test_memory_is_free_again_before_smaller_batches(base, lora, card, left):
    model, template, _ = load(base, lora)
    card(50, rows=1)
    asked = [[said("human", question)] for question in BASE_ANSWERS]
    found = sorted(answers(model, template, asked, GREEDY, 3))
    assert [answer.text for answer in found] == list(ADAPTER_ANSWERS.values())
    assert left == [[]]
