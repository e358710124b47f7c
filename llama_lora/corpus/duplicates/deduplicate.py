"""Duplicates: of equal or similar conversations one stays; a longer one replaces its beginning."""

from collections.abc import Callable
from dataclasses import dataclass

from llama_lora.corpus.engine.fingerprints import Fingerprint, Fingerprints
from llama_lora.corpus.engine.output import Arrangement, Dropped
from llama_lora.corpus.records.conversation import GPT, HUMAN, SYSTEM, Turn, prefix_digests


@dataclass
class Deduplicator:
    """Rejects what equals an earlier conversation, or is the beginning of a longer one.

    With `near`, a similarity between 0 and 1, it also rejects what is at least that similar to a
    longer one, or to an earlier one of the same length.
    """

    out: str
    near: float | None = None

    def fingerprinter(self) -> Callable[[list[Turn]], Fingerprint]:
        return fingerprinter(signed=self.near is not None)

    def __call__(self, fingerprints: Fingerprints) -> Arrangement:
        rejected = exact_duplicates(fingerprints)
        if self.near is not None:
            rejected |= near_duplicates(fingerprints, self.near, rejected)
        kept = [index for index in range(len(fingerprints)) if index not in rejected]
        return Arrangement({self.out: kept}, rejected)


def fingerprinter(signed: bool) -> Callable[[list[Turn]], Fingerprint]:
    """Computes fingerprints that tell equal conversations and, if `signed`, similar ones."""
    if not signed:
        return lambda turns: Fingerprint(digests_of(turns))
    from llama_lora.corpus.duplicates.near_duplicates import MinHasher

    sign = MinHasher()
    return lambda turns: Fingerprint(digests_of(turns), sign(paired(turns)))


def paired(turns: list[Turn]) -> list[Turn]:
    """The system turn, and all from the first question to the last answer: what cleaning leaves."""
    roles = [turn["from"] for turn in turns]
    if HUMAN not in roles or GPT not in roles:
        return turns
    first, last = roles.index(HUMAN), len(roles) - roles[::-1].index(GPT)
    return [turn for turn in turns[:first] if turn["from"] == SYSTEM] + turns[first:last]


def digests_of(turns: list[Turn]) -> bytes:
    """Digests of the conversation up to each answer; the last is that of the whole."""
    turns = paired(turns)
    digests = prefix_digests(turns)
    answers = [d for d, turn in zip(digests, turns, strict=False) if turn["from"] == GPT]
    return b"".join(answers + digests[-1:])


def exact_duplicates(fingerprints: Fingerprints) -> dict[int, Dropped]:
    """Those that equal an earlier one, or are the beginning of a longer one."""
    numbered = fingerprints.numbered()
    longer: dict[int, int] = {}  # the first of equal ones -> the first that continues it
    for owner, beginning in numbered.continued():
        longer.setdefault(beginning, owner)
    gone: dict[int, Dropped] = {}
    for index, first in enumerate(numbered.first().tolist()):
        if first in longer:
            gone[index] = Dropped("beginning of a longer one", longer[first])
        elif first != index:
            gone[index] = Dropped("duplicate", first)
    return gone


def near_duplicates(fingerprints: Fingerprints, threshold: float, gone) -> dict[int, Dropped]:
    """Those of the others that are similar to one that stays and is not shorter.

    No two of those that stay are similar.
    """
    import numpy as np

    from llama_lora.corpus.duplicates.near_duplicates import SimilarityIndex

    alike = SimilarityIndex(fingerprints.signatures, threshold)
    free = np.ones(len(alike), bool)
    free[list(gone)] = False
    found: dict[int, Dropped] = {}
    for index in sorted(np.flatnonzero(free).tolist(), key=lambda i: (-fingerprints.lengths[i], i)):
        if free[index]:
            free[index] = False
            others, similarity = alike.to(index, among=free)
            free[others] = False
            for other, much in zip(others.tolist(), similarity.tolist(), strict=True):
                found[other] = Dropped("near duplicate", index, much)
    return found


def groups(fingerprints: Fingerprints, threshold: float) -> list[int]:
    """For each conversation, the number of its group, which is the index of the first in it.

    Conversations are linked if they are equal, at least `threshold` similar, or one is the
    beginning of the other. All that are linked, directly or through others, are in one group.
    """
    import numpy as np

    from llama_lora.corpus.duplicates.near_duplicates import SimilarityIndex

    parents = list(range(len(fingerprints)))

    def group_of(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    def join(one: int, other: int) -> None:
        one, other = sorted((group_of(one), group_of(other)))
        parents[other] = one

    numbered = fingerprints.numbered()
    for index, first in enumerate(numbered.first().tolist()):
        join(index, first)
    for owner, beginning in numbered.continued():
        join(owner, beginning)
    alike = SimilarityIndex(fingerprints.signatures, threshold)
    unseen = np.ones(len(alike), bool)
    for start in range(len(alike)):
        reached = [start] if unseen[start] else []
        unseen[start] = False
        while reached:
            index = reached.pop()
            others, _ = alike.to(index, among=unseen)
            unseen[others] = False
            reached += others.tolist()
            for other in others.tolist():
                join(index, other)
    return [group_of(index) for index in range(len(fingerprints))]
