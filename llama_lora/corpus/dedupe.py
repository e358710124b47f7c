"""Duplicates: of equal conversations one stays, and one that goes on stands for its beginning."""

from llama_lora.corpus.output import Arrangement, Stored


def without_duplicates(stored: list[Stored], out: str) -> Arrangement:
    """Reject what equals an earlier conversation, or is how a longer one begins."""
    beginnings = {digest for one in stored for digest in one.digests if digest != one.digest}
    rejected: dict[int, str] = {}
    seen: set[bytes] = set()
    for index, one in enumerate(stored):
        if one.digest in beginnings:
            rejected[index] = "beginning of a longer one"
        elif one.digest in seen:
            rejected[index] = "duplicate"
        seen.add(one.digest)
    return Arrangement({out: [i for i in range(len(stored)) if i not in rejected]}, rejected)
