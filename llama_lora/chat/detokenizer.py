"""Token ids in, whole characters out."""

REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are not, or not yet, a character


class Detokenizer:
    """The text of an answer as its tokens come.

    A token may hold part of a character, and decoding one alone may lose a space, so each is
    decoded together with the piece before it. Leading white space is left out: templates put a
    space or a line break before the answer.
    """

    def __init__(self, tokenizer):
        self.text = ""
        self._tokenizer = tokenizer
        self._ids = []
        self._context = 0  # leading ids whose text is out
        self._shown = 0  # characters of all text that is out

    def put(self, token: int) -> str:
        """The text that `token` completes; "" for a special token or part of a character."""
        self._ids.append(token)
        decoded = self._decode()
        complete = decoded.rstrip(REPLACEMENT)
        piece = complete[self._shown :]
        self._shown += len(piece)
        if piece and decoded == complete:
            self._ids = self._ids[self._context :]
            self._context, self._shown = len(self._ids), len(self._decode())
        piece = piece if self.text else piece.lstrip()
        self.text += piece
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(
            self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def text_of(tokenizer, ids: list[int]) -> str:
    """The text that a `Detokenizer` makes of `ids`."""
    stream = Detokenizer(tokenizer)
    for token in ids:
        stream.put(token)
    return stream.text
