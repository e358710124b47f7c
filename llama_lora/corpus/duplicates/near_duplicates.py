"""Near duplicates: signatures of conversations, and which of them are similar.

Similarity is the Jaccard similarity of two conversations' shingles (five words in a row): of all
shingles that are in either, the share that is in both. A MinHash signature estimates it (Broder
1997, "On the resemblance and containment of documents"), and hashing the signatures in bands finds
the pairs worth comparing (Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", chapter 3).
"""

import re
from zlib import crc32

import numpy as np

from llama_lora.corpus.records.conversation import SYSTEM, Turn

SHINGLE = 5  # words
PERMUTATIONS = 128  # numbers in a signature; the estimate's standard error is 0.03 at 0.85
SEED = 1
BATCH = 2048  # shingles at a time: their hashes under all permutations fill a megabyte
RECALL = 0.99  # of the pairs that are exactly as similar as the threshold
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio: it spreads hashes evenly

# Thai, Lao, Burmese, Khmer, Chinese and Japanese are written without spaces: there, a character
# counts as a word.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u9fff"
UNSPACED += "\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


class MinHasher:
    """Makes signatures, the same for the same text on every machine and in every process."""

    def __init__(self):
        from datasketch import MinHash

        self.empty = MinHash(PERMUTATIONS, SEED, hashfunc=int)

    def __call__(self, turns: list[Turn]) -> bytes:
        """The signature of the questions and answers: `PERMUTATIONS` unsigned 32-bit numbers.

        System turns do not count: many conversations with nothing else in common share one.
        """
        text = "\n".join(turn["value"] for turn in turns if turn["from"] != SYSTEM).lower()
        signature = self.empty.copy()
        hashes = shingles(WORD.findall(text) or text.split())
        for start in range(0, len(hashes), BATCH):
            signature.update_batch(hashes[start : start + BATCH].tolist())
        return signature.digest().tobytes()


def shingles(words: list[str]) -> np.ndarray:
    """A 32-bit hash of each `SHINGLE` words in a row; a single hash if there are fewer words."""
    hashes = np.fromiter(map(crc32, map(str.encode, words)), np.uint64, len(words))
    span = min(SHINGLE, len(words))
    count = len(words) - span + 1
    mixed = np.zeros(count, np.uint64)
    for start in range(span):
        mixed = (mixed + hashes[start : start + count]) * MULTIPLIER
    return mixed >> np.uint64(32)


class SimilarityIndex:
    """Finds which of many conversations are similar, by their signatures.

    datasketch's own index keeps a Python set for each hash of each band, ten times the memory of
    the signatures; here a band is two arrays of row numbers.
    """

    def __init__(self, signatures: bytes, threshold: float):
        self.signatures = np.frombuffer(signatures, np.uint32).reshape(-1, PERMUTATIONS)
        self.threshold = threshold
        rows, bands = band_shape(threshold)
        self.bands = [
            Band(self.signatures[:, start : start + rows]) for start in range(0, rows * bands, rows)
        ]

    def __len__(self) -> int:
        return len(self.signatures)

    def to(self, index: int, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which conversations are at least `threshold` similar to `index`, and how similar each is.

        Only those that are true in `among`, a boolean for each conversation, count.
        """
        found = np.concatenate([band.beside(index) for band in self.bands])
        found = np.unique(found[among[found]])
        similarity = (self.signatures[found] == self.signatures[index]).mean(axis=1)
        enough = similarity >= self.threshold
        return found[enough], similarity[enough]


class Band:
    """The conversations, indexed by one band of their signatures."""

    def __init__(self, columns: np.ndarray):
        keys = np.ascontiguousarray(columns).view(f"V{4 * columns.shape[1]}").ravel()
        _, keys, counts = np.unique(keys, return_inverse=True, return_counts=True)
        self.keys = keys.astype(np.uint32)
        self.ends = np.cumsum(counts, dtype=np.uint32)
        self.order = np.argsort(keys, kind="stable").astype(np.uint32)

    def beside(self, index: int) -> np.ndarray:
        """All that agree with `index` in this band, including itself."""
        key = self.keys[index]
        return self.order[self.ends[key - 1] if key else 0 : self.ends[key]]


def band_shape(threshold: float) -> tuple[int, int]:
    """Rows per band and number of bands: the longest bands that still reach `RECALL`.

    Two conversations of similarity `s` agree in a band of `r` rows with probability `s ** r`.
    """
    fits = (
        rows
        for rows in range(1, PERMUTATIONS + 1)
        if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= RECALL
    )
    rows = max(fits, default=1)
    return rows, PERMUTATIONS // rows
