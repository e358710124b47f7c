"""Llama's tokenizers, SentencePiece and byte-level BPE, as fast Hugging Face tokenizers."""

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from llama_lora.cli import InputError

SPACE = "\u2581"  # how SentencePiece writes a space

# The kinds of a vocabulary's entries, as SentencePiece and GGUF number them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# How text is cut before the merges of a byte-level vocabulary apply (Llama 3's tokenizer.py).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Text on which a converted tokenizer must agree with the original one: leading and repeated spaces,
# code, text that Unicode normalization would change, and bytes outside the vocabulary.
PROBES = [
    "Hello  world",
    "  two leading, two trailing  ",
    "def f(x):\n        return {'a': 1.50}\r\n\n\n\tpass",
    "\ufb01ancée e\u0301 ＡＢＣ １２３ ½ \u00a0\u3000",
    "你好，世界 こんにちは 안녕하세요 Здравствуйте مرحبا",
    "😀👩‍👩‍👧🇩🇪 \u200b \U000103ff",
    f"{SPACE}a {SPACE}{SPACE} b",
]


@dataclass(frozen=True)
class ConvertedTokenizer:
    """A tokenizer, the tokens that end an answer, and whether it is Llama 3's kind."""

    tokenizer: PreTrainedTokenizerFast
    stop_ids: list[int]
    byte_level: bool


def read_tokenizer_model(path: Path, scaled_rope: bool) -> ConvertedTokenizer:
    """Convert Meta's `tokenizer.model`: SentencePiece (LLaMA 1, 2) or tiktoken (Llama 3).

    Args:
        scaled_rope: whether the model is Llama 3.1 or later, which names more special tokens.
    """
    ranks = _read_tiktoken(path)
    return _from_sentencepiece(path) if ranks is None else _from_tiktoken(path, ranks, scaled_rope)


def sentencepiece_bpe(
    pieces: list[str], scores: list[float], kinds: list[int], add_space_prefix: bool = True
) -> Tokenizer:
    """A fast tokenizer that gives the ids of a SentencePiece BPE vocabulary.

    Every text gets a space in front, also after a special token. SentencePiece does that with every
    text it is given, and Vicuna's prompts were tokenized that way in training.
    """
    ids = {piece: id for id, piece in enumerate(pieces)}
    normal = {piece for piece, kind in zip(pieces, kinds, strict=True) if kind == NORMAL}
    merges = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score, kind in zip(pieces, scores, kinds, strict=True)
        if kind == NORMAL
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    # SentencePiece joins the pair whose union scores best and, among equals, the leftmost. Putting
    # the longest left part first gives the same in the only case that matters: runs of one
    # character.
    merges.sort(key=lambda merge: merge[:2])
    backend = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[(left, right) for _, _, left, right in merges],
            unk_token=next((p for p, k in zip(pieces, kinds, strict=True) if k == UNKNOWN), None),
            fuse_unk=True,
            byte_fallback=BYTE in kinds,
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    decode = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        spaces = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        decode.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = spaces
    backend.decoder = decoders.Sequence(decode)
    _add_tokens(backend, pieces, kinds)
    return backend


def byte_level_bpe(
    tokens: list[str],
    merges: list[tuple[str, str]],
    kinds: list[int],
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    ignore_merges: bool,
) -> Tokenizer:
    """A fast tokenizer over bytes, of tokens written in GPT-2's alphabet.

    Args:
        ignore_merges: whether a piece of text that is itself a token is taken whole (tiktoken).
    """
    ids = {token: id for id, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, tokens, kinds)
    return backend


def llama3_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def finish(
    backend: Tokenizer,
    source: Path,
    *,
    bos: str | None,
    eos: str | None,
    unk: str | None = None,
    pad: str | None = None,
    add_bos: bool = True,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """Name the special tokens, choose one for padding, and have bos added to every text.

    Raises:
        InputError: there is no end-of-sequence token.
    """
    if eos is None:
        raise InputError(f"{source}: expected an end-of-sequence token, found none")
    special = [token.content for token in backend.get_added_tokens_decoder().values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        pad_token=choose_pad(source, special, taken={bos, eos}, unk=unk, pad=pad),
        add_bos_token=add_bos and bos is not None,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


def choose_pad(
    source: Path, special: list[str], taken: set[str | None], unk: str | None, pad: str | None
) -> str:
    """The padding token: one in the vocabulary, and never the end of an answer.

    In order: the model's own `pad` if it is not one of `taken` (bos and eos), a special token named
    for padding, the unknown token (as Vicuna's training did with LLaMA), a reserved token, any
    other special token. Padding is recognized by its position, never by its id, so that a real
    unknown token is still attended to and learned.
    """
    named = [token for token in special if "pad" in token.lower()]
    reserved = [token for token in special if "reserved" in token]
    for token in [pad, *named, unk, *reserved, *special]:
        if token is not None and token not in taken:
            return token
    raise InputError(f"{source}: expected a special token besides bos and eos for padding")


def _from_sentencepiece(path: Path) -> ConvertedTokenizer:
    import sentencepiece

    try:
        original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise InputError(
            f"{path}: expected a SentencePiece model or a tiktoken vocabulary, found neither"
        ) from error
    ids = range(original.vocab_size())
    pieces = [original.id_to_piece(id) for id in ids]
    backend = sentencepiece_bpe(
        pieces,
        [original.get_score(id) for id in ids],
        [_sentencepiece_kind(original, id) for id in ids],
    )
    for text in PROBES:
        if backend.encode(text, add_special_tokens=False).ids != original.encode(text):
            raise InputError(
                f"{path}: expected byte-pair SentencePiece that leaves text as it is, like "
                f"LLaMA's; the ids of {text!r} differ after conversion"
            )
    bos, eos, unk, pad = (
        pieces[id] if id >= 0 else None
        for id in (original.bos_id(), original.eos_id(), original.unk_id(), original.pad_id())
    )
    tokenizer = finish(backend, path, bos=bos, eos=eos, unk=unk, pad=pad)
    return ConvertedTokenizer(tokenizer, [tokenizer.eos_token_id], byte_level=False)


def _sentencepiece_kind(original, id: int) -> int:
    tests = [
        (original.is_unknown, UNKNOWN),
        (original.is_control, CONTROL),
        (original.is_unused, UNUSED),
        (original.is_byte, BYTE),
    ]
    return next((kind for test, kind in tests if test(id)), NORMAL)


def _read_tiktoken(path: Path) -> dict[bytes, int] | None:
    """The lines `base64(token) rank` of a tiktoken file; None if it is not one."""
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split(b" ")
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        return None
    return ranks if sorted(ranks.values()) == list(range(len(ranks))) and ranks else None


def _from_tiktoken(path: Path, ranks: dict[bytes, int], scaled_rope: bool) -> ConvertedTokenizer:
    alphabet = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    merges = sorted(
        (rank, ranks[token[:cut]], ranks[token[cut:]])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    )
    tokens = [spell(token) for token in sorted(ranks, key=ranks.get)]
    special = llama3_special_tokens(scaled_rope)
    backend = byte_level_bpe(
        tokens + special,
        [(tokens[left], tokens[right]) for _, left, right in merges],
        [NORMAL] * len(tokens) + [CONTROL] * len(special),
        llama3_pre_tokenizer(),
        ignore_merges=True,
    )
    tokenizer = finish(
        backend,
        path,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        # Llama 3.0 has no name for the id that Llama 3.1 made its padding token.
        pad="<|finetune_right_pad_id|>" if scaled_rope else "<|reserved_special_token_2|>",
    )
    # An instruction-tuned checkpoint looks like any other, but ends its turns with <|eot_id|> and
    # its messages with <|eom_id|>; a base model never writes them.
    stops = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    stop_ids = [id for id in tokenizer.convert_tokens_to_ids(stops) if id is not None]
    return ConvertedTokenizer(tokenizer, stop_ids, byte_level=True)


def llama3_special_tokens(scaled_rope: bool) -> list[str]:
    """The 256 special tokens of Llama 3.0, or of 3.1 and later (`scaled_rope`), in id order."""
    named = {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: "<|eot_id|>",
    }
    if scaled_rope:
        named |= {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
    reserved = (f"<|reserved_special_token_{number}|>" for number in range(256))
    return [named.get(position) or next(reserved) for position in range(256)]


def _add_tokens(backend: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Have the vocabulary's special and user-defined tokens recognized whole in a text."""
    of_kind = list(zip(tokens, kinds, strict=True))
    special = [t for t, kind in of_kind if kind in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    backend.add_tokens(
        [AddedToken(t, normalized=False) for t, kind in of_kind if kind == USER_DEFINED]
    )
