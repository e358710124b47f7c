"""The language of texts and of whole conversations, on texts whose language is known."""

import random
from collections import Counter

import pytest

from benchmarks.corpus import language as benchmark
from llama_lora.corpus.language import UNKNOWN
from llama_lora.corpus.language.filter import Filter, detect, excerpts, language_of, size
from llama_lora.corpus.language.prose import prose
from llama_lora.corpus.records.conversation import Rejected
from tests.conftest import run_here, shipped
from tests.corpora import conversation, said, save
from tests.corpus.stages import FILTER, run

ENGLISH = "The kettle is on the stove, and the water will boil in a few minutes. "
GERMAN = "Der Kessel steht auf dem Herd, und das Wasser wird in wenigen Minuten kochen. "
CHINESE = "水壶在炉子上，水再过几分钟就会开。"


# ------------------------------------------------------------------ how often it is right


@pytest.mark.parametrize("part", ["tuning", "held out"])
@pytest.mark.parametrize(("length", "mean", "least"), [(200, 0.99, 0.97), (40, 0.95, 0.93)])
def test_windows_in_chat_are_told_right(part, length, mean, least):
    shares = {}
    for language, texts in benchmark.windows(part, length).items():
        texts = benchmark.in_chat(texts)
        shares[language] = sum(benchmark.told(text) == language for text in texts) / len(texts)
    assert len(shares) == 13
    assert sum(shares.values()) / len(shares) >= mean
    assert {name: share for name, share in shares.items() if share < least} == {}


def test_the_set_has_enough_windows_of_every_language():
    for length, enough in (200, 20), (40, 60):
        counts = Counter()
        for part in ("tuning", "held out"):
            for language, texts in benchmark.windows(part, length).items():
                counts[language] += len(set(texts))
                assert all(length - 12 <= len(text) <= length for text in texts)
        assert min(counts.values()) >= enough


def test_longer_texts_in_neighbours_of_the_usual_languages_stay_theirs():
    for language, texts in benchmark.windows("neighbours", 200).items():
        told = Counter(map(detect, texts))
        assert told[language] >= len(texts) - 1


# ------------------------------------------------------------------ single texts


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("ok", UNKNOWN),
        ("12 + 30 = 42", UNKNOWN),
        ("我是 Kestrel（红隼），由 Llama-LoRA 社区开发的助手。", "zh"),
        ("我是 Kestrel（紅隼），由 Llama-LoRA 社群開發的助手。", "zh-Hant"),
        ("東京都庁舎展望室", "zh-Hant"),  # could be either without kana
        ("東京都庁舎の展望室", "ja"),
        ("народов государств-членов Организации", "ru"),
        ("народів держав-членів Організації", "uk"),
        ("Considerando que la libertad, la", "es"),
        ("Overwegende, dat erkenning van de", "nl"),
    ],
)
def test_short_texts(text, language):
    assert detect(text) == language


def test_what_is_no_character_does_not_hide_the_language():
    planes = range(0, 0x110000, 0x10000)
    for code in [0, 1, 0x7F, 0x9F, 0xFDD0, *(plane + 0xFFFF for plane in planes)]:
        assert detect(GERMAN + chr(code)) == "de"


# ------------------------------------------------------------------ conversations


def test_turns_vote_with_the_size_of_their_prose():
    code = "```python\n" + "print('the number of the files in the folder')\n" * 20 + "```"
    assert language_of(said(ENGLISH, GERMAN * 2)) == "de"
    assert language_of(said(ENGLISH * 3, GERMAN * 2)) == "en"
    assert language_of(said(ENGLISH, GERMAN, ENGLISH, GERMAN, ENGLISH)) == "en"
    assert language_of(said(ENGLISH, CHINESE * 2)) == "zh"
    assert language_of(said(GERMAN, code)) == "de"
    assert language_of(said("1 2 3", GERMAN, "4 5 6")) == "de"


def test_turns_too_short_to_tell_are_read_as_one():
    assert language_of(said("ok", "12")) == UNKNOWN
    assert language_of([]) == UNKNOWN


def test_a_task_in_one_language_about_a_long_text_in_another_is_in_the_latter():
    long = "Translate this into English. " + ENGLISH + GERMAN * 40 + "Thank you very much for this."
    assert language_of(said(long)) == "de"


def test_stopping_early_changes_no_vote():
    texts = [one for of in benchmark.windows("tuning", 200).values() for one in of[:4]]
    draw = random.Random(5)
    for _ in range(200):
        turns = said(*(" ".join(draw.choices(texts, k=draw.randint(1, 3))) for _ in range(6)))
        votes = Counter()
        for turn in turns:
            text = prose(turn["value"])
            votes[detect(excerpts(text))] += size(text)
        (_, most), (_, second), *_ = [*votes.most_common(2), ("", 0)]
        if most > second:
            assert votes[language_of(turns)] == most


def test_every_conversation_that_the_project_ships_is_told_right():
    of_id = {name: code for code, names in benchmark.the_set()["sample"].items() for name in names}
    labelled = [
        *((one, of_id.get(one.get("id"))) for one in shipped("sharegpt_sample.json")),
        *((one, "en") for one in shipped("dummy_en.json")),
        *((one, "zh") for one in shipped("dummy_cn.json")),
    ]
    wrong = {}
    for one, language in labelled:
        turns = [
            turn | {"value": benchmark.readable(turn["value"])} for turn in one["conversations"]
        ]
        if language and (told := language_of(turns)) != language:
            wrong[one["id"]] = told
    assert wrong == {}


# ------------------------------------------------------------------ the filter


def test_several_codes_may_be_kept_and_skipped_at_once():
    traditional = "水壺在爐子上，水再過幾分鐘就會開。"
    keeps = Filter(keep=["de", "zh"], skip=["zh-Hant", "en"])
    assert keeps(conversation("a", GERMAN)).seen == {"de": 1}
    assert keeps(conversation("a", CHINESE)).seen == {"zh": 1}
    assert keeps(conversation("a", "ok")).seen == {UNKNOWN: 1}
    for text, language in (traditional, "zh-Hant"), (ENGLISH, "en"):
        with pytest.raises(Rejected, match=f"language {language}"):
            keeps(conversation("a", text))


def test_the_script_prints_what_it_read_by_language_whatever_it_keeps(tmp_path):
    items = [conversation(text[:2], text) for text in (ENGLISH, GERMAN, CHINESE, "\ud800")]
    _, _, printed = run(FILTER, items, tmp_path, "--keep-lang", "zh", "de", "--skip-lang", "DE")
    assert "languages: de 1, en 1, unknown 1, zh 1" in printed
    assert "rejected 2: language de 1, language en 1" in printed


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
        assert run_here(*command, *every).returncode == 0
        done = run_here(*command, "en", "klingonese")
        assert done.returncode == 2
        assert "'klingonese' is not a language the detector knows" in done.stderr
        assert set(every) <= set(done.stderr.split())
    done = run_here(FILTER, "--in", source, "--out", tmp_path / "o", "--keep-lang", "zh-CN")
    assert done.returncode == 2
    assert "zh is all Chinese, zh-Hant only traditional" in done.stderr


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
        assert isinstance(detect(text), str)
