"""Duplicates, near duplicates, and held-out shares."""

import json
import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_lora.corpus.duplicates.deduplicate import fingerprinter, groups, near_duplicates
from llama_lora.corpus.duplicates.near_duplicates import PERMUTATIONS, MinHasher, SimilarityIndex
from llama_lora.corpus.engine.fingerprints import Fingerprints
from llama_lora.corpus.records.ids import UInt64Set
from tests.conftest import run_here, run_script

MERGE, CLEAN = "fastchat/data/merge.py", "fastchat/data/clean_sharegpt.py"


def conversation(name, *texts, system=None):
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    head = [{"from": "system", "value": system}] if system else []
    return {"id": name, "conversations": head + turns}


def run(script, items, folder, *flags, start=run_here):
    """Run a script on `items`; the ids it kept, what it rejected, and the bytes it wrote."""
    source, out, rejected = (folder / name for name in ("in.json", "out.json", "rejected.jsonl"))
    source.write_text(json.dumps(items))
    files = ("--in", source, "--out", out, "--rejected", rejected)
    done = start(script, *files, "--workers", 1, *flags)
    assert done.returncode == 0, done.stderr
    gone = [json.loads(line) for line in rejected.read_text().splitlines()]
    return [item["id"] for item in json.loads(out.read_bytes())], gone, done.stdout


def words(rng, count):
    return [rng.choice("abcdefgh") + str(rng.randrange(1000)) for _ in range(count)]


def changed(rng, text, times):
    """`text`, a list of words, with so many of them replaced."""
    text = list(text)
    for place in rng.sample(range(len(text)), times):
        text[place] = "new" + str(rng.randrange(10**6))
    return text


def shingled(text):
    return {tuple(text[i : i + 5]) for i in range(max(1, len(text) - 4))}


def jaccard(one, other):
    return len(one & other) / len(one | other)


def signed(text):
    turns = conversation("", "q", text)["conversations"] if isinstance(text, str) else text
    return np.frombuffer(MinHasher()(turns), np.uint32)


def similarity(one, other):
    return (signed(one) == signed(other)).mean()


# ------------------------------------------------------------------ signatures


def test_a_signature_is_the_same_on_every_machine():
    signature = signed("To be, or not to be, that is the question. 生存还是毁灭，这是一个问题。")
    assert signature.shape == (PERMUTATIONS,)
    assert signature[:4].tolist() == [32131215, 25201544, 401996917, 850331747]


def test_signatures_estimate_the_jaccard_similarity_of_five_words_in_a_row():
    rng = random.Random(5)
    errors = []
    for _ in range(60):
        one = words(rng, rng.randrange(60, 3000))
        other = changed(rng, one, rng.randrange(len(one) // 8))
        true = jaccard(shingled(["q", *one]), shingled(["q", *other]))
        errors.append(similarity(" ".join(one), " ".join(other)) - true)
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.045
    assert max(map(abs, errors)) < 0.16


@pytest.mark.parametrize(
    "text",
    [
        "春天来了，花园里的花都开了，孩子们在草地上放风筝，老人们坐在长椅上晒太阳，大家都很高兴。",
        "桜の花が咲き始めました。公園では子供たちが遊び、大人たちはお弁当を広げて春を楽しんでいます。",
        "ดอกไม้บานในสวนและเด็กๆกำลังเล่นว่าวบนสนามหญ้าส่วนผู้ใหญ่นั่งคุยกันใต้ต้นไม้ใหญ่อย่างมีความสุข",
    ],
)
def test_without_spaces_a_character_is_a_word(text):
    long = text * 3 + text[::-1]
    assert 0.8 < similarity(long, long[:70] + "x" + long[71:]) < 1
    assert similarity(text, text[::-1]) < 0.2


def test_case_signs_and_spacing_do_not_count_but_text_without_words_is_told_apart():
    assert (
        similarity("Boil the *rice*, then\nwait ten minutes", "boil the rice then wait ten minutes")
        == 1
    )
    assert similarity([{"from": "gpt", "value": "🎂 🎂"}], [{"from": "gpt", "value": "!!!"}]) < 0.5
    assert similarity([{"from": "gpt", "value": "yes"}], [{"from": "gpt", "value": "no"}]) < 0.5


def test_a_system_turn_in_common_makes_nothing_alike():
    system = " ".join(words(random.Random(1), 500))
    one = conversation("a", "How high is Mont Blanc?", "4,806 metres.", system=system)
    other = conversation("b", "Who wrote Emma?", "Jane Austen did.", system=system)
    assert similarity(one["conversations"], other["conversations"]) < 0.2


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 40), max_size=60))
def test_a_set_of_numbers_is_a_set(numbers):
    found, expected = UInt64Set(), set()
    for number in [*numbers, *range(1500)]:  # more than it begins with room for
        assert found.add(number) == ((number or 1) not in expected)
        expected.add(number or 1)


# ------------------------------------------------------------------ cleaning


def families(rng, count):
    """`count` lists of conversations' words that are more or less like each other."""
    made = []
    for _ in range(count):
        one = words(rng, rng.randrange(20, 400))
        made.append(one)
        for _ in range(rng.randrange(4)):
            made.append(changed(rng, rng.choice(made), 1 + rng.randrange(4)))
    rng.shuffle(made)
    return made


def marked(texts):
    """The texts as a spool keeps them in mind."""
    fingerprint_of, fingerprints = fingerprinter(signed=True), Fingerprints()
    for text in texts:
        turns = conversation("", "q", " ".join(text))["conversations"]
        fingerprints.add(fingerprint_of(turns), len(" ".join(text)), 1)
    return fingerprints


@pytest.mark.parametrize("threshold", [0.6, 0.85, 0.95])
def test_of_near_duplicates_the_longest_stays_and_none_of_those_that_stay_is_like_another(
    threshold,
):
    texts = families(random.Random(9), 150)
    fingerprints = marked(texts)
    gone = near_duplicates(fingerprints, threshold, {})
    assert len(gone) > 20
    table = np.frombuffer(fingerprints.signatures, np.uint32).reshape(len(texts), -1)
    for index, one in gone.items():
        assert one.similarity == (table[index] == table[one.instead]).mean() >= threshold
        assert one.instead not in gone
        better = fingerprints.lengths[one.instead], -one.instead
        assert better > (fingerprints.lengths[index], -index)
    stay = [index for index in range(len(texts)) if index not in gone]
    missed = sum((table[i] == table[j]).mean() >= threshold for i, j in combinations(stay, 2))
    assert missed <= 0.02 * len(gone)  # those that no band has in common


def test_near_duplicates_go_on_request_only_and_the_rejected_say_which_stays(tmp_path):
    rng = random.Random(3)
    text = words(rng, 300)
    items = [
        conversation("short", "q", " ".join(changed(rng, text[:290], 1))),
        conversation("long", "q", " ".join(text)),
        conversation("equal", "q", " ".join(text)),
        conversation("far", "q", " ".join(changed(rng, text, 60))),
        conversation("first", "Count to seven.", "one two three four five six seven"),
        conversation("again", "Count to seven.", "one,two,three,four,five,six,seven"),
    ]
    kept, gone, _ = run(CLEAN, items, tmp_path)
    assert kept == ["short", "long", "far", "first", "again"]
    kept, gone, printed = run(CLEAN, items, tmp_path, "--near-duplicates", 0.85)
    assert kept == ["long", "far", "first"]
    told = {one["conversation"]["id"]: (one["reason"], one["detail"]) for one in gone}
    assert told == {
        "short": ("near duplicate", "kept: long"),
        "equal": ("duplicate", "kept: long"),
        "again": ("near duplicate", "kept: first"),
    }
    assert all(0.85 <= one["similarity"] <= 1 for one in gone)
    assert "rejected 3: near duplicate 2, duplicate 1" in printed


def test_what_goes_depends_neither_on_workers_nor_on_the_hash_seed(tmp_path, monkeypatch):
    items = [
        conversation(str(i), "q", " ".join(text))
        for i, text in enumerate(families(random.Random(4), 400))
    ]
    written = set()
    for workers, seed in ((1, "0"), (2, "1")):
        monkeypatch.setenv("PYTHONHASHSEED", seed)
        flags = ("--near-duplicates", 0.8, "--workers", workers)
        run(CLEAN, items, tmp_path, *flags, start=run_script)
        written.add(
            (tmp_path / "out.json").read_bytes() + (tmp_path / "rejected.jsonl").read_bytes()
        )
    assert len(written) == 1


@pytest.mark.parametrize("value", ["0", "1", "-0.5", "85", "many"])
def test_a_similarity_that_is_none_is_a_usage_error(tmp_path, value):
    done = run_here(CLEAN, "--in", "x", "--out", "y", f"--near-duplicates={value}")
    assert done.returncode == 2
    assert "--near-duplicates" in done.stderr.splitlines()[-1]


# ------------------------------------------------------------------ holding a share out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9))
def test_groups_are_closed_under_every_kinship(seed):
    rng = random.Random(seed)
    texts = families(rng, 12)
    texts += [list(rng.choice(texts)) for _ in range(3)]
    fingerprints = marked(texts)
    group_of = groups(fingerprints, 0.85)
    table = np.frombuffer(fingerprints.signatures, np.uint32).reshape(len(texts), -1)
    for i, j in combinations(range(len(texts)), 2):
        if texts[i] == texts[j] or (table[i] == table[j]).mean() >= 0.9:
            assert group_of[i] == group_of[j]
    assert all(group_of[group] == group <= index for index, group in enumerate(group_of))
    assert len(set(group_of)) >= 12


def test_nothing_held_out_is_also_trained_on_not_even_after_cleaning(tmp_path):
    rng = random.Random(8)
    items = []
    for number in range(120):
        text = [" ".join(words(rng, 40)) for _ in range(6)]
        items += [
            conversation(f"{number} whole", *text),
            conversation(f"{number} start", *text[:2]),
            conversation(f"{number} start again", *text[:4]),
            conversation(f"{number} other end", *text[:4], "But why?", "Why not."),
            conversation(f"{number} trailing", *text[:3]),
        ]
        leading = conversation(f"{number} leading", *text)
        leading["conversations"].insert(0, {"from": "gpt", "value": " ".join(words(rng, 200))})
        items.append(leading)
        near = changed(rng, text[5].split(), 1)
        items.append(conversation(f"{number} near", *text[:5], " ".join(near)))
    rng.shuffle(items)
    run(MERGE, items, tmp_path, "--split-eval", 0.2)
    sides = {}
    for name in ("out.json", "out.eval.json"):
        sides[name] = {item["id"].split()[0] for item in json.loads((tmp_path / name).read_text())}
    assert not sides["out.json"] & sides["out.eval.json"]
    assert len(sides["out.eval.json"]) == 24
    assert len(sides["out.json"] | sides["out.eval.json"]) == 120


def test_alike_counts_only_what_it_is_asked_among():
    fingerprints = marked([["a", "b", "c", "d", "e", "f"]] * 4)
    found, much = SimilarityIndex(fingerprints.signatures, 0.85).to(
        1, among=np.array([True, True, False, True])
    )
    assert (found.tolist(), much.tolist()) == ([0, 1, 3], [1, 1, 1])
