"""Memory of merging an adapter: one file at a time, and peft with the model in memory.

python3 -m benchmarks.model.merge_memory --write

Bases of random weights in the shapes of TinyLlama-1.1B and Llama-2-7B, with an adapter on every
linear layer; the 7B takes 35 GB of the temporary folder (TMPDIR) for the while. Each way is a
process of its own, whose memory is looked at every few milliseconds.
"""

import argparse
import contextlib
import math
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import pages

MERGE = pages.ROOT / "fastchat/model/merge_lora.py"
WAYS = {
    "plain": "`merge_lora.py`",
    "gguf": "`merge_lora.py --gguf Q8_0`",
    "peft": "peft: load, `merge_and_unload`, save",
}
LOOK = 0.005  # seconds between two looks at a process


@dataclass(frozen=True)
class Case:
    """A base to merge into.

    Attributes:
        sizes: by transformers' names.
        shard: bytes of a file; the 7B has merge_lora.py's default.
        ways: to merge it; peft's holds the whole model.
    """

    sizes: dict[str, int]
    shard: int
    ways: tuple[str, ...]


CASES = {
    "1.1B": Case(
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        },
        shard=500 * 10**6,
        ways=("plain", "gguf", "peft"),
    ),
    "7B": Case(
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
        shard=5 * 10**9,
        ways=("plain", "gguf"),
    ),
}


def parse_args() -> argparse.Namespace:
    parser = pages.parser(__doc__, "merge-memory.md")
    add = parser.add_argument
    add("--sizes", nargs="+", choices=CASES, default=list(CASES), help="sizes of the base")
    add("--rank", type=int, default=16)
    add("--dora", action="store_true")
    add("--peft", nargs=3, metavar=("BASE", "LORA", "TARGET"), type=Path, help=argparse.SUPPRESS)
    add("--shard", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.peft:
        merge_with_peft(*args.peft, args.shard)
        return
    found = [figures for name in args.sizes for figures in merged(name, args)]
    pages.publish(
        args,
        "Memory of merging",
        meaning(args),
        pages.table([row(figures) for figures in found], left=2),
        *(difference(figures) for figures in found if "different" in figures),
    )


def merged(name: str, args: argparse.Namespace) -> list[dict]:
    """The figures of each way to merge into one base."""
    case, found = CASES[name], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(case, args.rank, args.dora, folder)
        for way in case.ways:
            figures = watched(command(way, folder, case.shard))
            weights = list((folder / way).glob("*.safetensors"))
            figures["files"] = [file.stat().st_size for file in weights]
            if way == "peft":
                figures["different"] = largest_difference(folder / "plain", folder / "peft")
            found.append({"base": name, "shard": case.shard, "way": way, **figures})
            if "peft" not in case.ways:
                shutil.rmtree(folder / way)
    return found


# ---- What is merged ----


def make(case: Case, rank: int, dora: bool, folder: Path) -> None:
    """A base and an adapter of random numbers, written without a model in memory."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from llama_lora.weights.hf_writer import Checkpoint, parameter_shapes, write_folder

    config, words = LlamaConfig(**case.sizes, vocab_size=32_000), tokenizer()
    base, lora = folder / "base", folder / "lora"
    shapes = parameter_shapes(config)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).sub_(0.5).div_(math.sqrt(shape[-1]))

    checkpoint = Checkpoint(
        base, config, words, [words.eos_token_id], torch.float16, lambda name: random(*shapes[name])
    )
    write_folder(checkpoint, base, max_shard_size=case.shard)

    linear = [name for name in shapes if name.endswith("proj.weight")]
    tensors = {}
    for name in linear:
        key = "base_model.model." + name.removesuffix("weight")
        tensors[key + "lora_A.weight"] = random(rank, shapes[name][1])
        tensors[key + "lora_B.weight"] = random(shapes[name][0], rank)
        if dora:
            tensors[key + "lora_magnitude_vector"] = random(shapes[name][0]).abs()
    lora.mkdir()
    save_file(tensors, lora / "adapter_model.safetensors", {"format": "pt"})
    LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=sorted({name.split(".")[-2] for name in linear}),
        use_dora=dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    ).save_pretrained(lora)


def tokenizer():
    """Of single bytes: what the weights are has nothing to do with it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: id for id, word in enumerate(["<unk>", "<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


# ---- How it is merged ----


def command(way: str, folder: Path, shard: int) -> list:
    base, lora, target = folder / "base", folder / "lora", folder / way
    if way == "peft":
        return ["-m", __spec__.name, "--peft", base, lora, target, "--shard", shard]
    flags = ["--base_model", base, "--lora_weights", lora, "--output_dir", target]
    flags += ["--max_shard_size", f"{shard // 10**6}MB"]
    return [MERGE, *flags, *(["--gguf", "Q8_0"] if way == "gguf" else [])]


def merge_with_peft(base: Path, lora: Path, target: Path, shard: int) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16, trust_remote_code=False)
    merged = PeftModel.from_pretrained(model, lora).merge_and_unload()
    merged.save_pretrained(target, max_shard_size=shard)


def watched(script: list) -> dict:
    """Run a script; bytes at most: resident, and of that its own (anonymous)."""
    own, resident = 0, 0
    process = subprocess.Popen([sys.executable, *map(str, script)])
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        fields = memory(status)
        own = max(own, fields.get("RssAnon", 0))
        resident = max(resident, fields.get("VmHWM", 0))
        time.sleep(LOOK)
    if process.returncode:
        sys.exit(f"error: exit code {process.returncode}")
    return {"own": own, "resident": resident}


def memory(status: Path) -> dict[str, int]:
    """The bytes that a process's status tells; nothing of one that has just ended."""
    with contextlib.suppress(ProcessLookupError):
        fields = re.findall(r"(\w+):\s+(\d+) kB", status.read_text())
        return {name: int(size) << 10 for name, size in fields}
    return {}


def largest_difference(ours: Path, theirs: Path) -> float:
    """The largest difference between two folders' weights, as a share of the largest value."""
    from llama_lora.weights.hf_reader import FolderWeights

    first, second = FolderWeights(ours), FolderWeights(theirs)
    largest = 0.0
    for name in first.shapes:
        a, b = first.load(name).float(), second.load(name).float()
        largest = max(largest, ((a - b).abs().max() / b.abs().max()).item())
    return largest


# ---- The page ----


def meaning(args: argparse.Namespace) -> str:
    return f"""\
{pages.origin()}:
bases of random float16 weights, with a {"DoRA" if args.dora else "LoRA"} adapter of rank
{args.rank} on every linear layer. Peak memory is
the process's own (anonymous pages). Resident also counts the pages of memory-mapped files, which
the system takes back when it needs them."""


def row(figures: dict) -> dict:
    files = figures["files"]
    return {
        "base": f"{figures['base']}, {sum(files) / 1e9:.2f} GB",
        "way": WAYS[figures["way"]],
        "files written": f"{len(files)} of up to {max(files) / 1e9:.2f} GB",
        "peak memory": f"{figures['own'] / 1e9:.2f} GB",
        "resident": f"{figures['resident'] / 1e9:.2f} GB",
        "two files and 1 GB": f"{2 * figures['shard'] / 1e9 + 1:.1f} GB",
    }


def difference(figures: dict) -> str:
    name, different = figures["base"], figures["different"]
    if different == 0:
        return f"Of the {name}, peft's merged values and ours are identical."
    return (
        f"The largest difference between a value of peft's {name} and ours is {different:.2g} of\n"
        f"its tensor's largest; float16 rounds to {2**-11:.1e}."
    )


if __name__ == "__main__":
    main(parse_args())
