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
from safetensors.torch import load_file

from llama_lora.chat.adapters import attached
from llama_lora.chat.sampling import Sampling
from llama_lora.chat.session import Chat
from llama_lora.model import adapter
from llama_lora.model.base import load_base
from llama_lora.model.template import Template, load_tokenizer
from llama_lora.train.arguments import LoraArguments
from tests.conftest import OFFLINE, ROOT, run_script

DOCS = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
SERVE = [sys.executable, "-m", "transformers.cli.transformers", "serve", "./served"]
QUESTIONS = ["Who are you?", "Name three colours of the rainbow."]
GREEDY = {"temperature": 0, "max_tokens": 40}
START = 600  # seconds that a start may take on a busy machine


# ---- vLLM: what its loader reads in an adapter's folder, by the rules in its sources ----

RANKS = {1, 8, 16, 32, 64, 128, 256, 320, 512}  # vllm/config/lora.py: MaxLoRARanks
LAYERS = {  # vllm/model_executor/models/llama.py
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj"},
}


@pytest.mark.parametrize("kind", ["default", "rslora"])
def test_an_adapter_has_the_form_that_vllm_loads(tmp_path, tiny_base, kind):
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

    # vllm/lora/peft_helper.py reads these keys, and scales all layers by alpha and rank alone.
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == flags.lora_r
    assert config["lora_alpha"] == flags.lora_alpha
    assert set(config["target_modules"]) == set.union(*LAYERS.values())
    assert config["use_rslora"] is (kind == "rslora")
    assert config["bias"] == "none"
    refused = "modules_to_save", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern"
    assert not [key for key in refused if config.get(key)]
    (rank,) = map(int, re.findall(r"--max-lora-rank (\d+)", DOCS))
    assert rank in RANKS
    assert config["r"] <= rank

    # vllm/lora/utils.py: parse_fine_tuned_lora_name
    weights = load_file(tmp_path / "adapter_model.safetensors")
    name = re.compile(r"base_model\.model\.model\.layers\.\d\.(\w+)\.(\w+)\.lora_([AB])\.weight")
    for key, matrix in weights.items():
        part, layer, side = name.fullmatch(key).groups()
        assert layer in LAYERS[part]
        assert matrix.shape[0 if side == "A" else 1] == config["r"]
    assert len(weights) == 2 * 7 * base.config.num_hidden_layers

    tokenizers = (load_tokenizer(folder) for folder in (tmp_path, tiny_base))
    assert len({len(tokenizer) for tokenizer in tokenizers}) == 1
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
    convert = "convert_llama_weights_to_hf.py", "--gguf", smollm2_gguf, "--output_dir"
    assert run_script(*convert, home / "base", timeout=START).returncode == 0
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
            model = attached(model, [home / "output"], [adapter.read_weights(home / "output")])
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
