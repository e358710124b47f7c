"""A file of prompts becomes a corpus file of answers: in order, and gone on with after a crash."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_lora.chat.adapters import load
from llama_lora.chat.answer_file import AnswerFile, answer_all
from llama_lora.chat.sampling import Sampling
from llama_lora.cli import InputError
from llama_lora.corpus.records.conversation import check
from llama_lora.corpus.records.prompts import PromptRecord, read_prompts
from tests.chat.taught import ADAPTER_ANSWERS, SCRIPT, WINDOW, fed, generate, said

FIRST, SECOND, THIRD = ADAPTER_ANSWERS
SAMPLED = Sampling(temperature=1.5, max_new_tokens=8, seed=5)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def answer(base, lora, tmp_path):
    """Run the script over these records; its one line, and what it wrote."""

    def run(records: list, *args, out: str = "answers.jsonl") -> tuple[str, list[dict]]:
        prompts = write_lines(tmp_path / "prompts.jsonl", records)
        done = generate(
            *("--base_model", base, "--lora_weights", lora, "--temperature", 0),
            *("--prompts_file", prompts, "--output_file", tmp_path / out, *args),
        )
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / f"{out}.partial").exists()
        return done.stdout.strip(), lines(tmp_path / out)

    return run


def test_every_kind_of_record_is_answered_in_order(answer, chat):
    told, found = answer(
        [
            {"prompt": FIRST},
            {"question_id": 81, "category": "writing", "turns": [SECOND]},
            {"id": "q", "question": THIRD, "system": "Be brief.", "answer": 42},
            {"id": "q", "text": FIRST},
            {
                "id": 7,
                "conversations": [
                    said("user", FIRST),
                    said("chatgpt", ADAPTER_ANSWERS[FIRST]),
                    {**said("human", SECOND), "time": 3},
                ],
                "source": {"a": [1]},
            },
            {"messages": [{"role": "user", "content": [{"type": "text", "text": THIRD}]}]},
        ],
        *("--batch_size", 2, "--max_new_tokens", 80),
    )
    assert told.startswith("read 6 · answered 6")
    assert [record["id"] for record in found] == ["prompt-0", "81", "q", "q-2", "7", "prompt-5"]
    chat.system = "Be brief."
    brief = "".join(chat.stream(THIRD))
    assert [record["conversations"][-1]["value"] for record in found] == [
        *(ADAPTER_ANSWERS[FIRST], ADAPTER_ANSWERS[SECOND], brief),
        *(ADAPTER_ANSWERS[FIRST], ADAPTER_ANSWERS[SECOND], ADAPTER_ANSWERS[THIRD]),
    ]
    assert found[1] == {
        "id": "81",
        "question_id": 81,
        "category": "writing",
        "conversations": [said("human", SECOND), said("gpt", ADAPTER_ANSWERS[SECOND])],
        "finish_reason": "stop",
    }
    assert found[2]["answer"] == 42
    assert found[2]["conversations"][0] == said("system", "Be brief.")
    assert found[4]["source"] == {"a": [1]}
    assert len(found[4]["conversations"]) == 4
    for record in found:
        assert check(record)[0] == record


def test_follow_up_questions_are_asked_in_one_conversation(answer, chat):
    turns = [[FIRST, SECOND, THIRD], [SECOND], [THIRD, FIRST]]
    _, found = answer([{"turns": questions} for questions in turns])
    for record, questions in zip(found, turns, strict=True):
        chat.reset()
        for question in questions:
            list(chat.stream(question))
        assert record["conversations"] == chat.turns


def test_what_has_no_answer_is_counted(answer):
    told, found = answer(
        [{"prompt": " "}, {"turns": ["a " * WINDOW, FIRST]}, {"prompt": FIRST}],
        *("--max_new_tokens", 2),
    )
    assert told == (
        "read 4 · answered 1 (1 cut off) · without an answer 3: after a question without one 1, "
        "empty 1, too_long 1"
    )
    assert [record["finish_reason"] for record in found] == ["empty", "too_long", "length"]
    assert [len(record["conversations"]) for record in found] == [1, 1, 2]


def test_system_message_is_for_those_without_one(answer):
    own = {"conversations": [said("system", "Be loud."), said("human", FIRST)]}
    _, found = answer([{"prompt": FIRST}, own], "--system", "Be brief.")
    systems = [record["conversations"][0]["value"] for record in found]
    assert systems == ["Be brief.", "Be loud."]


def test_unsound_text_is_answered(answer):
    records = [{"prompt": text} for text in ("\ud83d", "a\x00\x1b[2J", "</s><s>", "\u202e")]
    told, found = answer(records)
    assert told.startswith("read 4 · answered 4")
    assert [record["conversations"][0]["value"] for record in found] == [
        *("\ufffd", "a\x00\x1b[2J", "</s><s>", "\u202e")
    ]


def test_output_is_an_array_where_its_name_says_so(base, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"prompt": FIRST}]))
    generate("--base_model", base, "--prompts_file", prompts, "--output_file", tmp_path / "a.json")
    assert len(json.loads((tmp_path / "a.json").read_text())) == 1


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "the file is empty"),
        ("[]", "holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": 3}', 'record 1 (byte 16): expected text under "prompt"'),
        ('[{"prompt": "a"}, 3]', "record 1 (byte 16): expected an object: found a number"),
        ('[{"a": 1, "b": 2}]', "expected one of the keys conversations, messages, turns, prompt"),
        ('[{"turns": []}]', 'expected a list of texts under "turns"'),
        ('[{"turns": ["a", null]}]', 'expected a list of texts under "turns"'),
        ('[{"prompt": "a", "system": 1}]', 'expected text under "system": found a number'),
        ('[{"conversations": []}]', "expected the last turn to be a question"),
        (
            '[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]',
            "expected the last turn to be a question",
        ),
        (
            '[{"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}]',
            "questions and answers do not alternate: turn 0 is from gpt",
        ),
        ('[{"conversations": [{"from": "narrator", "value": "a"}]}]', "unknown role"),
    ],
)
def test_what_is_no_prompt_is_one_line_before_a_model_is_loaded(tmp_path, text, complaint):
    (tmp_path / "prompts").write_text(text)
    done = generate(
        *("--base_model", tmp_path / "missing", "--prompts_file", tmp_path / "prompts"),
        *("--output_file", tmp_path / "out.jsonl"),
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert complaint in done.stderr
    assert os.listdir(tmp_path) == ["prompts"]


@pytest.fixture
def asked() -> list[PromptRecord]:
    return [PromptRecord(f"q{n}", [], [f"Tell {n}?", "And now?"]) for n in range(7)]


def run_until(passes: int | None, path: Path, asked, model, template, batch_size=2) -> None:
    """Answer `asked`, or be interrupted in the middle of that pass through the model."""
    seen = []

    def interrupt(*_):
        seen.append(1)
        if len(seen) == passes:
            raise KeyboardInterrupt

    hook = model.get_input_embeddings().register_forward_pre_hook(interrupt)
    try:
        with AnswerFile(str(path), asked, {"temperature": 1.5}) as file:
            answer_all(file, model, template, SAMPLED, batch_size)
    finally:
        hook.remove()


def test_interrupted_run_goes_on_where_it_was(endless, asked, tmp_path, capsys):
    model, template, _ = load(endless)
    run_until(None, tmp_path / "whole.jsonl", asked, model, template)
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    before = b""
    for passes in (20, 12, 30):  # 8 to a batch
        with pytest.raises(KeyboardInterrupt):
            run_until(passes, out, asked, model, template)
        assert partial.read_bytes().startswith(before)
        before = partial.read_bytes()
        done = before.count(b"\n") - 1
        assert (
            f"{partial}: {done} answers are kept; the same command continues"
            in capsys.readouterr().err
        )
        assert not out.exists()
    run_until(None, out, asked, model, template, batch_size=3)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "whole.jsonl"]


def test_half_a_line_is_written_anew(endless, asked, tmp_path):
    model, template, _ = load(endless)
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    with pytest.raises(KeyboardInterrupt):
        run_until(30, out, asked, model, template)
    whole = partial.read_bytes()
    partial.write_bytes(whole[:-9])
    passes = fed(model)
    run_until(None, out, asked, model, template, batch_size=1)
    assert sum(len(ids) > 1 for ids in passes) == 14 - (whole.count(b"\n") - 2)
    run_until(None, tmp_path / "whole.jsonl", asked, model, template)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow
def test_killed_run_goes_on(endless, tmp_path):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": f"Tell {n}?"} for n in range(60)])
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    command = [sys.executable, SCRIPT, "--base_model", endless, "--prompts_file", prompts]
    command += ["--output_file", out, "--batch_size", "1", "--max_new_tokens", "40", "--seed", "1"]
    run = subprocess.Popen([*map(str, command)])
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 4):
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    before = partial.read_bytes()
    assert before.count(b"\n") < 61
    asked = read_prompts(str(prompts))
    model, template, _ = load(endless)
    settings = json.loads(before.split(b"\n")[0])
    del settings["prompts"]
    with AnswerFile(str(out), asked, settings) as file:
        done = file.done
        assert done > 3
        answer_all(file, model, template, Sampling(max_new_tokens=40, seed=1), 16)
    found = [record["conversations"][-1]["value"] for record in lines(out)]
    for line in before.splitlines()[1 : done + 1]:
        kept = json.loads(line)
        assert found[kept["key"]] == kept["value"][0]
    assert len(set(found)) > 50


def test_answers_to_something_else_are_not_gone_on_with(asked, tmp_path):
    path = str(tmp_path / "out.jsonl")
    file = AnswerFile(path, asked, {"temperature": 0})
    file.put(3, "text", "stop")
    file.__exit__(KeyboardInterrupt, None, None)
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    with pytest.raises(InputError, match="answers of a run that differs in temperature; remove it"):
        AnswerFile(path, asked, {"temperature": 1})
    with pytest.raises(InputError, match="answers of a run that differs in prompts; remove it"):
        AnswerFile(path, asked[::-1], {"temperature": 0})
    assert (tmp_path / "out.jsonl.partial").read_bytes() == before
    with AnswerFile(path, asked, {"temperature": 0}) as file:
        assert file.done == 1
        with pytest.raises(InputError, match="another run is writing it"):
            AnswerFile(path, asked, {"temperature": 0})


def test_a_run_that_was_killed_before_its_first_answer_is_in_nobodys_way(asked, tmp_path):
    path = str(tmp_path / "out.jsonl")
    killed = AnswerFile(path, asked, {"temperature": 0})
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    killed.__exit__(KeyboardInterrupt, None, None)
    (tmp_path / "out.jsonl.partial").write_bytes(before)
    with AnswerFile(path, asked, {"temperature": 1}) as file:
        file.put(3, "text", "stop")
        assert file.done == 1


@pytest.mark.parametrize("text", ["[1]\n", "hello\n", '{"a": 1}\n', "\n"])
def test_another_file_is_left_alone(asked, tmp_path, text):
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text(text)
    with pytest.raises(InputError, match="partial: "):
        AnswerFile(str(tmp_path / "out.jsonl"), asked, {})
    assert partial.read_text() == text


def test_places_that_cannot_be_written_are_one_line(asked, tmp_path):
    with pytest.raises(InputError, match="not a regular file"):
        AnswerFile(str(tmp_path), asked, {})
    with pytest.raises(InputError, match="No such file or directory; cannot write there"):
        AnswerFile(str(tmp_path / "missing" / "out"), asked, {})


def test_old_answers_stay_until_there_are_new_ones(endless, asked, tmp_path):
    model, template, _ = load(endless)
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        run_until(1, out, asked, model, template)
    assert out.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_changed_adapter_is_another_setting(base, lora, tmp_path):
    from llama_lora.chat.answer_file import settings_of

    class Args:
        base_model, lora_weights = base, [str(lora)]
        template = quantization = "none"
        temperature = top_p = top_k = repetition_penalty = max_new_tokens = seed = 1

    before = settings_of(Args)
    assert before == settings_of(Args)
    weights = lora / "adapter_model.safetensors"
    stat = weights.stat()
    os.utime(weights, (stat.st_atime, stat.st_mtime + 1))
    try:
        assert settings_of(Args) != before
    finally:
        os.utime(weights, (stat.st_atime, stat.st_mtime))
