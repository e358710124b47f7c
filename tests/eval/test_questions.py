"""The questions that are asked, and what is counted in the answers."""

import pytest

from llama_lora.corpus.language.filter import language_of
from llama_lora.eval import questions
from llama_lora.eval.answer_stats import is_looping, repetition
from tests.conftest import DATA
from tests.corpora import save_lines


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([1, 2, 3], None),
        ([1, 2, 3, 4], 0),
        (list(range(50)), 0),
        ([7] * 13, 0.9),  # ten runs, all the same
        ([1, 2, 3, 4, 1, 2, 3, 4], 0.2),  # five runs, the last is the first
    ],
)
def test_repetition(ids, share):
    assert repetition(ids) == (share if share is None else pytest.approx(share))


@pytest.mark.parametrize(
    ("ids", "is_loop"),
    [
        ([5] * 24, True),
        ([5] * 23, False),  # laughter may be that long
        ([*range(100), *[1, 2, 3] * 8], True),
        ([*range(100), *list(range(60)) * 3], True),
        ([*range(100), *list(range(60)) * 2], False),  # said twice
        ([*[1, 2, 3] * 20, 9], False),  # it found its way out
        (list(range(300)), False),
        ([], False),
    ],
)
def test_loops(ids, is_loop):
    assert is_looping(ids) is is_loop


def test_the_shipped_questions():
    """Forty, evenly spread, each in the language that it says and that our detector finds."""
    found = questions.read(DATA / "questions.jsonl", None, 0)
    assert len({question.id for question in found}) == 40
    by_category = {}
    for question in found:
        by_category.setdefault(question.category, []).append(question.language)
        turns = [{"from": "human", "value": turn} for turn in question.turns]
        assert language_of(turns).partition("-")[0] == question.language, question.turns
    assert len(by_category) == 8
    assert all(sorted(found) == ["en", "en", "en", "es", "zh"] for found in by_category.values())


def test_both_forms_of_a_question(tmp_path):
    path = save_lines(
        tmp_path / "q.jsonl",
        [
            {"question_id": 1, "text": "¿Dónde está la biblioteca del pueblo?", "category": "old"},
            {"question_id": "b", "turns": ["First?", "Second?"], "reference": ["kept out"]},
        ],
    )
    first, second = questions.read(path, None, 0)
    assert (first.id, first.category, first.turns, first.language) == (
        *("1", "old", ["¿Dónde está la biblioteca del pueblo?"]),
        "es",
    )
    assert (second.id, second.category, second.turns) == ("b", "general", ["First?", "Second?"])


def test_a_limit_draws_the_same_questions_again():
    drawn = [questions.read(DATA / "questions.jsonl", 6, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    numbers = [int(question.id) for question in drawn[0]]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 6
