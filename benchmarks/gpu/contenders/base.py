"""A Llama of random weights in a Hugging Face folder, made on the spot."""

import json
from pathlib import Path

import torch

from benchmarks.gpu.rows import KINDS, Kind
from llama_lora.model.folder.config import without_values

SIZES = "sizes.json"  # what it was made with; written last
STD = 0.02  # of Llama's own initialization, with which fp16 stays finite
END = 2  # the id of </s>
OUTLIERS, FACTOR = 6, 8.0  # hidden dimensions that are large in a trained 7B (see `make`)


def made(cache: Path, shape: str, name: str) -> Path:
    """The folder of a base, which is made where it is not there yet."""
    folder = cache / shape / name
    make(folder, KINDS[shape][name])
    return folder


@torch.no_grad()
def make(folder: Path, kind: Kind) -> None:
    """Write the base unless it is there: fp16 shards, a tokenizer, and its config last.

    A few channels of the norms are large, as the outlier features that Dettmers et al. 2022 found
    in trained models of this size: int8 kernels compute those apart, which takes time.
    """
    from transformers import LlamaConfig

    if _is_there(folder, kind):
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SIZES).unlink(missing_ok=True)
    config = LlamaConfig(**kind.config, pad_token_id=0, tie_word_embeddings=False)
    tensors = without_values(config).state_dict()
    _write_shards(folder, {name: tensor.shape for name, tensor in tensors.items()})
    _tokenizer(kind.config["vocab_size"]).save_pretrained(folder)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float16"
    config.save_pretrained(folder)
    (folder / SIZES).write_text(json.dumps(kind.config))


def _is_there(folder: Path, kind: Kind) -> bool:
    """Whether a complete base of these sizes is in the folder."""
    path = folder / SIZES
    return path.is_file() and json.loads(path.read_text()) == kind.config


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
    if name == "lm_head.weight":
        weight[END] = 0  # never the likeliest token, so that answers are as long as they may be
    return weight.half().cpu()


def _tokenizer(words: int):
    """Of bytes, and of as many other words as there are, which no text has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    told = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    told += [f"<w{number}>" for number in range(words - len(told))]
    vocabulary = {word: number for number, word in enumerate(told)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )
