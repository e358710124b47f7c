"""The README.md of a model or adapter folder: what it is, how it was made, how to use it.

Front matter as the Hugging Face Hub reads it; the rest is for people.
"""

import json
import math
import re
import shlex
from pathlib import Path

from huggingface_hub import ModelCardData

from llama_lora.model.adapter import CONFIG, HUB_ID
from llama_lora.model.template import load_tokenizer
from llama_lora.text import sound_text

CARD = "README.md"
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|~&$!#])")  # characters with a meaning within a line
EXAMPLE = [
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am …"},
    {"role": "user", "content": "What can you do?"},
]
SETTINGS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "adapted layers",
    "use_rslora": "rsLoRA",
    "use_dora": "DoRA",
}
RUN = {
    "steps": "steps",
    "labelled_tokens": "labelled tokens",
    "trainable_parameters": "trained parameters",
    "parameters": "parameters with the base's",
    "quantization": "base while training",
    "compute_dtype": "computed in",
    "device": "device",
    "processes": "processes",
    "minutes": "minutes",
}


def write(folder: Path) -> None:
    """Write the card of the adapter in `folder`, in place of the one that peft leaves there.

    It is made from the folder's `adapter_config.json`, `summary.json`, `trainer_state.json` and
    tokenizer. Besides the run's figures, `summary.json` may hold `data` (the accounts of the corpus
    stages, first to last, each with the name of its `file`) and `settings` (flags by name).
    """
    folder = Path(folder)
    base = _read(folder / CONFIG).get("base_model_name_or_path") or "the base model"
    name, short = folder.resolve().name, _short(base)
    on_hub = bool(HUB_ID.fullmatch(base))
    beside = f"./{Path(short).name}"  # the base's folder
    download = f"hf download {short} --local-dir {shlex.quote(beside)}\n" if on_hub else ""
    snippet = ADAPTER_SNIPPET.format(
        base=_literal(short if on_hub else beside), folder=_literal(f"./{name}")
    )
    _write(
        folder,
        _front_matter(base, "peft", ["lora"]),
        f"# {escaped(name)}\n\nA LoRA adapter for the base model {coded(short)}.",
        "## Use it",
        "With the base's folder and this one side by side:",
        fenced(download + _command(beside, f"./{name}"), "bash"),
        "Or with transformers and peft:",
        fenced(snippet, "python"),
        NAMED_BY_ID if on_hub else NAMED_BY_PATH,
        *_story(folder, folder),
    )


def write_merged(folder: Path, name: str, base: Path, lora: Path, dtype: str) -> None:
    """Write the card of the model in `folder`, merged from `base` and the adapter in `lora`.

    Args:
        name: the model's name, which `folder` may not have yet.
    """
    base = str(base.resolve())  # never an id
    ggufs = sorted(path.name for path in folder.glob("*.gguf"))
    _write(
        folder,
        _front_matter(base, "transformers", ["lora", "merged", *(["gguf"] if ggufs else [])]),
        f"# {escaped(name)}\n\nThe base model {coded(_short(base))} with the LoRA adapter "
        f"{coded(lora.resolve().name)} merged into its weights, in {dtype}.",
        "## Use it",
        fenced(_command(f"./{name}", None), "bash"),
        "Or with transformers:",
        fenced(MERGED_SNIPPET.format(folder=_literal(f"./{name}")), "python"),
        *(_llama_cpp(name, ggufs)),
        *_story(folder, lora),
    )


NAMED_BY_ID = """`adapter_config.json` names the base by its id on the Hub, and peft loads it from
there (`AutoPeftModelForCausalLM`). To load it from a folder, put that folder's path under
`base_model_name_or_path` instead."""

NAMED_BY_PATH = """`adapter_config.json` names the base by the path of its folder at training time,
and peft looks for it there (`AutoPeftModelForCausalLM`). For another machine, or to publish the
adapter, put another path or an id on the Hub under `base_model_name_or_path` instead. Training with
`--base_name ID` writes an id."""

LOADED = """tokenizer = AutoTokenizer.from_pretrained({folder})
messages = [{{"role": "user", "content": "Who are you?"}}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
).to(model.device)
answer = model.generate(**prompt, max_new_tokens=200)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))"""

ADAPTER_SNIPPET = (
    """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base}, dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, {folder})
"""
    + LOADED
)

MERGED_SNIPPET = (
    """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder}, dtype="auto", device_map="auto")
"""
    + LOADED
)


def escaped(text: str) -> str:
    """`text` on one line, so that Markdown and HTML show it as it is."""
    return MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def coded(text: str) -> str:
    """`text` on one line as code; nothing in it can end the code."""
    text = " ".join(text.split())
    fence = "`" * (_longest_run(text) + 1)
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def fenced(text: str, language: str = "") -> str:
    """`text` as a block of code; nothing in it can end the block."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall(r"`+", text)), default=0)


def _write(folder: Path, *parts: str) -> None:
    (folder / CARD).write_text(sound_text("\n\n".join(parts)) + "\n", encoding="utf-8")


def _front_matter(base: str, library: str, tags: list[str]) -> str:
    """The front matter, without a license: that depends on the base, and the user names it."""
    data = ModelCardData(
        base_model=_short(base), library_name=library, pipeline_tag="text-generation", tags=tags
    )
    return f"---\n{data.to_yaml()}\n---"


def _short(base: str) -> str:
    """A base's id on the Hub, or the name of its folder without the path, which is private."""
    return base if HUB_ID.fullmatch(base) else " ".join(Path(base).name.split())


def _command(base: str, adapter: str | None) -> str:
    lora = f" --lora_weights {shlex.quote(adapter)}" if adapter else ""
    return f"python3 generate.py --base_model {shlex.quote(base)}{lora}"


def _llama_cpp(name: str, files: list[str]) -> list[str]:
    if not files:
        return []
    commands = "\n".join(f"llama-cli -m {shlex.quote(f'./{name}/{file}')}" for file in files)
    return [
        "With llama.cpp, which finds the chat template in the file:",
        fenced(commands, "bash"),
    ]


def _story(folder: Path, lora: Path) -> list[str]:
    """Prompt format, data, settings and losses, as far as the adapter's folder has them."""
    summary = _read(lora / "summary.json")
    config = _read(lora / CONFIG)
    return [
        *_prompt_format(folder),
        *_data(summary.get("data", [])),
        *_training(config, summary),
        *_losses(summary, _read(lora / "trainer_state.json")),
        "## License\n\nThe base model's license applies to this model too, and the data may have "
        "terms of its own.",
    ]


def _prompt_format(folder: Path) -> list[str]:
    tokenizer = load_tokenizer(folder)
    text = tokenizer.apply_chat_template(EXAMPLE, add_generation_prompt=True, tokenize=False)
    return [
        "## Prompt format\n\nIt is in `chat_template.jinja`. A question, its answer and the next "
        "question look like this:",
        fenced(text),
    ]


def _data(accounts: list[dict]) -> list[str]:
    if not accounts:
        return []
    rows = [
        [
            escaped(Path(account["file"]).name),
            escaped(account["stage"]),
            f"{account['read']:,}",
            f"{account['kept']:,}",
            f"{account['written']:,}",
            escaped(_reasons(account["rejected"])),
        ]
        for account in accounts
    ]
    heads = "file", "written by", "read", "kept", "written", "rejected"
    return ["## Data\n\nConversations, stage by stage:", _table(heads, rows, "llrrrl")]


def _reasons(rejected: dict[str, int]) -> str:
    ordered = sorted(rejected.items(), key=lambda item: -item[1])
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in ordered)
    return f"{sum(rejected.values()):,}" + (f": {reasons}" if reasons else "")


def _training(config: dict, summary: dict) -> list[str]:
    rows = [[SETTINGS[key], escaped(_shown(config.get(key)))] for key in SETTINGS]
    rows += [[RUN[key], escaped(_shown(summary[key]))] for key in RUN if key in summary]
    rows += [
        [f"`--{name}`", escaped(_shown(Path(value).name if name.endswith("_path") else value))]
        for name, value in summary.get("settings", {}).items()
        if value is not None
    ]
    return ["## Training", _table(("setting", ""), rows, "ll")]


def _losses(summary: dict, state: dict) -> list[str]:
    log = [entry["loss"] for entry in state.get("log_history", []) if "loss" in entry]
    rows = []
    for when in ("before", "after"):
        loss = summary.get(f"held_out_loss_{when}")
        if loss is not None:
            rows.append([f"held out, {when} training", f"{loss:.4f}", f"{math.exp(loss):.2f}"])
    if log:
        for when, part in (("first", log[:10]), ("last", log[-10:])):
            loss = sum(part) / len(part)
            row = f"training, mean of the {when} {len(part)} logged"
            rows.append([row, f"{loss:.4f}", f"{math.exp(loss):.2f}"])
    heads = "loss per labelled token", "nats", "perplexity"
    return ["## Losses", _table(heads, rows, "lrr")] if rows else []


def _table(heads, rows: list[list[str]], aligned: str) -> str:
    rules = ["--:" if side == "r" else "---" for side in aligned]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(heads), rules, *rows])


def _shown(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(sorted(map(str, value)))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
