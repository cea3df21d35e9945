"""A person at a terminal: lines with editing and history, and Ctrl-C for an answer alone."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cupyllama.errors import DataError
from cupyllama.printing import note

SIGN = "> "
HISTORY_LINES = 1000


def history_path() -> Path:
    """Where a session's lines are kept: in the user's state directory (XDG)."""
    state = os.environ.get("XDG_STATE_HOME")
    # As the standard has it, a path that is not absolute counts as none.
    directory = Path(state) if state and os.path.isabs(state) else Path.home() / ".local/state"
    return directory / "cupyllama" / "history"


@contextmanager
def line_editing() -> Iterator[None]:
    """Within it, `read_line` has the keys that a shell has, and the lines of earlier sessions."""
    try:
        import readline

        path = history_path()
    except (ImportError, RuntimeError):  # Python can be built without it; not all have a home
        yield
        return
    readline.set_history_length(HISTORY_LINES)
    try:
        readline.read_history_file(path)
    except OSError:  # none yet, or none that may be read
        pass
    try:
        yield
    finally:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(path)
        except OSError as error:
            note(f"{path}: the history is not kept: {error.strerror}")


def read_line() -> str | None:
    """The next line of stdin, of a person or of a program; None at its end.

    Ctrl-C at a terminal gives up the line that was begun.

    Raises:
        DataError: it is not UTF-8.
    """
    while True:
        try:
            if sys.stdin.isatty() and sys.stdout.isatty():
                return input(SIGN)
            if sys.stdin.isatty():  # the results go elsewhere, and the sign not with them
                print(SIGN, end="", file=sys.stderr, flush=True)
            # As bytes: of text, a line that cannot be decoded takes those behind it with it.
            line = sys.stdin.buffer.readline()
            return line.decode(sys.stdin.encoding).rstrip("\r\n") if line else None
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print()
        except UnicodeDecodeError as error:
            raise DataError(
                f"the line is not {error.encoding.upper()} at byte {error.start}",
                "Set the terminal to UTF-8.",
            ) from error


@contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Within it, the first Ctrl-C calls `stop`, and a second one interrupts whatever is done."""

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
