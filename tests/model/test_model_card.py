"""The card tells what the folder knows, and names cannot break out of it."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from llama_lora.model import adapter, model_card
from llama_lora.weights.merge_lora import merge
from tests.weights.merging import make_adapter, make_base

HOSTILE = "a|b <script>alert(1)</script> *x* `c` [d](e) \\ &amp; # f\n\n---\n~~~"
SUMMARY = {
    "steps": 46,
    "trainable_parameters": 4_884_480,
    "labelled_tokens": 12_975,
    "held_out_loss_before": 3.3391,
    "held_out_loss_after": 2.3305,
    "quantization": "8bit",
    "data": [
        {
            "file": "x/clean.json",
            "stage": "clean_sharegpt.py",
            "read": 1332,
            "kept": 1328,
            "written": 1330,
            "rejected": {"empty": 1, "blocked phrase": 3},
        }
    ],
    "settings": {
        "learning_rate": 2e-5,
        "model_max_length": 512,
        "data_path": "a/split.json",
        "eval_data_path": None,
    },
}


@pytest.fixture
def lora(tmp_path, llama_tokenizer) -> Path:
    base = make_base(tmp_path / "base", llama_tokenizer)
    folder = make_adapter(tmp_path / "out", base)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    log = [{"loss": 3.0, "step": 1}, {"eval_loss": 9.0, "step": 1}, {"loss": 2.0, "step": 2}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def parts(card: str) -> tuple[dict, str]:
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def run_snippet(body: str, folder: Path, monkeypatch, capsys) -> None:
    """Run the card's Python where the model's folder lies; it prints an answer."""
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", body, re.M | re.S)
    monkeypatch.chdir(folder)
    capsys.readouterr()
    exec(snippet.replace("max_new_tokens=200", "max_new_tokens=5"), {})
    assert capsys.readouterr().out.strip()


def test_adapter_card_replaces_pefts(lora, monkeypatch, capsys):
    assert "More Information Needed" in (lora / "README.md").read_text()
    model_card.write(lora)
    front, body = parts((lora / "README.md").read_text(encoding="utf-8"))
    assert front == {
        "base_model": "base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora"],
    }
    assert "More Information Needed" not in body
    rows = {tuple(cell.strip() for cell in row.split("|")[1:-1]) for row in body.splitlines()}
    assert ("held out, before training", "3.3391", "28.19") in rows
    assert ("held out, after training", "2.3305", "10.28") in rows
    assert ("training, mean of the first 2 logged", "2.5000", "12.18") in rows
    assert ("rank", "4") in rows
    assert ("adapted layers", "down\\_proj, q\\_proj, v\\_proj") in rows
    assert ("labelled tokens", "12,975") in rows
    assert ("`--model_max_length`", "512") in rows
    assert ("`--data_path`", "split.json") in rows
    assert "eval_data_path" not in body
    assert "| 1,332 | 1,328 | 1,330 | 4: blocked phrase 3, empty 1 |" in body
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", body, re.M | re.S)
    commands, snippets = ([text for kind, text in blocks if kind == k] for k in ("bash", "python"))
    assert commands == ["python3 generate.py --base_model ./base --lora_weights ./out\n"]
    assert str(lora.parent) not in body
    assert "names the base by the path of its folder" in body
    assert "--base_name ID" in body
    assert len(snippets) == 1
    run_snippet(body, lora.parent, monkeypatch, capsys)
    prompt = next(text for kind, text in blocks if not kind)
    assert "USER: Who are you? ASSISTANT: I am …</s>USER: What can you do? ASSISTANT:" in prompt


def test_card_of_an_adapter_that_names_its_base_by_an_id(lora):
    adapter.complete(lora, lora.parent / "base", "someone/llama-7b")
    model_card.write(lora)
    front, body = parts((lora / "README.md").read_text())
    assert front["base_model"] == "someone/llama-7b"
    assert "A LoRA adapter for the base model `someone/llama-7b`." in body
    (commands,) = re.findall(r"^```bash\n(.*?)^```$", body, re.M | re.S)
    assert commands.splitlines() == [
        "hf download someone/llama-7b --local-dir ./llama-7b",
        "python3 generate.py --base_model ./llama-7b --lora_weights ./out",
    ]
    assert 'from_pretrained("someone/llama-7b", dtype' in body
    assert "names the base by its id on the Hub" in body


def test_card_without_an_account_of_the_run(lora):
    """Adapters of other tools have neither."""
    (lora / "summary.json").unlink()
    (lora / "trainer_state.json").unlink()
    model_card.write(lora)
    body = (lora / "README.md").read_text()
    assert "## Training" in body
    assert "## Losses" not in body
    assert "## Data" not in body


def test_merged_card(tmp_path, lora, monkeypatch, capsys):
    merge(tmp_path / "base", lora, tmp_path / "mine", kinds=("F16",))
    front, body = parts((tmp_path / "mine" / "README.md").read_text())
    assert front["library_name"] == "transformers"
    assert front["base_model"] == "base"
    assert "gguf" in front["tags"]
    assert "generate.py --base_model ./mine\n" in body
    assert "llama-cli -m ./mine/mine-F16.gguf" in body
    assert "2.3305" in body
    run_snippet(body, tmp_path, monkeypatch, capsys)
    assert str(tmp_path) not in body


def test_hostile_names_are_text(tmp_path, lora):
    hostile = tmp_path / HOSTILE.replace("/", "").replace("\n", " ")
    shutil.copytree(lora, hostile)
    data = [{**SUMMARY["data"][0], "stage": HOSTILE, "rejected": {HOSTILE: 2}}]
    settings = {"learning_rate": HOSTILE}
    (hostile / "summary.json").write_text(
        json.dumps({**SUMMARY, "data": data, "settings": settings, "device": HOSTILE})
    )
    config = json.loads((hostile / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = HOSTILE
    (hostile / "adapter_config.json").write_text(json.dumps(config))
    model_card.write(hostile)
    front, body = parts((hostile / "README.md").read_text(encoding="utf-8"))
    assert set(front) == {"base_model", "library_name", "pipeline_tag", "tags"}
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    inline = [child for token in tokens for child in token.children or ()]
    assert not [t for t in (*tokens, *inline) if t.type.startswith("html")]
    assert not [t for t in inline if t.type in ("em_open", "strong_open", "link_open", "s_open")]
    cells = ["".join(c.content for c in t.children) for t in tokens if t.type == "inline"]
    assert " ".join(HOSTILE.split()) in cells
    rows = [t for t in tokens if t.type == "tr_open"]
    cells_per_row = sum(t.type in ("td_open", "th_open") for t in tokens) / len(rows)
    assert 2 <= cells_per_row <= 6
    for text in re.findall(r"^````*python\n(.*?)^````*$", body, re.M | re.S):
        ast.parse(text)
