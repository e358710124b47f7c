"""Counting the tokens of texts several times as fast as by tokenizing them.

Texts repeat a few words often. If no token of the vocabulary reaches from one word into the next,
each word is tokenized once and its length remembered: byte-pair merges and the Unigram model never
look across a place that no token spans. In the vocabularies in use this holds between a visible
character and a space, and in most between a letter or digit and the punctuation after it.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from tokenizers import Encoding, Tokenizer

KNOWN = 200_000  # words whose length is remembered, about 30 MB
LONGEST = 40  # characters of a word worth remembering; a longer one rarely comes again

# Two ways to cut words, each with a pattern for tokens that reach over the end of a word and one
# for a word. A word ends between a visible ASCII character and a space. In the first way it also
# ends between an ASCII letter or digit and another ASCII character, except the apostrophe, since
# there are tokens like "n't".
RUN = r"[^ A-Za-z0-9]*[A-Za-z0-9]*"
CUTS = [
    (
        re.compile(r"[!-~] |[A-Za-z0-9][^A-Za-z0-9'\x80-\U0010ffff]"),
        rf" *{RUN}(?:(?:(?<=[A-Za-z0-9])['\x80-\U0010ffff]|(?<=[^!-~]) +){RUN})*",
    ),
    (re.compile(r"[!-~] "), r" *[^ ]*(?:(?<=[^!-~]) +[^ ]*)*"),
]

# The vocabulary alone does not decide how texts are cut, so a tokenizer has to prove that for this
# text the words add up to the whole.
SAMPLE = (
    "It's naïve,  isn't it?\n\nYes;\tdo_that(x, 12345)  # “quoted” …\n    return a[1:-1]\r\n"
    "你好，世界。Hello 世界 and 12 naïve cafés! \n \n* <b>été</b>: https://a.b/c?d=e&f ÀÉ 👍🏽 ok\n"
)


class TokenCounter:
    """Counts the tokens that `tokenizer` makes of texts, without added special tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = list(tokenizer.get_added_tokens_decoder().values())
        names = sorted((token.content for token in added), key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self.first_lengths = WordLengths(lambda word: len(self.encode(word)))
        # With a letter before it, a word is not tokenized like the first of a text.
        alone = len(self.encode("a"))
        self.lengths = WordLengths(lambda word: len(self.encode("a" + word)) - alone)
        self.by_words = not any(
            token.lstrip or token.rstrip or token.single_word for token in added
        ) and any(self.choose_word(over, word) for over, word in CUTS)

    def choose_word(self, over: re.Pattern, word: str) -> bool:
        """From now on count by words that match `word`; returns whether that is exact."""
        self.first_word = re.compile(f"(?:{self.added.pattern})?{word}")
        self.word = re.compile(word)
        if any(map(over.search, vocabulary(self.tokenizer))):
            return False
        return self.sum_of_words(SAMPLE) == len(self.encode(SAMPLE))

    def length(self, text: str) -> int:
        """How many tokens `text` has."""
        return self.sum_of_words(text) if self.by_words else len(self.encode(text))

    def measure(self, text: str) -> "MeasuredText":
        """The places of the tokens of `text`."""
        if not self.by_words:
            return MeasuredText(text, [text], [len(self.encode(text))], self.starts)
        words: list[str] = []
        lengths: list[int] = []
        for first, others in self.stretches(text):
            words += first, *others
            lengths += self.first_lengths[first], *map(self.lengths.__getitem__, others)
        return MeasuredText(text, words, lengths, self.starts)

    def sum_of_words(self, text: str) -> int:
        return sum(
            self.first_lengths[first] + sum(map(self.lengths.__getitem__, others))
            for first, others in self.stretches(text)
        )

    def stretches(self, text: str) -> Iterator[tuple[str, list[str]]]:
        """The first word and the other words of each stretch of `text`.

        A stretch begins with an added token, such as the one that ends an answer: text is cut there
        before anything else.
        """
        begin = 0
        for end in [*(found.start() for found in self.added.finditer(text)), len(text)]:
            if begin < end:
                first = self.first_word.match(text, begin, end)
                yield first[0], self.word.findall(text, first.end(), end)
            begin = end

    def starts(self, word: str, number: int) -> list[int]:
        """The characters at which the tokens of the `number`-th word of a text start."""
        before = "" if number == 0 or self.added.match(word) else "a"
        offsets = self.encode(before + word).offsets[len(self.encode(before)) :]
        return [start - len(before) for start, _ in offsets]

    def encode(self, text: str) -> Encoding:
        return self.tokenizer.encode(text, add_special_tokens=False)


class WordLengths(dict[str, int]):
    """The lengths of words, each counted when it is first asked for."""

    def __init__(self, find: Callable[[str], int]):
        super().__init__()
        self.find = find

    def __missing__(self, word: str) -> int:
        length = self.find(word)
        if len(word) <= LONGEST:
            if len(self) == KNOWN:
                self.clear()
            self[word] = length
        return length


class MeasuredText:
    """A text in words, and the places of its tokens."""

    def __init__(self, text: str, words: list[str], lengths: list[int], starts: Callable):
        self.text, self.words = text, words
        self.starts = lru_cache(8)(starts)  # cuts fall close to each other
        self.places = np.cumsum([0, *map(len, words)])  # the character at which each word begins
        self.totals = np.cumsum([0, *lengths])  # and the tokens before it

    def __len__(self) -> int:
        """How many tokens there are."""
        return int(self.totals[-1])

    def place(self, token: int) -> int:
        """The character at which the `token`-th token starts, from 0; the end if there is none."""
        if token >= len(self):
            return len(self.text)
        number = int(np.searchsorted(self.totals, token, "right")) - 1
        starts = self.starts(self.words[number], number)
        return int(self.places[number]) + starts[token - int(self.totals[number])]

    def before(self, place: int) -> int:
        """How many tokens start before the character `place`."""
        number = int(np.searchsorted(self.places, place, "left")) - 1
        if number < 0:
            return 0
        starts = self.starts(self.words[number], number)
        return int(self.totals[number]) + bisect_left(starts, place - int(self.places[number]))


def vocabulary(tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each token in the vocabulary, without the added ones."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    decoder = tokenizer.decoder
    for token in tokenizer.get_vocab(with_added_tokens=False):
        if token not in added:
            yield decoder.decode([token]) if decoder else token
