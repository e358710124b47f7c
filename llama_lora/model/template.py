"""The one prompt: splitting counts it, training labels it, generation asks it, adapters keep it."""

import json
import re
from copy import copy
from itertools import chain
from pathlib import Path

from llama_lora.cli import InputError
from llama_lora.model.labels import Encoded, answer_spans, labels_of
from llama_lora.text import cause

# `vicuna_v1.1` as a Jinja chat template. After an optional bos it is, character for character,
# fastchat.conversation.get_conv_template("vicuna_v1.1") with the tokenizer's own end-of-sequence
# token in place of "</s>" (for Llama 1 and 2 they are the same).
VICUNA_V1_1 = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}"
    "{%- set system = 'A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' -%}"
    "{%- set turns = messages -%}"
    "{%- endif -%}"
    "{{ system + ' ' }}"
    "{%- for turn in turns -%}"
    "{%- if turn['role'] == 'user' -%}{{ 'USER: ' + turn['content'] + ' ' }}"
    "{%- else -%}{{ 'ASSISTANT: ' + turn['content'] + eos_token }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)

HOLE = "\0"  # stands for the text of a turn
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class Template:
    """Renders corpus turns with a tokenizer's chat template and knows which tokens are answers.

    `name` is "vicuna_v1.1", or "model" for the chat template that the tokenizer's folder holds (a
    base's own, or the one an adapter was trained with). `special` finds the special tokens that a
    text spells out.
    """

    def __init__(self, tokenizer, name: str = "vicuna_v1.1"):
        if not tokenizer.is_fast:
            raise InputError(
                f"{tokenizer.name_or_path}: a fast tokenizer (tokenizer.json) is needed to place "
                f"labels; found {type(tokenizer).__name__}"
            )
        self.name = name
        self.tokenizer = copy(tokenizer)
        self.jinja = self._jinja(name)
        self.tokenizer.chat_template = self.jinja  # so it is saved with the tokenizer
        self._special_ids = set(tokenizer.all_special_ids) | {
            id for id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        names = tokenizer.convert_ids_to_tokens(sorted(self._special_ids))
        longest_first = sorted(names, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)))
        self._known_frames: dict[tuple[str, ...], list[str]] = {}

    def encode(self, turns: list[dict], **marks) -> Encoded:
        """As `encode_batch`, for one conversation: its turns, `label_from` and `unfinished`."""
        return self.encode_batch([{"conversations": turns, **marks}])[0]

    def encode_batch(self, conversations: list[dict]) -> list[Encoded]:
        """Render and tokenize conversations; label every answer and the token that ends it.

        Each is `{"conversations": [{"from": …, "value": …}, …]}`. It may hold `label_from`: the
        character of its last answer at which labels begin (the text before is context that an
        earlier piece has labelled). It may hold `unfinished`: whether the last answer continues in
        another piece, so that its end is not learned.
        """
        rendered = [self.render(item["conversations"]) for item in conversations]
        tokens = self.tokenizer(
            [text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True
        )
        encoded = []
        for item, (text, spans), ids, offsets in zip(
            conversations, rendered, tokens["input_ids"], tokens["offset_mapping"], strict=True
        ):
            spans = answer_spans(item, text, spans)
            unfinished, whose = item.get("unfinished", False), self.tokenizer.name_or_path
            labels = labels_of(ids, offsets, spans, self._special_ids, unfinished, whose)
            encoded.append(Encoded(ids, labels))
        return encoded

    def render(self, turns: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and each answer's span of characters in it.

        A span begins where a generation prompt would end, and ends where the next turn begins. So
        it is what the model itself has to write, whatever the template.
        """
        messages = _messages(turns)
        text = self._apply(messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._apply(messages[:i], add_generation_prompt=True)
            answered = text if i + 1 == len(messages) else self._apply(messages[: i + 1])
            if not (text.startswith(answered) and answered.startswith(prompt)):
                raise InputError(
                    f"{self.tokenizer.name_or_path}: its chat template renders turn {i} "
                    "differently once later turns follow; use --template vicuna_v1.1"
                )
            spans.append((len(prompt), len(answered)))
        return text, spans

    def spells_special(self, turns: list[dict]) -> bool:
        """Whether a turn spells out a special token ("</s>"), which is then read as that token."""
        return any(self.special.search(turn["value"]) for turn in turns)

    def text(self, turns: list[dict]) -> str:
        """The conversation as text."""
        if not self.jinja.endswith(VICUNA_V1_1):
            return self._apply(_messages(turns))
        # This template puts the texts in as they are, so joining them with what it puts around
        # them is the same, and several times as fast.
        frames = self._frames(tuple(turn["from"] for turn in turns))
        values = [turn["value"] for turn in turns]
        return "".join(chain.from_iterable(zip(frames, [*values, ""], strict=True)))

    def _frames(self, roles: tuple[str, ...]) -> list[str]:
        """What the template puts before, between and after texts of these roles."""
        if roles not in self._known_frames:
            holes = [{"from": role, "value": HOLE} for role in roles]
            self._known_frames[roles] = self._apply(_messages(holes)).split(HOLE)
        return self._known_frames[roles]

    def prompt(self, turns: list[dict]) -> str:
        """The text after which the model writes the next answer."""
        return self._apply(_messages(turns), add_generation_prompt=True)

    def prompt_ids(self, turns: list[dict]) -> list[int]:
        """`prompt` as token ids."""
        return self.tokenizer(self.prompt(turns), add_special_tokens=False)["input_ids"]

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the template's end-of-answer token and the tokenizer's eos."""
        ends = [label for label in self._probe().labels if label in self._special_ids]
        return sorted({*ends[-1:], self.tokenizer.eos_token_id} - {None})

    @property
    def highest_id(self) -> int:
        """The largest token id that the template itself uses, whatever the conversation."""
        return max(self._probe().ids)

    def check_rows(self, rows: int, base) -> None:
        """Check that the `rows` of embeddings of `base` cover the tokens that the template itself
        uses.

        Tokens beyond them do no harm if nothing uses them.

        Raises:
            InputError: they do not.
        """
        if self.highest_id >= rows:
            raise InputError(
                f"{self.tokenizer.name_or_path}: its tokenizer has {len(self.tokenizer):,} tokens, "
                f"and its template uses number {self.highest_id:,}; the base {base} has only "
                f"{rows:,}"
            )

    def check_ids(self, ids, rows: int, whose: str) -> None:
        """Raise `InputError` if some of the token ids are beyond a base's `rows` of embeddings.

        The message says `whose` tokens they are.
        """
        if beyond := [int(id) for id in ids if id >= rows]:
            token = self.tokenizer.convert_ids_to_tokens(beyond[0])
            raise InputError(
                f"{whose} holds the token {token!r}, number {beyond[0]:,} of the tokenizer in "
                f"{self.tokenizer.name_or_path}, for which the base has no embedding: it has "
                f"{rows:,}"
            )

    def _probe(self) -> Encoded:
        return self.encode([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}])

    def _jinja(self, name: str) -> str:
        if name == "vicuna_v1.1":
            adds_bos = self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
            return ("{{ bos_token }}" if adds_bos else "") + VICUNA_V1_1
        if not self.tokenizer.chat_template:
            raise InputError(
                f"{self.tokenizer.name_or_path}: no chat template in this folder; "
                "use --template vicuna_v1.1"
            )
        return self.tokenizer.chat_template

    def _apply(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.jinja,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except TemplateError as error:
            raise InputError(
                f"{self.tokenizer.name_or_path}: its chat template refuses the roles "
                f"{[message['role'] for message in messages]}: {error}"
            ) from error


def has_tokenizer(folder) -> bool:
    """Whether a model or adapter folder holds a tokenizer."""
    return (Path(folder) / "tokenizer_config.json").is_file()


def load_template(folder, name: str = "auto") -> Template:
    """The template for a folder with a tokenizer; "auto" takes the folder's own, else vicuna_v1.1.

    Raises:
        InputError: there is no usable tokenizer, or no chat template for "model".
    """
    tokenizer = load_tokenizer(folder)
    if name == "auto":
        name = "model" if tokenizer.chat_template else "vicuna_v1.1"
    return Template(tokenizer, name)


def load_tokenizer(folder):
    """The tokenizer of a model or adapter folder, with a padding token that is never eos.

    Raises:
        InputError: there is no such folder, or no tokenizer in it that works without code of its
            own.
    """
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder, expected a model folder")
    try:
        tokenizer = _tokenizer_class(Path(folder)).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no usable tokenizer here: {cause(error)}") from error
    if tokenizer.eos_token is None:
        raise InputError(f"{folder}: its tokenizer names no end-of-sequence token")
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # Padding is masked by position, never by id, so any other token serves; unk is fschat's.
        candidates = tokenizer.unk_token, tokenizer.bos_token, tokenizer.convert_ids_to_tokens(0)
        tokenizer.pad_token = next(t for t in candidates if t not in (None, tokenizer.eos_token))
    tokenizer.padding_side = "right"
    return tokenizer


def _tokenizer_class(folder: Path):
    """The class whose `from_pretrained` does for `folder` what AutoTokenizer's does.

    AutoTokenizer itself imports torch, which costs every process 250 MB and some seconds. For the
    folders of Llamas and adapters, its choice can be told without it.
    """
    import transformers

    named = str(_settings(folder / "tokenizer_config.json").get("tokenizer_class"))
    if _settings(folder / "config.json").get("model_type", "llama") == "llama":
        file = folder / "tokenizer.json"
        # A Llama 3 may claim to have Llama 2's tokenizer.
        if named.startswith("LlamaTokenizer") and not _holds(file, b'"ByteLevel"'):
            return transformers.LlamaTokenizer
        light = named in ("TokenizersBackend", "PreTrainedTokenizerFast")
        if file.is_file() and (light or named.startswith("LlamaTokenizer")):
            return transformers.PreTrainedTokenizerFast
    return transformers.AutoTokenizer


def _settings(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _holds(file: Path, text: bytes) -> bool:
    return file.is_file() and text in file.read_bytes()


def _messages(turns: list[dict]) -> list[dict]:
    return [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
