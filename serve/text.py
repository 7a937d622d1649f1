"""From new tokens to the text that may be sent: whole characters, and nothing behind a stop string.

The end of the text is held back while it may still become a stop string. The first stop string in
the text counts, wherever tokens begin and end.
"""

from collections.abc import Sequence

from jax_eagle.tokenizer import TextPieces, Tokenizer


class TextStream:
    """The text of one sequence as it grows."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ):
        """Without a tokenizer there is no text. Stop strings count behind `min_tokens` tokens."""
        self._pieces = tokenizer and TextPieces(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stop, self._include_stop = tuple(stop), include_stop
        self._free = min_tokens
        self._held = ""
        self.stopped_by: str | None = None
        """The stop string that ended the text."""

    def push(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Takes new tokens; returns text that is safe to send and how many tokens belong to it.

        All of them, unless a stop string ended the text before the last one.
        """
        if self._pieces is None:
            return "", len(tokens)
        sent = ""
        for used, token in enumerate(tokens, start=1):
            piece = self._pieces.push(token)
            sent += piece if self._free > 0 else self._take(piece)
            self._free -= 1
            if self.stopped_by is not None:
                return sent, used
        return sent, len(tokens)

    def finish(self) -> str:
        """What was held back, when the sequence has ended for another reason."""
        if self._pieces is None or self.stopped_by is not None:
            return ""
        text = self._take(self._pieces.rest())
        rest, self._held = self._held, ""
        return text if self.stopped_by is not None else text + rest

    def _take(self, piece: str) -> str:
        text = self._held + piece
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            at, self.stopped_by = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            self._held = ""
            return text[: at + len(self.stopped_by)] if self._include_stop else text[:at]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text that is a beginning of the stop string."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
