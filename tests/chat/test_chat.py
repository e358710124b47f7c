"""Chats: greedy answers equal a plain loop's; history, window and adapters are kept straight."""

from itertools import zip_longest

import pytest

from llama_lora.chat.adapters import load
from llama_lora.chat.sampling import Sampling, generator
from llama_lora.chat.session import Chat
from llama_lora.chat.streaming import Decoder
from llama_lora.cli import InputError
from llama_lora.corpus.records.conversation import check
from tests.chat.taught import (
    ADAPTER_ANSWERS,
    BASE_ANSWERS,
    GREEDY,
    SECOND_ANSWERS,
    WINDOW,
    fed,
    said,
)


def test_greedy_chat_equals_a_plain_loop(chat, oracle):
    turns = []
    for question in ("Who are you?", "What can you do?", "And now?", "Tell me more."):
        answer = "".join(chat.stream(question))
        assert answer == oracle([*turns, question])
        turns += [question, answer]
    assert [turn["value"] for turn in chat.turns] == turns
    assert [turn["from"] for turn in chat.turns] == ["human", "gpt"] * 4
    chat.reset()
    chat.system = "Be brief."
    assert "".join(chat.stream("And now?")) == oracle(["And now?"], "Be brief.")


def test_every_answer_ends_unprinted_and_the_cache_is_reused(base, lora):
    model, template, _ = load(base, lora)
    passes, chat = fed(model), Chat(model, template, GREEDY)
    pieces = list(chat.stream("Who are you?"))
    assert "".join(pieces) == ADAPTER_ANSWERS["Who are you?"]
    assert len(pieces) > 3
    assert chat.stopped
    first = template.prompt_ids([said("human", "Who are you?")])
    assert passes[0] == first
    passes_of_first = sum(passes, [])
    passes.clear()
    assert "".join(chat.stream("What can you do?")) == ADAPTER_ANSWERS["What can you do?"]
    second = template.prompt_ids([*chat.turns[:2], said("human", "What can you do?")])
    shared = len(second) - len(passes[0])
    assert passes_of_first[:shared] == second[:shared]
    assert shared > len(first)


def test_limit_and_base_stop_ids(base, lora):
    model, template, _ = load(base, lora)
    chat = Chat(model, template, Sampling(temperature=0, max_new_tokens=3))
    assert ADAPTER_ANSWERS["And now?"].startswith("".join(chat.stream("And now?")))
    assert not chat.stopped
    answer = template.tokenizer.encode(" A small model, that is all.", add_special_tokens=False)
    model.generation_config.eos_token_id = [2, answer[-1]]
    chat = Chat(model, template, GREEDY)
    assert "".join(chat.stream("And now?")) == template.tokenizer.decode(answer[:-1]).lstrip()
    assert chat.stopped


def test_window_drops_the_oldest_pairs_and_says_so_once(base, lora, oracle, caplog):
    model, template, _ = load(base, lora)
    passes, chat = fed(model), Chat(model, template, GREEDY)
    for number in range(12):
        question = f"And now {number}?"
        passes.clear()
        answer = "".join(chat.stream(question))
        assert sum(map(len, passes)) <= WINDOW
        kept = chat.turns[2 * chat.left_out :]
        assert answer == oracle([turn["value"] for turn in kept[:-1]])
        if chat.left_out:
            longer = template.prompt_ids(chat.turns[2 * chat.left_out - 2 : -1])
            assert len(longer) + GREEDY.max_new_tokens > WINDOW
    assert 0 < 2 * chat.left_out < len(chat.turns) == 24
    assert [record.message for record in caplog.records if "outgrown" in record.message] == [
        f"(the conversation has outgrown the model's window of {WINDOW} tokens: from here on its "
        "oldest questions and answers are left out)"
    ]
    before = chat.left_out
    with pytest.raises(InputError, match="no room for an answer"):
        list(chat.stream("a " * WINDOW))
    assert (chat.left_out, len(chat.turns)) == (before, 24)


@pytest.mark.parametrize("at", [0, 5])
def test_interrupted_answer_leaves_a_usable_chat(base, lora, oracle, at):
    model, template, _ = load(base, lora)
    chat = Chat(model, template, GREEDY)
    list(chat.stream("Who are you?"))
    passes = []

    def interrupt(*_):
        passes.append(1)
        if len(passes) == at + 1:
            raise KeyboardInterrupt

    # Between the layers: the first has cached the token, the second has not.
    hook = model.get_base_model().model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(chat.stream("What can you do?"))
    hook.remove()
    values = [turn["value"] for turn in chat.turns]
    if at == 0:  # nothing of the answer was there yet
        assert len(values) == 2
    else:
        assert len(values) == 4
        assert ADAPTER_ANSWERS["What can you do?"].startswith(values[3])
    assert "".join(chat.stream("And now?")) == oracle([*values, "And now?"])


def test_closing_the_stream_keeps_what_was_said(chat):
    stream = chat.stream("What can you do?")
    heard = next(stream) + next(stream)
    stream.close()
    assert chat.turns[-1] == said("gpt", heard)


def test_sampling(base, lora):
    model, template, _ = load(base, lora)

    def ask(**changes) -> str:
        sampling = Sampling(**{"temperature": 3.0, "top_p": 1.0, "max_new_tokens": 20, **changes})
        return "".join(Chat(model, template, sampling).stream("Who are you?"))

    greedy = ask(temperature=0)
    assert greedy
    assert ADAPTER_ANSWERS["Who are you?"].startswith(greedy)
    assert ask(seed=1) == ask(seed=1)
    assert len({ask(seed=seed) for seed in range(5)}) == 5
    assert len({ask() for _ in range(5)}) == 5
    assert (
        ask(top_k=1) == ask(top_p=1e-6) == ask(temperature=1e-3) == ask(temperature=1e-30) == greedy
    )


def test_repetition_penalty_spares_the_prompt(endless):
    model, template, _ = load(endless)

    def ids(**changes) -> list[int]:
        sampling = Sampling(**{"temperature": 0, "max_new_tokens": 80, **changes})
        return list(Decoder(model, template).tokens([5, 6, 7], sampling, generator(model, 0)))

    plain, penalised = ids(), ids(repetition_penalty=100.0)
    assert len(set(plain)) < len(plain)
    assert len(set(penalised)) == len(penalised) == 80
    assert penalised[0] == plain[0]


@pytest.mark.parametrize(
    "text", ["\ud83d", "a\x00b\x1b[2J\r\x7f", "\ud83d\ude00", "</s><s>", "\u202e"]
)
def test_any_text_is_answered(chat, text):
    chat.system = text
    list(chat.stream(text))
    list(chat.stream(text))


def test_regenerating_replaces_the_last_answer(base, lora, oracle):
    model, template, _ = load(base, lora)
    chat = Chat(model, template, Sampling(temperature=3.0, top_p=1.0, max_new_tokens=20, seed=1))
    with pytest.raises(InputError, match="nothing has been asked"):
        chat.regenerate()
    first = "".join(chat.stream("Who are you?"))
    second = "".join(chat.stream("And now?"))
    again = "".join(chat.regenerate())
    assert again != second
    assert [turn["value"] for turn in chat.turns] == ["Who are you?", first, "And now?", again]
    chat.reset()
    with pytest.raises(InputError, match="nothing has been asked"):
        chat.regenerate()


def test_regenerating_asks_again_what_had_no_answer(chat):
    list(chat.stream("Who are you?"))
    chat.stream("What can you do?").close()
    assert len(chat.turns) == 2
    assert "".join(chat.regenerate()) == ADAPTER_ANSWERS["What can you do?"]
    assert len(chat.turns) == 4


def test_interrupted_regeneration_keeps_the_old_answer(chat):
    answer = "".join(chat.stream("Who are you?"))
    chat.regenerate().close()
    assert chat.turns[-1] == said("gpt", answer)


def test_conversation_is_a_record_of_a_corpus(chat):
    chat.system = "Be brief."
    answer = "".join(chat.stream("Who are you?"))
    record = chat.conversation()
    assert record["conversations"] == [
        said("system", "Be brief."),
        said("human", "Who are you?"),
        said("gpt", answer),
    ]
    assert check(record)[0] == record


def test_adapters_answer_in_turn_on_one_base(adapters):
    assert adapters.names == ["one", "two", "base"]
    decoders = {name: adapters.decoder(name) for name in adapters.names}

    def answer(name: str, question: str) -> str:
        decoder = decoders[name]
        prompt = decoder.prompter.ids([said("human", question)])
        return "".join(decoder.stream(prompt, GREEDY, generator(adapters.model, 0)))

    known = {"one": ADAPTER_ANSWERS, "two": SECOND_ANSWERS, "base": BASE_ANSWERS}
    for question in BASE_ANSWERS:
        for name in ("base", "two", "one", "two", "base", "one"):
            assert answer(name, question) == known[name][question]
    with pytest.raises(InputError, match="no adapter is called three; there are one, two, base"):
        adapters.decoder("three")


def test_streams_of_two_adapters_do_not_disturb_each_other(adapters):
    question = [said("human", "What can you do?")]
    known = {"base": BASE_ANSWERS, "one": ADAPTER_ANSWERS, "two": SECOND_ANSWERS}
    streams = {}
    for name in known:
        decoder = adapters.decoder(name)
        prompt = decoder.prompter.ids(question)
        streams[name] = decoder.stream(prompt, GREEDY, generator(adapters.model, 0))
    texts = dict.fromkeys(known, "")
    for pieces in zip_longest(*streams.values(), fillvalue=""):
        texts = {name: texts[name] + piece for name, piece in zip(texts, pieces, strict=True)}
    assert texts == {name: answers["What can you do?"] for name, answers in known.items()}


def test_two_streams_of_one_decoder_do_not_disturb_each_other(base, oracle, lora):
    model, template, _ = load(base, lora)
    decoder = Decoder(model, template)
    prompts = [decoder.prompter.ids([said("human", text)]) for text in list(BASE_ANSWERS)[:2]]
    streams = [decoder.stream(ids, GREEDY, generator(model, 0)) for ids in prompts]
    dropped = decoder.stream(prompts[0], GREEDY, generator(model, 0))
    next(dropped)
    texts = ["".join(pieces) for pieces in zip(*zip_longest(*streams, fillvalue=""), strict=True)]
    dropped.close()
    assert texts == list(ADAPTER_ANSWERS.values())[:2]
