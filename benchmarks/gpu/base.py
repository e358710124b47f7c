"""A Llama of random weights in a Hugging Face folder, made on the spot."""

import json
from pathlib import Path

import torch

from gpu.rows import Kind

STD = 0.02  # of Llama's own initialization, with which fp16 stays finite
OUTLIERS, FACTOR = 6, 8.0  # hidden dimensions that are large in a trained 7B (see `make`)


@torch.no_grad()
def make(folder: Path, kind: Kind) -> None:
    """Write the base unless it is there: fp16 shards, a tokenizer, and its config last.

    A few channels of the norms are large, as the outlier features that Dettmers et al. 2022 found
    in trained models of this size: int8 kernels compute those apart, which takes time.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**kind.config, pad_token_id=0, tie_word_embeddings=False)
    if _is_there(folder, kind):
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    with torch.device("meta"):
        sizes = AutoModelForCausalLM.from_config(config, trust_remote_code=False).state_dict()
    _write_shards(folder, {name: tensor.shape for name, tensor in sizes.items()})
    _tokenizer(kind.config["vocab_size"]).save_pretrained(folder)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float16"
    config.save_pretrained(folder)


def _is_there(folder: Path, kind: Kind) -> bool:
    """Whether a complete base of these sizes is in the folder."""
    path = folder / "config.json"
    return path.is_file() and kind.config.items() <= json.loads(path.read_text()).items()


def _write_shards(folder: Path, sizes: dict[str, torch.Size]) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    shards: dict[str, list[str]] = {}
    for name in sizes:
        layer = name.split(".")[2] if ".layers." in name else "outside"
        shards.setdefault(layer, []).append(name)
    index: dict[str, str] = {}
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(
            {name: _weight(name, sizes[name]) for name in names}, folder / file, {"format": "pt"}
        )
        index |= dict.fromkeys(names, file)
    told = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told))


def _weight(name: str, size: torch.Size) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name.endswith("norm.weight"):
        weight = torch.ones(size, device=device)
        if ".layers." in name:
            weight[:: -(-size[0] // OUTLIERS)] = FACTOR
    else:
        weight = torch.randn(size, device=device) * STD
    return weight.half().cpu()


def _tokenizer(words: int):
    """A tokenizer with as many words; what other trainers ask for, although they get token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )
