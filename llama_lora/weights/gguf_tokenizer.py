"""Writes a fast Hugging Face tokenizer as llama.cpp describes it; `gguf_reader` reads it."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import gguf
from tokenizers import Tokenizer

from llama_lora.cli import InputError
from llama_lora.weights.llama_tokenizer import (
    BYTE,
    CONTROL,
    LLAMA3_SPLIT,
    NORMAL,
    PROBES,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    sentencepiece_bpe,
)

# llama.cpp's names for how text is cut before the merges of a byte-level vocabulary apply.
CUTS = {
    (("Split", LLAMA3_SPLIT), ("ByteLevel", False)): "llama-bpe",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("ByteLevel", True),): "gpt-2",
}
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class GgufTokenizer:
    """What a GGUF file says about a tokenizer.

    Attributes:
        model: "llama" (SentencePiece) or "gpt2" (byte-level BPE).
        tokens, kinds: text and kind of every row of the embeddings.
        scores: for SentencePiece; the higher the score of the union, the sooner a pair is joined.
        merges: for byte-level BPE, as "left right".
        cut: how text is cut first.
        ids: of the special tokens by role.
        adds_bos: whether every text begins with bos.
        adds_space: whether every text begins with a space.
    """

    model: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float]
    merges: list[str]
    cut: str
    ids: dict[str, int]
    adds_bos: bool
    adds_space: bool

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys to a file that is being written."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
        else:
            writer.add_token_merges(self.merges)
        for role, id in self.ids.items():
            getattr(writer, f"add_{role}_token_id")(id)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(self.adds_space)


def read(source: Path, tokenizer, rows: int) -> GgufTokenizer:
    """Describe `tokenizer` for a model whose embeddings have `rows` rows.

    Args:
        source: where it comes from, for messages.

    Raises:
        InputError: llama.cpp has no tokenizer that gives the same ids.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise InputError(f"{source}: GGUF: expected a BPE tokenizer, found {model['type']}")
    # Added tokens beyond the rows are left out: no text needs them.
    if max(model["vocab"].values()) >= rows:
        raise InputError(
            f"{source}: expected at most {rows} tokens, the rows of the embeddings, found "
            f"{len(tokenizer)}"
        )
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(state["pre_tokenizer"]))
    tokens, kinds = _vocabulary(state, rows, byte_level)
    described = GgufTokenizer(
        model="gpt2" if byte_level else "llama",
        tokens=tokens,
        kinds=kinds,
        scores=[] if byte_level else _scores(model, tokens),
        merges=[" ".join(_pair(merge)) for merge in model["merges"]] if byte_level else [],
        cut=_cut(source, state) if byte_level else "default",
        ids={
            role: id
            for role in ("bos", "eos", "unk", "pad")
            if (id := getattr(tokenizer, f"{role}_token_id")) is not None and id < rows
        },
        adds_bos=tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id],
        adds_space=not byte_level and _adds_space(tokenizer),
    )
    if not byte_level:
        _check_scores(source, tokenizer, described)
    return described


def _vocabulary(state: dict, rows: int, byte_level: bool) -> tuple[list[str], list[int]]:
    """Text and kind of every row; rows without a token get llama.cpp's names."""
    tokens = [f"[PAD{row}]" for row in range(rows)]
    kinds = [UNUSED] * rows
    for token, id in state["model"]["vocab"].items():
        is_byte = state["model"]["byte_fallback"] and BYTE_TOKEN.fullmatch(token)
        tokens[id], kinds[id] = token, BYTE if is_byte else NORMAL
    for added in state["added_tokens"]:
        if added["id"] >= rows:
            continue
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if not byte_level and added["content"] == state["model"]["unk_token"]:
            kinds[added["id"]] = UNKNOWN
    return tokens, kinds


def _scores(model: dict, tokens: list[str]) -> list[float]:
    """Scores that make SentencePiece join pieces in the order of the merges.

    It joins by the union's score, so the first merge that makes a piece decides its score. A piece
    that no merge makes is never joined.
    """
    places = {}
    for merge in model["merges"]:
        places.setdefault("".join(_pair(merge)), len(places))
    return [float(-places.get(token, len(places))) for token in tokens]


def _check_scores(source: Path, tokenizer, described: GgufTokenizer) -> None:
    again: Tokenizer = sentencepiece_bpe(
        described.tokens, described.scores, described.kinds, described.adds_space
    )
    for text in PROBES:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        if again.encode(text, add_special_tokens=False).ids != ids:
            raise InputError(
                f"{source}: GGUF: expected SentencePiece that leaves text as it is, like LLaMA's; "
                f"the ids of {text!r} would differ in llama.cpp"
            )


def _cut(source: Path, state: dict) -> str:
    cut = CUTS.get(tuple(map(_rule, _steps(state["pre_tokenizer"]))))
    if cut is None or state["normalizer"] is not None:
        known = ", ".join(CUTS.values())
        raise InputError(
            f"{source}: GGUF: expected a tokenizer that cuts text as one of {known}, found another"
        )
    return cut


def _rule(step: dict) -> tuple:
    kind = step["type"]
    if kind == "Split":
        return kind, step["pattern"].get("Regex")
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return kind, step["use_regex"]
    return (kind,)


def _steps(pre_tokenizer: dict | None) -> list[dict]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer.get("pretokenizers", [pre_tokenizer])


def _pair(merge: list[str] | str) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _adds_space(tokenizer) -> bool:
    return tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0][:1] == SPACE
