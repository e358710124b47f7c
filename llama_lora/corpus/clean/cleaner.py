"""Cleaning: raw exports become well-formed conversations in Markdown; all that goes is counted."""

import re
from collections import Counter
from dataclasses import dataclass

from llama_lora.cli import InputError
from llama_lora.corpus.clean.html_to_markdown import is_chatgpt_html, to_markdown
from llama_lora.corpus.language.chinese import TRADITIONAL, to_simplified
from llama_lora.corpus.language.filter import detect
from llama_lora.corpus.language.prose import prose, without_code
from llama_lora.corpus.records.conversation import (
    GPT,
    SYSTEM,
    Conversation,
    Kept,
    Rejected,
    Turn,
    put_in_order,
)

# An assistant that claims to be another one. What it says about others is fine, and so is anyone
# else with the name: "I am Claude" must be a whole sentence, or say that an assistant speaks. What
# begins a quotation is said by somebody else.
CHATBOTS = r"(?:ChatGPT|GPT-?[345](?:\.5)?(?:-?turbo)?)"
NAMESAKES = "(?:Bard|Bing|Claude|Gemini|Copilot)"
ASSISTANTS = f"(?:{CHATBOTS}|{NAMESAKES})"
MAKERS = r"(?:Open[ \n]?AI|Anthropic|Google|Microsoft|Meta)"
MADE = r"(?:trained|created|developed|made|built|designed|programmed)"
MADE_IN_CHINESE = "(?:开发|训练|创建|创造|研发|開發|訓練|創建|創造|研發)"
MODEL = (
    r"(?:(?:large|virtual|helpful|friendly|powerful|advanced|conversational|multimodal|artificial"
    r"|intelligence|intelligent|language|chat|AI)[\s-]+){0,5}"
    r"(?:AI|model|assistant|chatbot|bot|program|system)"
)
MADE_BY = (
    rf",?\s+(?:(?:that|which|was|is|has|been|called|named|and|{MADE}|{ASSISTANTS},?)\s+){{0,6}}"
    rf"{MADE}\s+by\s+{MAKERS}"
)
I_AM = r"(?:I am|I['’]m|my name is|soy|je suis|ich bin|sono|eu sou|sou|ik ben|я|أنا)"
STARTS = r"(?:(?<![^\n])|(?<=[.!?…]\s)|(?<=\bhello,\s)|(?<=\bhi,\s))"
ENDS = rf"(?=[ \t]*(?:[.!…\n]|\Z)|,?\s+an?\s+{MODEL}\b|,?\s+(?:made\s+)?(?:by|from)\s+{MAKERS})"
UNQUOTED = "(?<!['\"“‘«„「『])"
CLAIMS = [
    rf"{I_AM}\s+{CHATBOTS}",
    rf"{STARTS}{I_AM}\s+{NAMESAKES}{ENDS}",
    rf"as\s+{ASSISTANTS},\s+(?:I|my)",
    rf"(?:I am|I['’]m)\s+an?\s+{MODEL}{MADE_BY}",
    rf"as\s+an?\s+{MODEL}{MADE_BY},?\s+(?:I|my)",
    rf"I\s+(?:was|am|have been)\s+{MADE}\s+by\s+{MAKERS}",
    rf"(?:我是|我叫|作[为為]){ASSISTANTS}",
    rf"我[是由][^。！？\n]{{0,30}}{MAKERS}[^。！？\n]{{0,10}}{MADE_IN_CHINESE}",
    rf"(?:私|わたし|僕)は、?\s*{ASSISTANTS}",
    rf"(?:저는|나는|제 이름은)\s*{ASSISTANTS}",
]
# Every claim contains one of these; looking for them first is ten times faster than the patterns.
CLAIM_WORDS = ["gpt", "bard", "bing", "claude", "gemini", "copilot", "openai", "open ai"]
CLAIM_WORDS += ["anthropic", "google", "microsoft", "meta"]
# Chinese and Japanese run words together, so only letters of other scripts continue a word.
SAME_WORD = r"[^\W\u2e80-\uffff]"


@dataclass
class BlockedPhrases:
    """What no answer may say: a pattern, and words of which every match contains at least one."""

    pattern: re.Pattern
    words: list[str]

    def search(self, text: str) -> re.Match | None:
        """The first match in `text` outside of code."""
        lower = text.lower().replace("\n", " ")
        if not any(word in lower for word in self.words):
            return None
        return self.pattern.search(without_code(text))


@dataclass
class Cleaner:
    """Cleans one conversation; with `simplified`, traditional Chinese becomes simplified."""

    blocked: BlockedPhrases | None
    simplified: bool = False

    def __call__(self, conversation: Conversation) -> Kept:
        repairs, seen = Counter(), Counter()
        turns = without_empty_repeats(conversation["conversations"], repairs)
        turns = put_in_order(turns, repairs)
        turns = [cleaned(turn, seen) for turn in turns]
        turns, dropped = without_empty_pairs(turns)
        if self.simplified:
            turns = [in_simplified_chinese(turn, repairs) for turn in turns]
        if self.blocked:
            for turn in turns:
                self.check(turn)
        return Kept([{**conversation, "conversations": turns}], dropped, repairs, seen)

    def check(self, turn: Turn) -> None:
        """Raise `Rejected` if an answer says what is blocked, outside of code."""
        if turn["from"] == GPT and (found := self.blocked.search(turn["value"])):
            raise Rejected("blocked phrase", " ".join(found[0].split()))


def cleaned(turn: Turn, seen: Counter) -> Turn:
    """The turn as Markdown if it is ChatGPT's HTML; else unchanged, except for line endings."""
    text = turn["value"]
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if is_chatgpt_html(text):
        text = to_markdown(text)
        seen["turns converted from HTML"] += 1
    return {**turn, "value": without_outer_blank_lines(text)}


def without_outer_blank_lines(text: str) -> str:
    """`text` without blank lines at its beginning and end; indentation stays."""
    if len(text.strip()) == len(text):
        return text
    inner = text.lstrip()
    text = text[: len(text) - len(inner)].rpartition("\n")[2] + inner
    inner = text.rstrip()
    return inner + text[len(inner) :].partition("\n")[0] if inner else ""


def without_empty_repeats(turns: list[Turn], repairs: Counter) -> list[Turn]:
    """The turns without the empty ones next to another turn of the same role."""
    kept: list[Turn] = []
    for turn in turns:
        if not kept or kept[-1]["from"] != turn["from"]:
            kept.append(turn)
        elif is_empty(kept[-1]):
            kept[-1] = turn
        elif not is_empty(turn):
            kept.append(turn)
    repairs["empty turns"] += len(turns) - len(kept)
    return kept


def in_simplified_chinese(turn: Turn, repairs: Counter) -> Turn:
    """The turn in simplified Chinese, if it is in traditional; code and addresses stay."""
    text = turn["value"]
    if text.isascii() or detect(prose(text)) != TRADITIONAL:
        return turn
    simplified = to_simplified(text)
    repairs["turns in traditional Chinese"] += simplified != text
    return {**turn, "value": simplified}


def without_empty_pairs(turns: list[Turn]) -> tuple[list[Turn], Counter]:
    """The turns without pairs that lack a question or an answer, and counts of those by reason."""
    head = [turn for turn in turns[:1] if turn["from"] == SYSTEM]
    dropped: Counter = Counter()
    kept = [turn for turn in head if not is_empty(turn)]
    body = turns[len(head) :]
    for question, answer in zip(body[::2], body[1::2], strict=True):
        if is_empty(question):
            dropped["empty question"] += 1
        elif is_empty(answer):
            dropped["empty answer"] += 1
        else:
            kept += question, answer
    if len(kept) < 2:
        raise Rejected("empty")
    return kept, dropped


def is_empty(turn: Turn) -> bool:
    """Whether it shows nothing."""
    return not any(char.isprintable() and not char.isspace() for char in turn["value"])


def blocked_phrases(path: str | None) -> BlockedPhrases | None:
    """The phrases in the file at `path`; without a path, claims to be another assistant.

    Each line is a phrase. It matches at word boundaries, whatever the case and spacing. A line that
    starts with `#` is a comment. A file without phrases blocks nothing.
    """
    if path is None:
        return BlockedPhrases(either([UNQUOTED + claim for claim in CLAIMS]), CLAIM_WORDS)
    try:
        with open(path, encoding="utf-8-sig") as file:
            phrases = [line.split() for line in file if not line.lstrip().startswith("#")]
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text, expected one phrase a line") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    phrases = list(filter(None, phrases))
    if not phrases:
        return None
    pattern = either([r"\s+".join(map(re.escape, words)) for words in phrases])
    return BlockedPhrases(pattern, [max(words, key=len).lower() for words in phrases])


def either(patterns: list[str]) -> re.Pattern:
    """One pattern that matches any of them at word boundaries."""
    whole = "|".join(patterns)
    return re.compile(rf"(?<!{SAME_WORD})(?:{whole})(?!{SAME_WORD})", re.IGNORECASE)
