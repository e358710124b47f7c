"""What the tests of the conversion share: checkpoints made on the spot, and the script itself."""

from base64 import b64decode
from pathlib import Path

import tiktoken
import torch
from transformers import AutoModelForCausalLM

from llama_lora.weights.llama_tokenizer import LLAMA3_SPLIT
from tests.conftest import ROOT, error_line, run_here
from tests.weights import reference_llama

SCRIPT = ROOT / "convert_llama_weights_to_hf.py"
SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n\treturn",
    "Ein Vogel in der Hand ist besser als zwei auf dem Dach. Où est la bibliothèque ?",
    "今天天气很好，我们去公园散步吧。 今日は天気がいいですね。",
    "Сколько стоит этот хлеб? 1234567890 3.14159 {'key': [1, 2, 3]}",
]
TEXTS = [
    *SENTENCES,
    "",
    " ",
    "\n",
    "  leading",
    "trailing   ",
    "a  2024\t\t1\r\n\r\nb",
    "                               x",
    "👍🏽 🇩🇪 \u200b é e\u0301 ﬁ Ａ½ \u00a0 \u3000",
    "it's WE'LL <tag> </tag> \\n",
]
PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": -1}
HIDDEN = 96


def byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def tiktoken_ranks(path: Path) -> dict[bytes, int]:
    pairs = (line.split() for line in path.read_bytes().splitlines())
    return {b64decode(token): int(rank) for token, rank in pairs}


def tiktoken_encoding(path: Path) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "test", pat_str=LLAMA3_SPLIT, mergeable_ranks=tiktoken_ranks(path), special_tokens={}
    )


def meta_folder(folder: Path, tokenizer: Path, params: dict, shards, size: str = "7B") -> Path:
    """Lay a checkpoint out as Meta does: tokenizer.model above the folder of one size."""
    reference_llama.write_shards(folder / size, params, shards)
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return folder


def rewrite(folder: Path, change, number: int = 1) -> None:
    path = folder / "7B" / f"consolidated.{number:02}.pth"
    shard = torch.load(path)
    change(shard)
    torch.save(shard, path)


def convert(*flags) -> int:
    """Run the script in this process; return the exit code."""
    return run_here(SCRIPT, *flags).returncode


def refused(*flags) -> str:
    """The one line a failing conversion prints."""
    return error_line(run_here(SCRIPT, *flags))


def model_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"folder"
        for path in sorted(folder.rglob("*"))
    }
