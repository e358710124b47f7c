"""Models that answer: a base, adapters on it, and a chat with them."""

import functools
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from llama_lora.chat.adapters import load, load_adapters
from llama_lora.chat.session import Chat
from llama_lora.model import adapter
from llama_lora.model.template import Template, load_tokenizer
from tests.chat.taught import (
    ADAPTER_ANSWERS,
    BASE_ANSWERS,
    GREEDY,
    SECOND_ANSWERS,
    TARGETS,
    byte_level,
    config,
    plain_answer,
    teach,
)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokenizer, model = byte_level(), LlamaForCausalLM(config())
    tokenizer.save_pretrained(folder)
    teach(model, Template(tokenizer), BASE_ANSWERS, 1e-2)
    model.save_pretrained(folder)
    return folder


def trained_adapter(base: Path, folder: Path, answers: dict[str, str]) -> Path:
    torch.manual_seed(0)
    template = Template(load_tokenizer(base))
    model = AutoModelForCausalLM.from_pretrained(base)
    model = adapter.attach(model, r=16, alpha=32, dropout=0.0, target_modules=TARGETS)
    teach(model, template, answers, 1e-2)
    adapter.save(model, template, folder)
    return folder


@pytest.fixture(scope="session")
def lora(base, tmp_path_factory) -> Path:
    return trained_adapter(base, tmp_path_factory.mktemp("lora"), ADAPTER_ANSWERS)


@pytest.fixture(scope="session")
def second_lora(base, tmp_path_factory) -> Path:
    return trained_adapter(base, tmp_path_factory.mktemp("second.v2"), SECOND_ANSWERS)


@pytest.fixture(scope="session")
def endless(base, tmp_path_factory) -> Path:
    """A model that knows no end: untrained, and no end-of-answer token is ever the likeliest."""
    folder = tmp_path_factory.mktemp("endless")
    for file in base.glob("tokenizer*"):
        shutil.copy(file, folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(max_position_embeddings=1 << 16))
    with torch.no_grad():
        model.lm_head.weight[2] = 0
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def chat(base, lora) -> Chat:
    model, template, _ = load(base, lora)
    return Chat(model, template, GREEDY)


@pytest.fixture
def adapters(base, lora, second_lora):
    return load_adapters(base, {"one": lora, "two": second_lora})[0]


@pytest.fixture(scope="session")
def plain_model(base, lora):
    """Base and adapter as peft loads them."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()


@pytest.fixture(scope="session")
def oracle(base, plain_model):
    """The greedy answer by fschat's prompt and a loop without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    return functools.partial(plain_answer, plain_model, tokenizer)
