"""What trainers are told that this project is compared with, and what is counted of theirs."""

import json
from argparse import Namespace
from importlib.metadata import distributions

import pytest
import torch
from fastchat.conversation import get_conv_template

from benchmarks.training.contenders import (
    llama_factory,
    llama_factory_recipe,
    recipe_log,
    trl_recipe,
)
from llama_lora.model.template import Template, load_tokenizer

TURNS = [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "I am Kestrel."}]


@pytest.fixture
def told(tiny_base, tmp_path):
    """What a recipe is told on its command line, of a base that LLaMA-Factory would get."""
    Template(load_tokenizer(tiny_base)).tokenizer.save_pretrained(tmp_path / "base")
    args = Namespace(base=tmp_path / "base", data=tmp_path / "split.json", out=tmp_path)
    args.quantization, args.seed, args.steps, args.length, args.batch = "none", 7, 3, 512, 4
    return args


# ---- What is counted ----


def padded_row(ids, labels, width):
    lacking = width - len(ids)
    attended = [1] * len(ids) + [0] * lacking
    return {
        "input_ids": torch.tensor(ids + [0] * lacking),
        "labels": torch.tensor(labels + [-100] * lacking),
        "attention_mask": torch.tensor(attended),
    }


def test_padding_is_no_token_of_an_epoch():
    rows = [padded_row([5, 6, 7], [-100, 6, 7], 8), padded_row([5, 0], [-100, 0], 8)]
    assert recipe_log.epoch(rows) == {"rows": 2, "tokens": 5, "labelled_tokens": 3}


def test_packed_rows_are_counted_with_and_without_a_mask_of_examples():
    """As TRL and LLaMA-Factory keep them; a row's first token cannot be predicted."""
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, -100, 8, 9]}
    assert recipe_log.epoch([row]) == {"rows": 1, "tokens": 5, "labelled_tokens": 3}
    numbered = row | {"attention_mask": [1, 1, 2, 2, 0], "labels": [5, 6, -100, 8, -100]}
    assert recipe_log.epoch([numbered]) == {"rows": 1, "tokens": 4, "labelled_tokens": 2}


def test_a_recipe_logs_the_labels_that_it_learned(tiny_base, told, capsys):
    """Those of one epoch, in steps of different sizes, counted from what the model was given."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    rows = [padded_row([5] * n, [-100] + [5] * (n - 1), 12) for n in (3, 12, 7, 9)]
    told.steps = 2
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_base),
        args=TrainingArguments(
            output_dir=told.out, per_device_train_batch_size=2, **recipe_log.every_step(told)
        ),
        train_dataset=rows,
        callbacks=[recipe_log.RecipeLog(told.out, None)],
    )
    trainer.train()
    entries = [json.loads(line) for line in (told.out / "trainer_log.jsonl").open()]
    assert [entry["step"] for entry in entries] == [1, 2]
    assert 0 < entries[0]["labelled_tokens"] < entries[1]["labelled_tokens"] == 27
    printed = capsys.readouterr().out
    assert 'data {"rows": 4, "tokens": 31, "labelled_tokens": 27}' in printed


# ---- LLaMA-Factory ----


def test_stubs_seem_to_be_installed_and_only_the_imported_one_can_be(tmp_path):
    llama_factory.install_stubs(tmp_path)
    found = {one.metadata["Name"]: one.version for one in distributions(path=[str(tmp_path)])}
    assert found == llama_factory.STUBS
    assert [path.name for path in tmp_path.glob("*.py")] == ["torchaudio.py"]


def test_llama_factory_packs_rows_of_the_length_with_our_lora(told):
    told.settings = "packed"
    found = llama_factory_recipe.settings(told)
    assert found["packing"]
    assert found["neat_packing"]
    assert (found["cutoff_len"], found["per_device_train_batch_size"]) == (512, 4)
    assert (found["lora_rank"], found["lora_alpha"], found["lora_dropout"]) == (16, 32, 0.05)
    assert (found["max_steps"], found["seed"]) == (3, 7)
    assert "quantization_bit" not in found


def test_llama_factory_s_example_is_left_as_it_is(told):
    told.settings, told.quantization = "example", "8bit"
    found = llama_factory_recipe.settings(told)
    assert (found["lora_rank"], found["learning_rate"]) == (8, 1e-4)
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (1, 8)
    assert "packing" not in found
    assert found["quantization_bit"] == 8


def test_llama_factory_gets_the_prompt_of_vicuna(told):
    """It takes the turns from the chat template, and would misread the system message."""
    told.settings = "packed"
    system = llama_factory_recipe.settings(told)["default_system"]
    assert system == get_conv_template("vicuna_v1.1").system_message


def test_llama_factory_finds_the_conversations(tmp_path):
    data = tmp_path / "split.json"
    llama_factory_recipe.describe(data, tmp_path)
    described = json.loads((tmp_path / "dataset_info.json").read_text())
    assert described == {"pieces": {"file_name": str(data), "formatting": "sharegpt"}}


# ---- TRL ----


@pytest.mark.parametrize("settings", trl_recipe.LORA)
def test_trl_learns_answers_alone_where_that_is_the_setting(settings, tiny_base, told):
    """And all of each: what a piece repeats of an answer is marked for this project alone."""
    told.settings = settings
    item = {"conversations": TURNS, "label_from": 5, "unfinished": True}
    told.data.write_text(json.dumps([item]))
    template = Template(load_tokenizer(tiny_base))
    (example,) = trl_recipe.examples(told, template)
    if settings in ("defaults", "docs"):
        assert [message["role"] for message in example["messages"]] == ["user", "assistant"]
    else:
        learned = [id for id in example["labels"] if id != -100]
        text = template.tokenizer.decode(learned)
        assert text.strip() == f"I am Kestrel.{template.tokenizer.eos_token}"


def test_only_packed_rows_have_a_length_and_a_number(told):
    told.settings = "packed"
    found = trl_recipe.training(told)
    assert (found["max_length"], found["per_device_train_batch_size"]) == (512, 4)
    told.settings = "defaults"
    assert trl_recipe.training(told) == {}
