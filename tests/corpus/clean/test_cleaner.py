"""Cleaning: what is repaired and what is rejected, and claims to be another assistant."""

import json
from collections import Counter

import pytest

from llama_lora.corpus.clean.cleaner import Cleaner, blocked_phrases
from llama_lora.corpus.records.conversation import Rejected, count_pairs
from tests.conftest import DATA, run_here, shipped
from tests.corpora import conversation, said
from tests.corpus.stages import BALANCE, CLEAN, MERGE, run


def test_repairs_come_before_rejections(tmp_path):
    system = {"from": "system", "value": "Be brief."}
    answer = {"from": "gpt", "value": "a"}
    items = [
        conversation("leading", "a0", "q1", "a1", roles=("gpt", "human")),
        conversation("trailing", "q2", "a2", "q3"),
        {"id": "system", "conversations": [system, *said("q4", "a4")]},
        conversation("gap", "q5", " \u200b", "q6", "a6", "", "a7", "q8", "a8"),
        conversation("lines", "\r\n\r\n  indented\r\n\n", "a9"),
        {"id": "twice", "conversations": [*said("q") * 2, answer]},
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
    done = run_here(CLEAN, "--in", tmp_path / "in.json", "--out", "x", "--blocked-words", words)
    assert (done.returncode, "expected one phrase a line" in done.stderr) == (1, True)


def test_the_shipped_identity_samples_all_pass(tmp_path):
    out = tmp_path / "out.json"
    sources = [DATA / "dummy_en.json", DATA / "dummy_cn.json"]
    run_here(MERGE, "--in", *sources, "--out", tmp_path / "merged.json")
    done = run_here(CLEAN, "--in", tmp_path / "merged.json", "--out", out)
    read, kept, _, _ = BALANCE.search(done.stdout.splitlines()[-1]).groups()
    assert read == kept
    before = [c["conversations"] for name in sources for c in shipped(name.name)]
    assert [item["conversations"] for item in json.loads(out.read_text())] == before


def test_an_empty_turn_beside_one_of_the_same_role_is_dropped_and_counted():
    roles, texts = "hhghggh", ["Go on", "", "a1", "q2", " \u200b", "a2", ""]
    names = {"h": "human", "g": "gpt"}
    turns = [{"from": names[r], "value": t} for r, t in zip(roles, texts, strict=True)]
    turns.insert(3, {"from": "gpt", "value": ""})
    one = Cleaner(None)({"id": "a", "conversations": turns})
    kept = one.conversations[0]["conversations"]
    assert [turn["value"] for turn in kept] == ["Go on", "a1", "q2", "a2"]
    assert +one.repairs == Counter({"empty turns": 3, "trailing questions": 1})
    assert one.pairs + one.dropped.total() == count_pairs(turns)


def test_an_assistant_that_claims_to_be_another_is_caught_in_every_language_of_the_readme():
    cleaner = Cleaner(blocked_phrases(None))
    claims = [
        *("我是由OpenAI開發的語言模型。", "作為ChatGPT，我沒有意見。", "我叫Claude。"),
        *("私はChatGPTです。", "저는 ChatGPT입니다.", "أنا ChatGPT، نموذج لغوي"),
        *("Soy ChatGPT.", "Je suis Claude.", "Ich bin Gemini.", "Sono Bard.", "Eu sou ChatGPT."),
        *("Ik ben Copilot.", "Я ChatGPT."),
    ]
    for text in claims:
        with pytest.raises(Rejected, match="blocked phrase"):
            cleaner(conversation("a", "Who are you?", text))
    for text in (
        "我喜欢用ChatGPT。",
        "ChatGPTは便利です。",
        "ChatGPT는 유용합니다.",
        "Uso ChatGPT.",
    ):
        cleaner(conversation("a", "Which one?", text))


def test_traditional_chinese_becomes_simplified_on_request_but_for_code_and_addresses(tmp_path):
    traditional = "對不起，我竟然忘了昨天是你的生日，祝你生日快樂。請看這段程式碼："
    code = "```python\nprint('對不起，生日快樂')  # 顯示訊息\n```"
    rest = "執行 `印出('對不起')`，再看 https://zh.wikipedia.org/wiki/臺灣 的說明。"
    japanese = (
        "誕生日おめでとうございます。國學院大學で會いましょう。忘れていて本當にごめんなさい。"
    )
    items = [
        conversation("tw", traditional, f"{traditional}\n{code}\n{rest}"),
        conversation("ja", japanese, japanese),
        conversation("en", "What does 對不起 mean?", "It means sorry; 生日快樂 is happy birthday."),
        conversation("zh", "番茄炒蛋怎么做才好吃？", "先炒蛋，再炒番茄，最后合在一起。"),
    ]
    texts = lambda: [  # noqa: E731
        [turn["value"] for turn in item["conversations"]]
        for item in json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    ]
    for item in items:
        assert Cleaner(None)(item).conversations == [item]
    _, _, printed = run(CLEAN, items, tmp_path, "--simplified-chinese")
    simplified = "对不起，我竟然忘了昨天是你的生日，祝你生日快乐。请看这段程式码："
    left = "执行 `印出('對不起')`，再看 https://zh.wikipedia.org/wiki/臺灣 的说明。"
    assert texts()[0] == [simplified, f"{simplified}\n{code}\n{left}"]
    assert texts()[1:] == [[turn["value"] for turn in item["conversations"]] for item in items[1:]]
    assert "repaired: turns in traditional Chinese 2" in printed
