"""Serving: what docs/serving.md says of `transformers serve` and of vLLM holds for our adapters."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import OFFLINE, ROOT, run_script

from llama_lora.chat.sampling import Sampling
from llama_lora.chat.session import Chat
from llama_lora.model import adapter
from llama_lora.model.base import load_base
from llama_lora.model.template import Template, load_tokenizer

DOCS = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
SERVE = [sys.executable, "-m", "transformers.cli.transformers", "serve", "./served"]
QUESTIONS = ["Who are you?", "Name three colours of the rainbow."]
GREEDY = {"temperature": 0, "max_tokens": 40}
START = 600  # seconds that a start may take on a busy machine


# ---- vLLM: what its loader reads in an adapter's folder ----


@pytest.mark.parametrize("kind", ["default", "rslora"])
def test_an_adapter_has_the_form_that_vllm_loads(tmp_path, tiny_base, kind):
    from safetensors import safe_open

    from llama_lora.train.arguments import LoraArguments

    flags = LoraArguments()
    base = load_base(tiny_base, dtype=torch.float32)
    model = adapter.attach(
        *(base, flags.lora_r, flags.lora_alpha, flags.lora_dropout, flags.lora_target_modules),
        use_rslora=kind == "rslora",
        use_dora=flags.use_dora,
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    adapter.save(model, Template(load_tokenizer(tiny_base)), tmp_path)

    config = adapter.read_config(tmp_path)
    assert not config.modules_to_save
    assert not config.use_dora
    assert config.use_rslora is (kind == "rslora")
    assert (config.bias, config.lora_bias) == ("none", False)
    assert not config.rank_pattern  # it has one rank and one scale for all layers
    assert not config.alpha_pattern
    assert isinstance(config.target_modules, set | list)
    (rank,) = re.findall(r"--max-lora-rank (\d+)", DOCS)
    assert config.r <= int(rank)

    linear = {n for n, m in base.named_modules() if type(m).__name__ == "Linear" and "lora" in n}
    with safe_open(tmp_path / adapter.WEIGHTS, "pt") as file:
        names = set(file.keys())
    assert names == {f"base_model.model.{name.replace('.default', '.weight')}" for name in linear}
    assert all(re.search(r"\.(self_attn|mlp)\.[a-z]+_proj\.lora_[AB]\.weight$", n) for n in names)
    assert (tmp_path / "chat_template.jinja").is_file()


# ---- transformers serve ----


def block(beginning: str) -> str:
    """The block of code in docs/serving.md that begins so."""
    (found,) = re.findall(rf"```\w+\n({re.escape(beginning)}.*?)```", DOCS, re.S)
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory, smollm2_gguf) -> Path:
    """A folder with a real base and an adapter that changes what it says, served as documented."""
    pytest.importorskip("openai", reason="not installed: pip install -r requirements-serve.txt")
    home = tmp_path_factory.mktemp("home")
    convert = "convert_llama_weights_to_hf.py", "--gguf", smollm2_gguf
    assert run_script(*convert, "--output_dir", home / "base").returncode == 0
    torch.manual_seed(0)
    base = load_base(home / "base", dtype=torch.float32)
    model = adapter.attach(base, 8, 16, 0.0, ["all-linear"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.03)
    adapter.save(model, Template(load_tokenizer(home / "base")), home / "output")
    subprocess.run(["bash", "-ec", block("mkdir served")], cwd=home, check=True)
    return home


@pytest.fixture(scope="module")
def expected(home) -> dict[str, list[str]]:
    """The answers of our own chat: one after the other in one conversation, by who answers."""
    found = {}
    for name in ("tuned", "base"):
        model = load_base(home / "base", dtype=torch.float32)
        if name == "tuned":
            model = adapter.load_adapter(model, home / "output")
        sampling = Sampling(temperature=0, max_new_tokens=GREEDY["max_tokens"])
        chat = Chat(model, Template(load_tokenizer(home / "base")), sampling)
        found[name] = ["".join(chat.stream(question)) for question in QUESTIONS]
    return found


@pytest.fixture(scope="module")
def port(home):
    """Where the server listens while the tests of this module run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*SERVE, "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            cwd=home,
            env={**os.environ, **OFFLINE},
            stdout=log,
            stderr=log,
        )
        try:
            wait_for(server, port, home / "server.log")
            yield port
        finally:
            server.terminate()
            server.wait(60)


def wait_for(server, port: int, log: Path) -> None:
    deadline = time.monotonic() + START
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def client(port):
    import openai

    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


def asked(*texts: str) -> dict:
    """The arguments of a request: questions, with the answers between them."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"model": "./served", "messages": messages}


@pytest.mark.slow
def test_the_answers_are_those_of_our_own_chat(client, expected):
    first, second = QUESTIONS
    chat = client.chat.completions
    answers = [
        chat.create(**asked(first), **GREEDY),
        chat.create(**asked(first, expected["tuned"][0], second), **GREEDY),
    ]
    texts = [answer.choices[0].message.content for answer in answers]
    assert [text.lstrip() for text in texts] == expected["tuned"]
    assert expected["tuned"] != expected["base"]
    assert answers[0].usage.completion_tokens <= GREEDY["max_tokens"]


@pytest.mark.slow
def test_a_stream_has_the_same_answer_in_pieces(client, expected):
    stream = client.chat.completions.create(**asked(QUESTIONS[0]), **GREEDY, stream=True)
    pieces = [chunk.choices[0].delta.content for chunk in stream]
    pieces = [piece for piece in pieces if piece]
    assert len(pieces) > 3
    assert "".join(pieces).lstrip() == expected["tuned"][0]


@pytest.mark.slow
def test_the_documented_requests(client, port, expected):
    answer = expected["tuned"][0].rstrip()  # and on: more tokens are asked for
    snippet = block("from openai import OpenAI").replace(":8000", f":{port}")
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
    assert done.stdout.count(answer) == 2, done.stderr  # whole, and in pieces
    curl = block("curl ").replace(":8000", f":{port}")
    done = subprocess.run(["bash", "-c", curl], capture_output=True, text=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"].lstrip().startswith(answer)


@pytest.mark.slow
def test_a_client_that_disconnects_ends_its_answer_alone(client, expected):
    long = client.chat.completions.create(
        **asked("Tell me a very long story."), temperature=0, max_tokens=4000, stream=True
    )
    for chunk in long:
        if chunk.choices[0].delta.content:
            break
    long.close()
    after = client.chat.completions.create(**asked(QUESTIONS[0]), **GREEDY)
    assert after.choices[0].message.content.lstrip() == expected["tuned"][0]


@pytest.mark.slow
def test_no_other_model_is_served(client):
    import openai

    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{**asked("Hello?"), "model": "./base"}, **GREEDY)
    assert "pinned to './served'" in refused.value.response.text


@pytest.mark.slow
def test_a_port_in_use_ends_the_second_server_alone(home, port, client, expected):
    second = subprocess.run(
        [*SERVE, "--port", str(port), "--device", "cpu"],
        cwd=home,
        env={**os.environ, **OFFLINE},
        capture_output=True,
        text=True,
        timeout=START,
    )
    assert second.returncode != 0
    assert "address already in use" in second.stderr
    after = client.chat.completions.create(**asked(QUESTIONS[0]), **GREEDY)
    assert after.choices[0].message.content.lstrip() == expected["tuned"][0]
