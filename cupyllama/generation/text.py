"""Token ids to text while they come: whole characters only, and the end where a stop text begins.

What has been handed out is never taken back: text comes as soon as no later token can change it,
and all of it together is what the tokenizer's own library makes of the same tokens behind others.
"""

import codecs
import re
from collections.abc import Sequence

from cupyllama.errors import UsageError
from cupyllama.tokenizer import Tokenizer

_LOST = "\ufffd"
_LOST_BYTE = re.compile("[\udc80-\udcff]")  # as surrogateescape writes a byte


class Characters:
    """Pieces of tokens to text: bytes wait until they are a character, or can be none."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = _DECODERS[tokenizer.invalid_bytes]()

    def put(self, token_id: int) -> str:
        """The text that is certain with this token."""
        piece = self._tokenizer.piece(token_id)
        if piece is None:
            return ""
        if isinstance(piece, bytes):
            return self._decoder.put(piece)
        return self._decoder.end() + piece

    def end(self) -> str:
        """The text that is certain when no token follows."""
        return self._decoder.end()


class _Longest:
    """For bytes that are no character, one U+FFFD as far as it might have become one."""

    _errors = "replace"

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(self._errors)

    def put(self, piece: bytes) -> str:
        return self._decoder.decode(piece)

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Each(_Longest):
    """One U+FFFD for each byte that is part of no character."""

    _errors = "surrogateescape"

    def put(self, piece: bytes) -> str:
        return _LOST_BYTE.sub(_LOST, super().put(piece))

    def end(self) -> str:
        return _LOST_BYTE.sub(_LOST, super().end())


class _Run:
    """Bytes in a row are text if all of them are, else a U+FFFD each: known at their end."""

    def __init__(self) -> None:
        self._run = b""

    def put(self, piece: bytes) -> str:
        self._run += piece
        return ""

    def end(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _LOST * len(run)


# What libraries make of bytes that are no UTF-8: see `Tokenizer.invalid_bytes`.
_DECODERS = {"longest": _Longest, "each": _Each, "run": _Run}


class StopTexts:
    """Text up to the first stop text, whatever pieces it comes in.

    The first is the one that is complete first; of those that end at one place, the longest.
    """

    def __init__(self, stop_texts: Sequence[str] = ()):
        self._stop_texts = tuple(stop_texts)
        self._held = ""  # what may be the beginning of a stop text
        self.found = False

    def put(self, text: str) -> str:
        """What can be printed with this text; nothing once a stop text was found."""
        if self.found or not text:
            return ""
        text, self._held = self._held + text, ""
        places = [(text.find(stop), stop) for stop in self._stop_texts]
        ends = [(begin + len(stop), begin) for begin, stop in places if begin >= 0]
        if ends:
            self.found = True
            return text[: min(ends)[1]]
        begin = self._first_that_may_stop(text)
        self._held = text[begin:]
        return text[:begin]

    def end(self) -> str:
        """What was held back, when no text follows."""
        text, self._held = self._held, ""
        return text

    def _first_that_may_stop(self, text: str) -> int:
        longest = max(map(len, self._stop_texts), default=1) - 1
        for begin in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[begin:]) for stop in self._stop_texts):
                return begin
        return len(text)


class TextStream:
    """The text of an answer, token by token."""

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[str] = ()):
        self._characters = Characters(tokenizer)
        self._stop_texts = StopTexts(stop_texts)

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come: no token behind it is wanted."""
        return self._stop_texts.found

    def put(self, token_id: int) -> str:
        """The text that can be printed with this token."""
        return self._stop_texts.put(self._characters.put(token_id))

    def end(self) -> str:
        """The rest, when no token follows; it may still be cut by a stop text."""
        return self._stop_texts.put(self._characters.end()) + self._stop_texts.end()


def check_stop_texts(stop_texts: Sequence[str]) -> None:
    """Raises UsageError where one is empty: it would stop before anything."""
    if "" in stop_texts:
        raise UsageError("--stop '' is empty", "Give the text that ends an answer.")
