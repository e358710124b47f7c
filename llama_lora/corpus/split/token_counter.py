"""Counting the tokens of texts several times as fast as by tokenizing them.

Texts repeat a few words often. If no token of the vocabulary reaches from one word into the next,
each word is tokenized once and its length remembered: byte-pair merges and the Unigram model never
look across a place that no token spans. In the vocabularies in use this holds between a visible
character and a space, and in most between a letter or digit and the punctuation after it.
"""

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from tokenizers import Encoding, Tokenizer

KNOWN = 200_000  # words whose length is remembered, about 30 MB
LONGEST = 40  # characters of a word worth remembering; a longer one rarely comes again

# Two ways to cut words, each with a pattern for tokens that reach over the end of a word and one
# for a word. A word ends between a visible ASCII character and a space. In the first way it also
# ends between an ASCII letter or digit and another ASCII character, except the apostrophe, since
# there are tokens like "n't".
RUN = r"[^ A-Za-z0-9]*+[A-Za-z0-9]*+"
CUTS = [
    (
        re.compile(r"[!-~] |[A-Za-z0-9][^A-Za-z0-9'\x80-\U0010ffff]"),
        rf" *+{RUN}(?:(?:['\x80-\U0010ffff]|(?<=[^!-~]) ++){RUN})*+",
    ),
    (re.compile(r"[!-~] "), r" *+[^ ]*+(?:(?<=[^!-~]) ++[^ ]*+)*+"),
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
        self.letter = len(self.encode("a"))
        self.lengths = WordLengths(lambda word: len(self.encode("a" + word)) - self.letter)
        self.starts = lru_cache(32)(self.starts)  # cuts fall close to each other
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

    def length_with(self, text: str, parts: list["Part"]) -> int:
        """`length` of a text in which `parts` of measured texts stand, in this order.

        Only what is around them, and the words at their ends, is counted. A part that does not
        stand there is passed over.
        """
        total = done = 0
        for part in parts:
            first, last = part.inner_words()
            at = text.find(part.text, done) if first < last else -1
            if at >= 0:
                places, totals, begin = part.measured.places, part.measured.totals, at - part.start
                total += self.length_from(text, done, begin + places[first])
                total += totals[last] - totals[first]
                done = begin + places[last]
        return total + self.length_from(text, done, len(text))

    def length_from(self, text: str, begin: int, end: int) -> int:
        """How many tokens `text` has between the beginnings of two words."""
        if begin == 0:
            return self.length(text[:end])
        return self.length("a" + text[begin:end]) - self.letter

    def measure(self, text: str) -> "MeasuredText":
        """The places of the tokens of `text`."""
        if not self.by_words:
            return MeasuredText(text, [text], [len(self.encode(text))], self.starts)
        words: list[str] = []
        lengths: list[int] = []
        for first, others in self.stretches(text):
            words.append(first)
            words += others
            lengths.append(self.first_lengths[first])
            lengths += map(self.lengths.__getitem__, others)
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
                others = self.word.findall(text, first.end(), end)
                others.pop()  # the last is empty
                yield first[0], others
            begin = end

    def starts(self, word: str, first: bool) -> list[int]:
        """The characters at which the tokens of a word start, if it is the `first` of a text."""
        if first or self.added.match(word):
            return [start for start, _ in self.encode(word).offsets]
        return [start - 1 for start, _ in self.encode("a" + word).offsets[self.letter :]]

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
        self.text, self.starts = text, starts
        # The character at which each word begins and the tokens before it, and the ends of both.
        self.places = array("I", accumulate(map(len, words), initial=0))
        self.totals = array("I", accumulate(lengths, initial=0))

    def __len__(self) -> int:
        """How many tokens there are."""
        return self.totals[-1]

    @property
    def whole(self) -> "Part":
        return Part(self, 0, len(self.text))

    def place(self, token: int) -> int:
        """The character at which the `token`-th token starts, from 0; the end if there is none."""
        if token >= len(self):
            return len(self.text)
        number = bisect_right(self.totals, token) - 1
        return self.places[number] + self.starts_in(number)[token - self.totals[number]]

    def before(self, place: int) -> int:
        """How many tokens start before the character `place`."""
        number = bisect_left(self.places, place) - 1
        if number < 0:
            return 0
        return self.totals[number] + bisect_left(
            self.starts_in(number), place - self.places[number]
        )

    def starts_in(self, number: int) -> list[int]:
        """The characters of the `number`-th word at which its tokens start."""
        word = self.text[self.places[number] : self.places[number + 1]]
        return self.starts(word, number == 0)


class Part(NamedTuple):
    """The characters of a measured text from `start` to `end`."""

    measured: MeasuredText
    start: int
    end: int

    @property
    def text(self) -> str:
        return self.measured.text[self.start : self.end]

    def inner_words(self) -> tuple[int, int]:
        """The numbers of the first and the last whole word that something stands before."""
        places = self.measured.places
        return bisect_right(places, self.start), bisect_right(places, self.end) - 2


def vocabulary(tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each token in the vocabulary, without the added ones."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    decoder = tokenizer.decoder
    for token in tokenizer.get_vocab(with_added_tokens=False):
        if token not in added:
            yield decoder.decode([token]) if decoder else token
