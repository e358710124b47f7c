"""Answers to a file of prompts, as a corpus file: kept one by one, so that a run can continue."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, fields, replace
from hashlib import blake2b
from random import SystemRandom
from typing import Any

from tqdm import tqdm

from llama_lora.chat.adapters import named_folders
from llama_lora.chat.batch import answers
from llama_lora.chat.sampling import Sampling
from llama_lora.cli import InputError
from llama_lora.corpus.engine.account import listed
from llama_lora.corpus.engine.stage import spare, stop_on_sigterm
from llama_lora.corpus.records.atomic_files import Outputs
from llama_lora.corpus.records.conversation import GPT, HUMAN, Turn
from llama_lora.corpus.records.json_values import dump
from llama_lora.corpus.records.partial_results import PartialResults
from llama_lora.corpus.records.prompts import PromptRecord, read_prompts
from llama_lora.hardware.device import compute_dtype, dtype_name
from llama_lora.model.modified import last_modified

STOPS = "stop", "length"  # why an answer ended; any other reason means that there is no answer


class AnswerFile:
    """The answers that will be at `path` when all are there, in the order of `asked`.

    Until then they lie in `PATH.partial`, each as soon as it is there, so that a run that ends
    early loses none. The first line says what was asked and how; the next run with the same prompts
    and settings continues after the last answer.
    """

    def __init__(self, path: str, asked: list[PromptRecord], settings: dict[str, Any]):
        """`settings` are what the answers depend on besides the prompts.

        Raises:
            InputError: `path` cannot be written; the answers there are to other prompts or from
                other settings; or another run is writing them.
        """
        self.path, self.asked = path, asked
        self._answers: list[list[tuple[str, str]]] = [[] for _ in asked]
        self._kept = PartialResults(path, {"prompts": fingerprint(asked), **settings}, "answers")
        for number, answer in self._kept.items():
            self._answers[number % len(asked)].append(tuple(answer))

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._kept.__exit__(kind, error, trace)

    @property
    def total(self) -> int:
        return sum(len(one.questions) for one in self.asked)

    @property
    def done(self) -> int:
        return sum(map(len, self._answers))

    def rounds(self) -> Iterator[dict[int, list[Turn]]]:
        """The first question of each, then the second, …: those without an answer yet, by number.

        A number is the same in every run. Each question comes with the turns before it; all have to
        be answered before the next round begins.
        """
        for number in range(max(len(one.questions) for one in self.asked)):
            yield {
                number * len(self.asked) + index: self._turns(index)
                for index, one in enumerate(self.asked)
                if len(self._answers[index]) == number < len(one.questions) and self._goes_on(index)
            }

    def put(self, number: int, text: str, finish_reason: str) -> None:
        """Keep an answer for good."""
        self._kept[number] = text, finish_reason
        self._answers[number % len(self.asked)].append((text, finish_reason))

    def finish(self) -> Counter:
        """Put the file in its place; returns how often answers ended for each reason."""
        with Outputs() as outputs:
            out = outputs.corpus(self.path)
            for index, one in enumerate(self.asked):
                reason = self._answers[index][-1][1]
                answered = {"conversations": self._turns(index), "finish_reason": reason}
                out.write(dump({"id": one.id, **one.about, **answered}))
        self._kept.remove()
        return Counter(reason for answers in self._answers for _, reason in answers)

    def _goes_on(self, index: int) -> bool:
        """Whether every question so far has an answer."""
        return all(reason in STOPS for _, reason in self._answers[index])

    def _turns(self, index: int) -> list[Turn]:
        """The turns up to the first question without an answer, if there is one."""
        one, answers = self.asked[index], self._answers[index]
        turns = list(one.before)
        for number, question in enumerate(one.questions[: len(answers) + 1]):
            turns.append({"from": HUMAN, "value": question})
            if number == len(answers) or answers[number][1] not in STOPS:
                break
            turns.append({"from": GPT, "value": answers[number][0]})
        return turns


def answer_questions(args, load: Callable) -> str:
    """Answer the file of prompts that the command line names; returns a line that accounts for all.

    Args:
        args: `prompts_file`, `output_file`, `batch_size`, `system`, what loading needs, and the
            fields of `Sampling`.
        load: loads the model and its adapters from `args`, once nothing else can fail.
    """
    stop_on_sigterm()
    spare([args.prompts_file], "--output_file", args.output_file)
    asked = read_prompts(args.prompts_file, args.system)
    with AnswerFile(args.output_file, asked, settings_of(args)) as file:
        adapters = load(args)
        ends = answer_all(file, adapters.model, adapters.first, Sampling.of(args), args.batch_size)
    return account_line(file.total, ends)


def account_line(asked: int, ends: Counter) -> str:
    """The account of that many questions, whose answers ended for these reasons."""
    without = Counter({reason: count for reason, count in ends.items() if reason not in STOPS})
    without["after a question without one"] = asked - ends.total()
    cut_off = f" ({ends['length']:,} cut off)" if ends["length"] else ""
    reasons = f": {listed(without)}" if +without else ""
    return (
        f"read {asked:,} · answered {asked - without.total():,}{cut_off} · "
        f"without an answer {without.total():,}{reasons}"
    )


def answer_all(file: AnswerFile, model, template, sampling, batch_size: int | None) -> Counter:
    """Have a model answer what is not answered yet, and finish the file; returns as `finish` does.

    Args:
        model, template, sampling, batch_size: as `llama_lora.chat.batch.answers` takes them.
    """
    if sampling.seed is None:
        sampling = replace(sampling, seed=SystemRandom().getrandbits(63))
    bar = tqdm(total=file.total, initial=file.done, unit="answer", disable=None, leave=False)
    with bar:
        for waiting in file.rounds():
            numbers = list(waiting)
            for index, text, reason, _ in answers(
                model, template, list(waiting.values()), sampling, batch_size, numbers
            ):
                file.put(numbers[index], text, reason)
                bar.update()
    return file.finish()


def settings_of(args) -> dict[str, Any]:
    """What the answers depend on besides the prompts, in JSON's types."""
    names = ("template", "quantization", *(field.name for field in fields(Sampling)))
    weights = last_modified(args.base_model, *named_folders(args.lora_weights).values())
    settings = {name: getattr(args, name) for name in names}
    return settings | {"compute_dtype": dtype_name(compute_dtype()), "weights": weights}


def save_conversation(conversation: dict, path: str, mine: set[str]) -> None:
    """Write a corpus file of one conversation; `mine` are the paths that may be overwritten.

    Raises:
        InputError: there is another file at `path`, or it cannot be written.
    """
    if os.path.exists(path) and os.path.realpath(path) not in mine:
        raise InputError(f"{path}: already exists; choose another name")
    with Outputs() as outputs:
        outputs.corpus(path).write(dump(conversation))
    mine.add(os.path.realpath(path))


def fingerprint(asked: list[PromptRecord]) -> str:
    """A hash of what is asked."""
    digest = blake2b(digest_size=16)
    for one in asked:
        digest.update(dump(astuple(one)) + b"\n")
    return digest.hexdigest()
