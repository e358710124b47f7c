"""What every stage does alike: what cannot be read, the accounts, worker processes, the help."""

import json
import os
import signal
from collections import Counter
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_lora.cli import InputError
from llama_lora.corpus.clean.cleaner import Cleaner, blocked_phrases
from llama_lora.corpus.duplicates.deduplicate import Deduplicator
from llama_lora.corpus.duplicates.merge import as_it_is
from llama_lora.corpus.engine import stage
from llama_lora.corpus.engine.worker_pool import Pool
from llama_lora.corpus.records.conversation import Kept, check, count_pairs
from tests.conftest import run_here, shipped
from tests.corpora import conversation
from tests.corpus.stages import CLEAN, FILTER, MERGE, arguments, run


def test_what_can_be_repaired_is_repaired_and_what_cannot_is_one_rejected_conversation(tmp_path):
    items = [
        {**conversation(7, "q", "a"), "model": "m"},
        conversation(None, "q", "a"),
        {"conversations": conversation("", "q", "a")["conversations"]},
        conversation("roles", "q", "a", roles=("User", "ChatGPT")),
        conversation("null", "q", None),
        conversation("number", "q", 42),
        conversation("half \ud800", "q \udc00", "\ud83d\ude00"),
        conversation("unknown", "q", "a", roles=("human", "narrator")),
        conversation("list", "q", ["a"]),
        {"id": "none"},
        {"id": "null", "conversations": None},
        {"id": "turn", "conversations": ["q"]},
        "text",
        None,
    ]
    kept, rejected, printed = run(MERGE, items, tmp_path)
    made = kept[1]["id"]
    assert [item["id"] for item in kept] == [
        *("7", made, made + "-2", "roles", "null", "number", "half \ufffd")
    ]
    assert kept[0]["model"] == "m"
    assert [turn["from"] for turn in kept[3]["conversations"]] == ["human", "gpt"]
    values = [[turn["value"] for turn in item["conversations"]] for item in kept[4:]]
    assert values == [["q", ""], ["q", "42"], ["q \ufffd", "\U0001f600"]]
    assert Counter(item["reason"] for item in rejected) == {
        "unknown role": 1,
        "a value is not text": 1,
        "unknown format": 1,
        "no list of turns": 1,
        "a turn is not an object": 1,
        "not an object": 2,
    }
    assert [item["index"] for item in rejected] == [7, 8, 9, 10, 11, 12, 13]
    assert rejected[0]["conversation"] == items[7]
    repaired = "repaired: lone surrogates 2, missing ids 2, role names 2, equal ids 1, "
    repaired += "integer ids 1, lenient JSON 1, null values 1, numbers as values 1"
    assert printed.splitlines()[-3] == repaired


def test_a_bad_line_and_a_deep_one_are_rejected_alone(tmp_path):
    deep = '{"id": "deep", "conversations": ' + "[" * 5000 + "]" * 5000 + "}"
    good = json.dumps(conversation("a", "q", "a"))
    nan = good.replace('"id": "a"', '"id": "nan", "score": NaN')
    latin = b'{"id": "latin", "conversations": [], "x": "\xe9"}'
    lines = [good.encode(), b'{"id": "b", ', deep.encode(), nan.encode(), latin, b"[1]"]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(lines) + b"\n")
    done = run_here(MERGE, "--in", source, "--out", out, "--rejected", tmp_path / "r.jsonl")
    assert done.returncode == 0, done.stderr
    assert "rejected 4: not JSON 3, not an object 1" in done.stdout
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(item["id"], item.get("score", 1)) for item in kept] == [("a", 1), ("nan", None)]
    rejected = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [item["detail"] for item in rejected[1:3]] == ["nested too deeply", "not UTF-8"]


turns = st.lists(
    st.fixed_dictionaries(
        {
            "from": st.sampled_from(["human", "gpt", "gpt", "human", "system", "user", "x"]),
            "value": st.sampled_from(
                ["", " ", "q", "What?", "I am ChatGPT", "```\ncode\n```", None]
            ),
        }
    ),
    max_size=7,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(turns, max_size=6))
def test_read_is_kept_and_rejected_in_conversations_and_in_pairs(tmp_path_factory, batch):
    folder = tmp_path_factory.mktemp("accounts")
    items = [{"id": "same", "conversations": one} for one in batch]
    args = arguments(folder, items)
    build = partial(Cleaner, blocked_phrases(None))
    account = stage.run(args, build, Deduplicator(args.out))
    kept = json.loads((folder / "out.json").read_text())
    assert account.read == len(items) == account.kept + account.rejected.total()
    assert account.pairs_read == account.pairs_kept + account.pairs_rejected.total()
    assert account.kept == account.written == len(kept)
    assert account.pairs_kept == sum(count_pairs(item["conversations"]) for item in kept)
    assert len({item["id"] for item in kept}) == len(kept)
    again = arguments(folder, kept, out=str(folder / "again.json"))
    assert stage.run(again, build, Deduplicator(again.out)).kept == len(kept)
    assert (folder / "again.json").read_text() == (folder / "out.json").read_text()


def test_workers_change_nothing_but_the_time(tmp_path):
    items = [conversation(f"c{i}", f"q{i}" * 100, "a" * (i % 7)) for i in range(4000)]
    outputs = []
    for workers in (1, 3):
        args = arguments(tmp_path, items, workers=workers)
        account = stage.run(args, partial(Cleaner, None))
        outputs.append(((tmp_path / "out.json").read_bytes(), str(account)))
    assert outputs[0] == outputs[1]


def kill_itself(conversation):
    if conversation["id"] == "c777":
        os.kill(os.getpid(), signal.SIGKILL)
    return Kept([conversation])


def build_killer():
    return kill_itself


def test_the_conversation_that_kills_a_worker_is_named(tmp_path):
    items = [conversation(f"c{i}", "q" * 2000, "a") for i in range(1000)]  # worth processes
    args = arguments(tmp_path, items, workers=2)
    with pytest.raises(
        InputError, match=r"conversation 777 \(byte \d+\): .* died \(signal SIGKILL\)"
    ):
        stage.run(args, build_killer)
    assert os.listdir(tmp_path) == ["in.json"]


def build_length():
    return lambda chunk, at: [at(number) or len(item) for number, item in enumerate(chunk)]


def test_a_worker_killed_while_it_waits_blames_no_conversation():
    with Pool(build_length, 1) as pool:

        def chunks():
            yield ["a", "bc"]
            os.kill(pool.workers[0].process.pid, signal.SIGKILL)
            pool.workers[0].process.join()
            yield ["d"]

        with pytest.raises(InputError, match=r"died between conversations \(signal SIGKILL\)"):
            list(pool.map(chunks()))


def build_nothing():
    raise ZeroDivisionError("this is the fault")


def test_what_fails_before_the_first_conversation_is_told():
    with (
        Pool(build_nothing, 1) as pool,
        pytest.raises(RuntimeError, match="ZeroDivisionError: this is the fault"),
    ):
        list(pool.map(iter([["a"]])))


def test_the_account_beside_the_output_says_what_was_printed(tmp_path):
    run(CLEAN, [conversation("a", "q", "a"), conversation("b", "q", "")], tmp_path)
    account = json.loads((tmp_path / "out.json.account").read_text())
    assert account["stage"] == "clean_sharegpt.py"
    assert (account["read"], account["kept"], account["rejected"]) == (2, 1, {"empty": 1})


@pytest.mark.parametrize(
    "script", [MERGE, CLEAN, FILTER, "fastchat/data/split_long_conversation.py"]
)
def test_help_shows_the_command(script):
    assert f"python3 {script}" in run_here(script, "--help").stdout


def test_checked_conversations_are_left_as_they_are():
    for item in shipped("dummy_en.json"):
        assert check(item) == (item, Counter())
        assert as_it_is(item).conversations == [item]
