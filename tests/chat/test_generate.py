"""generate.py as users run it: answers, flags, and what is wrong said in one line."""

import os
import shutil
import subprocess
import sys
import warnings

import pytest
from transformers import LlamaForCausalLM

from llama_lora.chat.adapters import load
from llama_lora.model import adapter
from tests.chat.taught import (
    ADAPTER_ANSWERS,
    BASE_ANSWERS,
    SCRIPT,
    SECOND_ANSWERS,
    WINDOW,
    config,
    generate,
    said,
)


def run(*args, stdin: bytes | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, args)],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=120,
        check=False,
    )


def fails(*args) -> str:
    """Run the script in this process; return its one line on stderr."""
    with warnings.catch_warnings(record=True) as warned:
        done = generate(*args)
    assert not warned  # each would be lines on stderr
    assert (done.returncode, done.stdout) == (1, "")
    errors = [line for line in done.stderr.splitlines() if " · " not in line]
    assert len(errors) == 1
    return errors[0].removeprefix("error: ")


@pytest.fixture
def parsed(monkeypatch):
    """The script's arguments, from those given."""
    import runpy

    script = runpy.run_path(str(SCRIPT))

    def parse(*args):
        monkeypatch.setattr(sys, "argv", ["generate.py", "--base_model", "x", *args])
        return script["parse_args"]()

    return parse


def test_one_answer(base):
    done = run("--base_model", base, "--prompt", "What can you do?", "--temperature", "0")
    assert done.returncode == 0
    assert done.stdout.decode() == BASE_ANSWERS["What can you do?"] + "\n"
    assert done.stderr.decode().splitlines() == [
        f"{base} · unquantized base · float32 on CPU · template vicuna_v1.1"
    ]


@pytest.mark.slow
def test_piped_questions_with_an_8bit_base(base, lora):
    lines = ["Who are you?", "", "What can you do?", "/reset", "/system Be brief.", "And now?"]
    done = run(
        *("--base_model", base, "--lora_weights", lora, "--load_8bit", "--temperature", "0"),
        stdin="\n".join(lines).encode() + b"\nbad \xff\x00\x1b bytes",
    )
    assert done.returncode == 0
    expected = [ADAPTER_ANSWERS["Who are you?"], ADAPTER_ANSWERS["What can you do?"]]
    assert done.stdout.decode().startswith("\n".join([*expected, ""]))
    assert "8bit base" in done.stderr.decode()
    assert f"template model of {lora}" in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    for noise in (b"USER", b"ASSISTANT:", b"</s>"):
        assert noise not in done.stdout


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--temperature", "-1"], "at least 0, at most 100, found -1"),
        (["--temperature", "nan"], "found nan"),
        (["--temperature", "hot"], "invalid float value: 'hot'"),
        (["--top_p", "0"], "above 0, at most 1, found 0"),
        (["--top_p", "1.5"], "above 0, at most 1, found 1.5"),
        (["--max_new_tokens", "0"], "at least 1, found 0"),
        (["--top_k", "2.5"], "invalid int value: '2.5'"),
        (["--repetition_penalty", "0"], "above 0, at most 100, found 0"),
        (["--seed", "-3"], "at least 0"),
        (["--load_8bit", "maybe"], "expected True or False, found 'maybe'"),
        (["--load_8bit", "--load_4bit"], "not allowed with argument --load_8bit"),
        (["--prompt", " "], "expected a question, found none"),
        (["--prompt", "a", "--web"], "--web: not allowed with argument --prompt"),
        (["--prompts_file", "a"], "--prompts_file and --output_file: expected both or neither"),
        (["--output_file", "a"], "--prompts_file and --output_file: expected both or neither"),
        (
            ["--prompts_file", "a", "--output_file", "b", "--lora_weights", "c", "d"],
            "expected one adapter with --prompts_file",
        ),
        (["--batch_size", "0"], "at least 1, found 0"),
        (["--batch_size", "many"], "argument --batch_size: invalid"),
        (["--port", "70000"], "at most 65535, found 70000"),
    ],
)
def test_usage_errors(parsed, capsys, args, complaint):
    with pytest.raises(SystemExit) as end:
        parsed(*args)
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "quantization"),
    [
        ([], "none"),
        (["--load_8bit"], "8bit"),
        (["--load_8bit", "True"], "8bit"),
        (["--load_8bit", "False"], "none"),
        (["--load_8bit", "False", "--load_4bit"], "4bit"),
        (["--quantization", "auto"], "auto"),
    ],
)
def test_precision_flags(parsed, args, quantization):
    assert parsed(*args).quantization == quantization


def test_batch_size_flag(parsed):
    assert parsed().batch_size is parsed("--batch_size", "auto").batch_size is None
    assert parsed("--batch_size", "7").batch_size == 7


def test_wrong_folders_are_one_line(base, lora, tmp_path):
    missing = tmp_path / "missing"
    assert "the folder does not exist" in fails("--base_model", missing, "--prompt", "a")
    assert "found an adapter" in fails("--base_model", lora, "--prompt", "a")
    assert "expected adapter_config.json" in fails(
        "--base_model", base, "--lora_weights", base, "--prompt", "a"
    )
    shutil.copytree(lora, tmp_path / "no_weights")
    (tmp_path / "no_weights" / "adapter_model.safetensors").unlink()
    assert "expected adapter_model.safetensors" in fails(
        "--base_model", base, "--lora_weights", tmp_path / "no_weights", "--prompt", "a"
    )


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 64}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}]
)
def test_adapter_of_another_base_is_one_line(lora, tmp_path, changes):
    LlamaForCausalLM(config(**changes)).save_pretrained(tmp_path)
    line = fails("--base_model", tmp_path, "--lora_weights", lora, "--prompt", "a")
    assert f"{lora}: this adapter was not made for" in line


def test_tokenizer_larger_than_the_base_is_one_line(base, tmp_path):
    LlamaForCausalLM(config(vocab_size=300)).save_pretrained(tmp_path)
    for file in base.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    line = fails("--base_model", tmp_path, "--prompt", "a")
    assert "its tokenizer has 386 tokens" in line
    assert line.endswith("only 300")


def test_damaged_adapter_is_one_line(base, lora, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(lora, tmp_path, dirs_exist_ok=True)
    weights = load_file(lora / adapter.WEIGHTS)
    save_file({k: v * float("nan") for k, v in weights.items()}, tmp_path / adapter.WEIGHTS)
    line = fails("--base_model", base, "--lora_weights", tmp_path, "--prompt", "a")
    assert "values that are not finite" in line


def test_damaged_base_is_one_line(base, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] *= float("inf")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert "scores are not finite" in fails("--base_model", tmp_path, "--prompt", "a")


def test_adapters_of_one_name_are_one_line(base, lora):
    twice = ("--base_model", base, "--prompt", "a", "--lora_weights", lora)
    assert "choose a name: NAME=FOLDER" in fails(*twice, lora)
    assert "the base alone is called that" in fails(*twice, f"base={lora}")


def test_first_of_several_adapters_answers(base, lora, second_lora):
    args = ("--base_model", base, "--temperature", 0, "--prompt", "And now?", "--lora_weights")
    assert generate(*args, lora, second_lora).stdout == ADAPTER_ANSWERS["And now?"] + "\n"
    assert generate(*args, f"a={second_lora}", lora).stdout == SECOND_ANSWERS["And now?"] + "\n"


def test_prompt_longer_than_the_window_is_one_line(base):
    line = fails("--base_model", base, "--prompt", "a " * 400)
    assert f"no room for an answer in the model's window of {WINDOW}" in line


def test_base_template_is_used_where_there_is_one(base, lora, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    assert load(tmp_path)[2].endswith("template vicuna_v1.1")
    assert "no chat template" in fails("--base_model", tmp_path, "--template", "model")
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}"
        "{{ m['content'] + (eos_token if m['role'] == 'assistant' else '') }}"
        "{% endfor %}"
    )
    _, template, summary = load(tmp_path)
    assert summary.endswith(f"template model of {tmp_path}")
    assert template.prompt([said("human", "Hi")]) == "Hi"
    for file in ["tokenizer_config.json", "tokenizer.json", "chat_template.jinja"]:
        shutil.copy(lora / file, tmp_path)
    bare = tmp_path / "adapter_without_tokenizer"
    bare.mkdir()
    for file in ["adapter_config.json", adapter.WEIGHTS]:
        shutil.copy(lora / file, bare)
    assert load(base, bare)[2].endswith("template vicuna_v1.1")


def test_adapter_answers_on_a_base_without_a_tokenizer(base, lora, tmp_path):
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(base / file, tmp_path)
    args = ("--base_model", tmp_path, "--lora_weights", lora, "--temperature", 0)
    assert generate(*args, "--prompt", "And now?").stdout == ADAPTER_ANSWERS["And now?"] + "\n"
