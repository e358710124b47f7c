"""Answers to questions with an adapter and without, and what can be counted in them."""

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass

from tqdm import tqdm

from llama_lora.chat.adapters import Adapters
from llama_lora.chat.batch import answers
from llama_lora.chat.sampling import Sampling
from llama_lora.corpus.language import UNKNOWN
from llama_lora.corpus.language.filter import language_of
from llama_lora.eval.answer_stats import is_looping, repetition
from llama_lora.eval.questions import Question, same_language


@dataclass(frozen=True)
class MeasuredAnswer:
    """An answer; `stopped` is whether it ended by itself and not at a limit.

    `in_language` is whether it is in the language of the question, or None if that cannot be told;
    `repetition` is None for fewer than four tokens.
    """

    text: str
    tokens: int
    stopped: bool
    repetition: float | None
    loops: bool
    language: str
    in_language: bool | None


@dataclass(frozen=True)
class Exchange:
    """A question and, for each of its turns, the answer of each side."""

    question: Question
    answers: list[dict[str, MeasuredAnswer]]

    def as_json(self) -> dict:
        turns = zip(self.question.turns, self.answers, strict=True)
        return {
            "question_id": self.question.id,
            "category": self.question.category,
            "language": self.question.language,
            "turns": [
                {"question": turn, **{side: vars(answer) for side, answer in found.items()}}
                for turn, found in turns
            ],
        }


@dataclass(frozen=True)
class Rates:
    """Means over all answers of a side, and shares of the answers for which it can be told."""

    answers: int
    stopped: float
    loops: float
    tokens: float
    repetition: float | None
    in_language: float | None


def ask(
    adapters: Adapters,
    sides: list[str],
    questions: list[Question],
    max_new_tokens: int,
    batch_size: int | None,
    kept: MutableMapping,
) -> list[Exchange]:
    """The likeliest answers, turn after turn; each side sees its own earlier answers.

    Args:
        sides: names of `adapters`; each is asked in its own template.
        batch_size: questions at a time; None: as many as fit in memory.
        kept: answers by name; those it holds are not asked again.
    """
    settings = Sampling(temperature=0, max_new_tokens=max_new_tokens)
    asked = [Exchange(question, [{} for _ in question.turns]) for question in questions]
    total = len(sides) * sum(len(question.turns) for question in questions)
    with tqdm(desc="answers", total=total, disable=None, leave=False) as bar:
        for side in sides:
            adapters.use(side)
            model, template = adapters.model, adapters.templates[side]
            for one, number, found in in_turn(
                side, model, template, questions, settings, batch_size, kept
            ):
                asked[one].answers[number][side] = found
                bar.update()
    return asked


def in_turn(
    side: str,
    model,
    template,
    questions: list[Question],
    settings: Sampling,
    batch_size: int | None,
    kept: MutableMapping,
) -> Iterator[tuple[int, int, MeasuredAnswer]]:
    """The answers of one side, each with the index of its question and of the turn in it."""
    chats = [list(question.before) for question in questions]
    for number in range(max(len(question.turns) for question in questions)):
        going_on = [i for i, question in enumerate(questions) if number < len(question.turns)]
        for i in going_on:
            chats[i].append({"from": "human", "value": questions[i].turns[number]})
        names = {i: f"answer of {side} to question {i}, turn {number}" for i in going_on}
        known = [i for i in going_on if names[i] in kept]
        waiting = [i for i in going_on if names[i] not in kept]
        for i in known:
            found = MeasuredAnswer(**kept[names[i]])
            chats[i].append({"from": "gpt", "value": found.text})
            yield i, number, found
        batch = [chats[i] for i in waiting]
        for written in answers(model, template, batch, settings, batch_size):
            i = waiting[written.index]
            found = answer(written, questions[i].language)
            kept[names[i]] = vars(found)
            chats[i].append({"from": "gpt", "value": found.text})
            yield i, number, found


def answer(written, wanted: str) -> MeasuredAnswer:
    """An answer of `chat.batch` with its counts; it should be in the language `wanted`."""
    language = language_of([{"from": "gpt", "value": written.text}]) if written.text else UNKNOWN
    return MeasuredAnswer(
        text=written.text,
        tokens=len(written.tokens),
        stopped=written.finish_reason == "stop",
        repetition=repetition(written.tokens),
        loops=is_looping(written.tokens),
        language=language,
        in_language=same_language(wanted, language),
    )


def rates(asked: list[Exchange], side: str) -> Rates:
    """The rates of a side's answers."""
    found = [turn[side] for one in asked for turn in one.answers]
    return Rates(
        answers=len(found),
        stopped=mean([one.stopped for one in found]),
        loops=mean([one.loops for one in found]),
        tokens=mean([one.tokens for one in found]),
        repetition=mean([one.repetition for one in found]),
        in_language=mean([one.in_language for one in found]),
    )


def mean(values: list) -> float | None:
    """The mean of the values that are not None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
