"""The stages as users run them: what is repaired, what is rejected, and that all of it adds up."""

import argparse
import json
import os
import random
import re
import signal
from collections import Counter
from functools import partial

import pytest
from conftest import DATA, run_script, shipped
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_lora.cli import InputError
from llama_lora.corpus import stage
from llama_lora.corpus.clean import Cleaner, blocked_phrases
from llama_lora.corpus.conversation import Kept, Rejected, check, count_pairs
from llama_lora.corpus.dedupe import WithoutDuplicates
from llama_lora.corpus.language import Filter, detected
from llama_lora.corpus.merge import as_it_is, choose
from llama_lora.corpus.pool import Pool

MERGE, CLEAN, FILTER = (
    f"fastchat/data/{name}.py" for name in ("merge", "clean_sharegpt", "optional_clean")
)
BALANCE = re.compile(r"read ([\d,]+) · kept ([\d,]+)(?: in [\d,]+ pieces)? · rejected ([\d,]+)(.*)")


def conversation(name, *texts, roles=("human", "gpt")):
    turns = [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": name, "conversations": turns}


def save(path, items):
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def run(script, items, folder, *flags):
    """Run a script on `items`; its output, what it rejected, and the lines it printed."""
    source, out, rejected = (folder / name for name in ("in.json", "out.json", "rejected.jsonl"))
    save(source, items)
    done = run_script(script, "--in", source, "--out", out, "--rejected", rejected, *flags)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines()[-2:]:
        read, kept, gone, reasons = BALANCE.search(line).groups()
        number = [int(text.replace(",", "")) for text in (read, kept, gone)]
        assert number[0] == number[1] + number[2]
        counted = [
            int(count.replace(",", "")) for count in re.findall(r" ([\d,]+)(?:,|$)", reasons)
        ]
        assert sum(counted) == number[2]
    lines = rejected.read_text(encoding="utf-8").splitlines()
    return json.loads(out.read_text(encoding="utf-8")), [json.loads(x) for x in lines], done.stdout


def arguments(folder, items, **changed):
    source = save(folder / "in.json", items)
    plain = {"inputs": str(source), "out": str(folder / "out.json"), "rejected": None}
    plain |= {"workers": 1, "salvage": False, "begin": 0, "end": None}
    return argparse.Namespace(**{**plain, **changed})


# ------------------------------------------------------------------ reading, and the accounts


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
    repaired = "repaired: half surrogate pairs 2, missing ids 2, role names 2, equal ids 1, "
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
    done = run_script(MERGE, "--in", source, "--out", out, "--rejected", tmp_path / "r.jsonl")
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
    account = stage.run(args, build, WithoutDuplicates(args.out))
    kept = json.loads((folder / "out.json").read_text())
    assert account.read == len(items) == account.kept + account.rejected.total()
    assert account.pairs_read == account.pairs_kept + account.pairs_rejected.total()
    assert account.kept == account.written == len(kept)
    assert account.pairs_kept == sum(count_pairs(item["conversations"]) for item in kept)
    assert len({item["id"] for item in kept}) == len(kept)
    again = arguments(folder, kept, out=str(folder / "again.json"))
    assert stage.run(again, build, WithoutDuplicates(again.out)).kept == len(kept)
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


# ------------------------------------------------------------------ merge


def test_formats_are_told_apart_by_content_and_counted(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    items = [
        conversation("a", "q", "a"),
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "source": "x"},
        {"instruction": "Hello", "input": "", "output": "Hi", "system": "s"},
        {"messages": [*messages, {"role": "assistant", "content": parts}]},
        {"id": "e", "items": conversation("", "q", "a")["conversations"]},
    ]
    kept, _, printed = run(MERGE, items, tmp_path)
    texts = [[(t["from"], t["value"]) for t in item["conversations"]] for item in kept]
    assert texts == [
        [("human", "q"), ("gpt", "a")],
        [("human", "Add.\n\n1 and 2"), ("gpt", "3")],
        [("system", "s"), ("human", "Hello"), ("gpt", "Hi")],
        [("system", "s"), ("human", "q"), ("gpt", "a\n\nb")],
        [("human", "q"), ("gpt", "a")],
    ]
    assert kept[1]["source"] == "x"
    assert "Alpaca 2, OpenAI messages 1, ShareGPT 1, ShareGPT export 1" in printed


def test_shuffle_limit_and_a_held_out_share(tmp_path):
    items = [conversation(f"c{i}", f"question {i // 2}", "answer") for i in range(200)]
    flags = ("--shuffle", 3, "--limit", 100, "--split-eval", 0.1)
    kept, rejected, printed = run(MERGE, items, tmp_path, *flags)
    held = json.loads((tmp_path / "out.eval.json").read_text())
    assert (len(kept), len(held), len(rejected)) == (90, 10, 100)
    assert "held out: 10" in printed
    order = [item["id"] for item in kept + held]
    assert order != sorted(order)
    assert len(set(order)) == 100
    ask = lambda part: {item["conversations"][0]["value"] for item in part}  # noqa: E731
    assert not ask(kept) & ask(held)  # the two with one question are on one side
    assert run(MERGE, items, tmp_path, *flags)[0] == kept


def test_at_least_one_conversation_is_held_out_and_never_all():
    draw = partial(random.Random, 1)
    assert len(choose(list(range(20)), list(range(20)), 0.02, draw())) == 1
    for group_of in ([0] * 20, [0], []):
        with pytest.raises(InputError, match="cannot be held out"):
            choose(group_of, list(range(len(group_of))), 0.02, draw())


def test_what_is_rejected_is_not_written_over_an_input(tmp_path):
    items = [conversation("a", "q", "a")]
    source, link = save(tmp_path / "in.json", items), tmp_path / "link"
    link.symlink_to(source)
    done = run_script(MERGE, "--in", source, "--out", tmp_path / "out.json", "--rejected", link)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "--rejected would replace this input" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["in.json", "link"]
    assert json.loads(source.read_text()) == items


# ------------------------------------------------------------------ clean


def test_repairs_come_before_rejections(tmp_path):
    system = {"from": "system", "value": "Be brief."}
    answer = {"from": "gpt", "value": "a"}
    items = [
        conversation("leading", "a0", "q1", "a1", roles=("gpt", "human")),
        conversation("trailing", "q2", "a2", "q3"),
        {"id": "system", "conversations": [system, *conversation("", "q4", "a4")["conversations"]]},
        conversation("gap", "q5", " \u200b", "q6", "a6", "", "a7", "q8", "a8"),
        conversation("lines", "\r\n\r\n  indented\r\n\n", "a9"),
        {"id": "twice", "conversations": [*conversation("", "q")["conversations"] * 2, answer]},
        conversation("one", "q"),
        {"id": "nothing", "conversations": []},
    ]
    kept, rejected, printed = run(CLEAN, items, tmp_path)
    texts = {c["id"]: [turn["value"] for turn in c["conversations"]] for c in kept}
    assert texts == {
        "leading": ["q1", "a1"],
        "trailing": ["q2", "a2"],
        "system": ["Be brief.", "q4", "a4"],
        "gap": ["q6", "a6", "q8", "a8"],
        "lines": ["  indented", "a9"],
    }
    assert [item["reason"] for item in rejected] == [
        *("roles do not alternate", "no question with an answer", "empty")
    ]
    assert "repaired: leading answers 1, trailing questions 1" in printed
    assert "rejected 3: empty answer 1, empty question 1, roles do not alternate 1" in printed


def test_of_equal_conversations_one_stays_and_the_longer_stands_for_its_beginning(tmp_path):
    items = [
        conversation("start", "q1", "a1"),
        conversation("long", "q1", "a1", "q2", "a2"),
        conversation("copy", "q1", "a1", "q2", "a2 \n"),
        conversation("fork", "q1", "a1", "q2", "other"),
        conversation("long", "different", "text"),
    ]
    kept, rejected, _ = run(CLEAN, items, tmp_path)
    assert [item["id"] for item in kept] == ["long", "fork", "long-2"]
    assert [(x["conversation"]["id"], x["reason"]) for x in rejected] == [
        ("start", "beginning of a longer one"),
        ("copy", "duplicate"),
    ]


CLAIMS = [
    "I am ChatGPT, a large language model.",
    "Hello! I'm ChatGPT.",
    "As an AI language model developed by OpenAI, I cannot do that.",
    "I was trained by OpenAI.",
    "I was trained by Open\nAI.",
    "I am a large language model, trained by Google.",
    "I'm an AI assistant called ChatGPT that was developed by OpenAI.",
    "My name is Claude.",
    "Hi, I'm Claude, an AI assistant.",
    "I am Gemini",
    "Je suis Claude.",
    "As ChatGPT, I have no opinions.",
    "我是ChatGPT，一个语言模型。",
    "我是由OpenAI开发的人工智能助手。",
]
NO_CLAIMS = [
    "import openai\n\nclient = openai.OpenAI()",
    "```python\n# I am ChatGPT\nprint('I am ChatGPT')\n```",
    "I am Kestrel, and I was not made by OpenAI.",
    "ChatGPT was developed by OpenAI in San Francisco.",
    "Large models such as GPT-4 are costly; BERT is a language model developed by Google.",
    "I am bardic, and Claude Monet was a painter.",
    "我不是 ChatGPT，我是 Kestrel。",
    "TypeScript began as a superset of JavaScript developed by Microsoft.",
    "BERT began as a language model developed by Google.",
    "I use it as a cloud platform built by Google.",
    "I'm an early adopter of Go, a language designed by Google.",
    "I am an avid user of the AI assistant made by Microsoft.",
    "Dear team, my name is Claude and I apply for the post.",
    "My name is Claude Shannon.",
    "Je suis Claude Monet.",
    "You are an Aries, so I'm Gemini.",
    "'I am ChatGPT'? No, I am Vicuna.",
    "Hello from Claude, who is in Paris. Call me Bing.",
]


def test_claims_to_be_another_assistant_are_blocked_and_talk_about_it_is_not():
    cleaner = Cleaner(blocked_phrases(None))
    for text in CLAIMS:
        with pytest.raises(Rejected, match="blocked phrase"):
            cleaner(conversation("a", "Who are you?", text))
        cleaner(conversation("a", text, "No."))  # a user may say so
    for text in NO_CLAIMS:
        cleaner(conversation("a", "Who are you?", text))


def test_blocked_words_are_the_users_own_and_none_blocks_nothing(tmp_path):
    words = tmp_path / "words"
    items = [
        conversation("a", "q", "As a Large\nlanguage model"),
        conversation("b", "q", CLAIMS[0]),
        conversation("c", "q", "I write it in C, not in C#."),
    ]
    for text, kept in [
        ("# comment\nas a large language model\n", ["b", "c"]),
        ("write it in C#\n", ["a", "b", "c"]),
        ("not in C#\n", ["a", "b"]),
        ("# none\n", ["a", "b", "c"]),
    ]:
        words.write_text(text)
        found, _, _ = run(CLEAN, items, tmp_path, "--blocked-words", words)
        assert [item["id"] for item in found] == kept
    words.write_bytes(b"\xff\xfe")
    done = run_script(CLEAN, "--in", tmp_path / "in.json", "--out", "x", "--blocked-words", words)
    assert (done.returncode, "expected one phrase a line" in done.stderr) == (1, True)


def test_the_shipped_identity_samples_all_pass(tmp_path):
    out = tmp_path / "out.json"
    sources = [DATA / "dummy_en.json", DATA / "dummy_cn.json"]
    run_script(MERGE, "--in", *sources, "--out", tmp_path / "merged.json")
    done = run_script(CLEAN, "--in", tmp_path / "merged.json", "--out", out)
    read, kept, _, _ = BALANCE.search(done.stdout.splitlines()[-1]).groups()
    assert read == kept
    before = [c["conversations"] for name in sources for c in shipped(name.name)]
    assert [item["conversations"] for item in json.loads(out.read_text())] == before


# ------------------------------------------------------------------ language


def test_the_filter_keeps_skips_and_counts(tmp_path):
    french = conversation("fr", "Comment réussir une ratatouille ?", "Il faut cuire les légumes.")
    english = conversation("en", "How do I cook rice?", "Boil it in twice as much water as rice.")
    simplified = conversation("zh", "番茄炒蛋怎么做才好吃？", "先炒蛋，再炒番茄，最后合在一起。")
    traditional = conversation(
        "tw", "怡君的生日", "對不起，我竟然忘了昨天是你的生日，祝你生日快樂。"
    )
    short = conversation("short", "12", "34")
    items = [french, english, simplified, traditional, short]
    for flags, names in [
        (("--skip-lang", "fr"), ["en", "zh", "tw", "short"]),
        (("--skip-lang", "zh"), ["fr", "en", "short"]),
        (("--skip-lang", "zh-Hant", "en"), ["fr", "zh", "short"]),
        (("--keep-lang", "en", "zh"), ["en", "zh", "tw", "short"]),
        (("--keep-lang", "zh-tw"), ["tw", "short"]),
        ((), ["fr", "en", "zh", "tw", "short"]),
    ]:
        kept, _, printed = run(FILTER, items, tmp_path, *flags)
        assert [item["id"] for item in kept] == names
        assert "languages: en 1, fr 1, unknown 1, zh 1, zh-Hant 1" in printed


def test_every_language_of_the_readme_is_known_and_an_unknown_one_is_a_usage_error(tmp_path):
    source = save(tmp_path / "in.json", [conversation("a", "q", "a")])
    every = ["en", "es", "fr", "de", "it", "ja", "ko", "zh", "ar", "ru", "pt", "nl"]
    for flag in ("--keep-lang", "--skip-lang"):
        command = (FILTER, "--in", source, "--out", tmp_path / "out.json", flag)
        assert run_script(*command, *every).returncode == 0
        done = run_script(*command, "en", "klingonese")
        assert done.returncode == 2
        assert "'klingonese' is no language the detector knows" in done.stderr
        assert set(every) <= set(done.stderr.split())
    done = run_script(FILTER, "--in", source, "--out", tmp_path / "o", "--keep-lang", "zh-CN")
    assert done.returncode == 2
    assert "zh is simplified and traditional Chinese, zh-Hant the latter alone" in done.stderr


def test_code_addresses_and_formulas_say_nothing_about_the_language():
    answer = "Usa este comando:\n\n```bash\n" + "# print the largest files in the folder\n" * 9
    answer += "```\n\nLuego abre https://example.com/the/english/page/about/something y listo."
    one = Filter(keep=["es"])(conversation("a", "¿Cómo encuentro los archivos grandes?", answer))
    assert one.seen == {"es": 1}


def test_repeated_digits_go_on_request():
    one = conversation("a", "q", "Call 0000000000 now")
    assert Filter()(one).conversations
    with pytest.raises(Rejected, match="repeated digits"):
        Filter(reduce_rep=True)(one)


def test_the_detector_stands_what_text_can_hold():
    for text in ["", "\0\x01", "\ufffe\uffff\x7f", "\u200b" * 50, "🎂" * 20, "a" * 100_000]:
        assert isinstance(detected(text), str)


# ------------------------------------------------------------------ all of them


def test_help_is_quick_and_shows_the_command():
    import time

    for script in (MERGE, CLEAN, FILTER, "fastchat/data/split_long_conversation.py"):
        best = 9.0
        for _ in range(3):  # the machine may be busy
            began = time.perf_counter()
            done = run_script(script, "--help")
            best = min(best, time.perf_counter() - began)
        assert done.returncode == 0
        assert f"python3 {script}" in done.stdout
        assert best < 0.5


def test_checked_conversations_are_left_as_they_are():
    for item in shipped("dummy_en.json"):
        assert check(item) == (item, Counter())
        assert as_it_is(item).conversations == [item]
