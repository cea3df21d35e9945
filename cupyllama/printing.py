"""Results on stdout: there at once, or an error that says why not; and notes on stderr."""

import os
import sys
from contextlib import suppress
from typing import TextIO

from cupyllama.errors import OutputError


def print_now(text: str) -> None:
    """Text to stdout, at once; what its encoding has no sign for is a question mark.

    Raises:
        OutputError: the disk is full, or the like.
        BrokenPipeError: nobody reads any more; click ends the command without a word.
    """
    stream = sys.stdout
    if stream is None:  # closed by whoever started this
        return
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            stream.write(text.encode(stream.encoding, "replace").decode(stream.encoding))
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _forget(stream)
        raise OutputError(
            f"stdout: cannot be written: {error.strerror}", "Is there space left on the disk?"
        ) from error


def note(text: str) -> None:
    """A line to stderr; where that cannot be written it is lost, for no result depends on it."""
    if sys.stderr is None:
        return
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _forget(sys.stderr)


def _forget(stream: TextIO) -> None:
    """Let what the stream still has go nowhere: Python would fail on it again, as it ends."""
    with suppress(OSError, ValueError):  # a stream that is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
