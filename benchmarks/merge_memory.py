"""Memory and time of merging an adapter: one shard at a time, and peft with the model in memory.

python3 benchmarks/merge_memory.py --out docs/merge-memory.md

The base is random, of TinyLlama-1.1B's shape; the adapter changes every linear layer. Each way
runs in a process of its own. Peak memory is resident, with what is mapped of files; what the
imports take is told apart.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import machine

WAYS = {
    "ours": "`merge_lora.py`",
    "peft": "peft: load, `merge_and_unload`, save",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=2_048)
    parser.add_argument("--intermediate", type=int, default=5_632)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--words", type=int, default=32_000, help="of the vocabulary")
    parser.add_argument("--shard", type=int, default=500, help="MB in one file")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--folder", type=Path, help="for base, adapter and results; else temporary")
    parser.add_argument("--out", type=Path, help="page to write")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.way:
        print(json.dumps(measure(args.way, args.folder, args.shard * 10**6)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        make(args, folder)
        results = {way: in_own_process(way, folder, args.shard) for way in WAYS}
        different = largest_difference(*(folder / way for way in WAYS))
    text = page(args, results, different)
    print(text)
    if args.out:
        args.out.write_text(text)


def make(args: argparse.Namespace, folder: Path) -> None:
    """A base and an adapter of random numbers, written without a model in memory."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    from llama_lora.weights.hf_folder import parameter_shapes, plan_shards

    config = LlamaConfig(
        vocab_size=args.words,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(args.hidden // 512, 1),
        architectures=["LlamaForCausalLM"],
        dtype="float16",
    )
    base, lora = folder / "base", folder / "lora"
    base.mkdir()
    lora.mkdir()
    config.save_pretrained(base)
    tokenizer().save_pretrained(base)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).sub_(0.5).div_(math.sqrt(shape[-1]))

    shapes = parameter_shapes(config)
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    files = {}
    for number, names in enumerate(plan_shards(sizes, 10**9)):
        file = f"model-{number}.safetensors"
        save_file({n: random(*shapes[n]).half() for n in names}, base / file, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))

    linear = [name for name in shapes if name.endswith("proj.weight")]
    tensors = {}
    for name in linear:
        key = "base_model.model." + name.removesuffix("weight")
        tensors[key + "lora_A.weight"] = random(args.rank, shapes[name][1])
        tensors[key + "lora_B.weight"] = random(shapes[name][0], args.rank)
        if args.dora:
            tensors[key + "lora_magnitude_vector"] = random(shapes[name][0]).abs()
    save_file(tensors, lora / "adapter_model.safetensors", {"format": "pt"})
    LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=sorted({name.split(".")[-2] for name in linear}),
        use_dora=args.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    ).save_pretrained(lora)


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}
    backend = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def in_own_process(way: str, folder: Path, shard: int) -> dict:
    command = [sys.executable, __file__, "--way", way, "--folder", folder, "--shard", str(shard)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(way: str, folder: Path, shard: int) -> dict:
    """Seconds, and bytes of memory: of the imports, and at the peak."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from llama_lora.weights.merge import merge

    imports, began = peak(), time.perf_counter()
    base, lora, target = folder / "base", folder / "lora", folder / way
    if way == "ours":
        merge(base, lora, target, max_shard_size=shard)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
        merged = PeftModel.from_pretrained(model, lora).merge_and_unload()
        merged.save_pretrained(target, max_shard_size=shard)
    written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    return {
        "seconds": time.perf_counter() - began,
        "imports": imports,
        "peak": peak(),
        "written": written,
        "files": len(list(target.glob("*.safetensors"))),
    }


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def largest_difference(ours: Path, theirs: Path) -> float:
    """The largest difference between two folders' weights, as a share of the largest value."""
    from llama_lora.weights.hf_weights import FolderWeights

    first, second = FolderWeights(ours), FolderWeights(theirs)
    largest = 0.0
    for name in first.shapes:
        a, b = first.load(name).float(), second.load(name).float()
        largest = max(largest, ((a - b).abs().max() / b.abs().max()).item())
    return largest


def page(args: argparse.Namespace, results: dict, different: float) -> str:
    written = results["ours"]["written"]
    lines = [
        "# Memory of merging",
        "",
        f"`python3 benchmarks/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}` on {machine()}:",
        f"a base of {written / 2e9:.2f} billion weights in float16 ({written / 1e9:.2f} GB), a",
        f"{'DoRA' if args.dora else 'LoRA'} adapter of rank {args.rank} on every linear layer,",
        f"shards of {args.shard:,} MB. Peak memory is resident, with what is mapped of files.",
        "",
        "| way | peak memory | of which imports | all shards | seconds |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {WAYS[way]} | {one['peak'] / 1e9:.2f} GB | {one['imports'] / 1e9:.2f} GB | "
        f"{one['written'] / 1e9:.2f} GB in {one['files']} | {one['seconds']:.0f} |"
        for way, one in results.items()
    ]
    lines += [
        "",
        f"The largest difference between the two results is {different:.1e} of a tensor's largest",
        f"value; float16 rounds to {2**-11:.1e}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(parse_args())
