"""Files of results: there whole or not at all."""

import errno
import fcntl
import json
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cupyllama.errors import OutputError, UsageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}  # of a file system, as of some Lustres
_LINKS = 40  # that lead on, as many as Linux follows


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file that is there whole or not at all."""
    write_whole(path, [json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"])


def write_json_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """A file of one JSON object a line that is there whole or not at all."""
    write_whole(path, (json.dumps(record, allow_nan=False) + "\n" for record in records))


def check_writable(path: Path) -> None:
    """Find out before the run, not after it, that a result could not be written.

    Raises:
        OutputError: the directory is missing or refuses a new file, or `path` is one; or the disk
            has no room for a single byte.
    """
    if os.path.isdir(path):
        raise OutputError(f"{path}: is a directory", "Give the name of a file.")
    try:
        number = _descriptor(path)
        if number is not None:
            os.write(number, b"")  # refused where it is closed, or open for reading
            return
        if is_special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        target = _target(path)
        prefix = f".{target.name}."
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=prefix, buffering=0) as file:
            file.write(b"\n")  # a full disk has room for an empty file
            os.fsync(file.fileno())
    except OSError as error:
        raise unwritable(path, error) from error


def check_apart(read: dict[str, Path | None], written: dict[str, Path | None]) -> None:
    """Find out before the run that a result would replace another, or what the run reads.

    Args:
        read, written: files by option; None: not given.

    Raises:
        UsageError: one that is written is there twice, links followed.
    """
    options = {os.path.realpath(path): option for option, path in read.items() if path}
    for option, path in written.items():
        if path is None or is_special(path):
            continue
        other = options.setdefault(os.path.realpath(path), option)
        if other != option:
            raise UsageError(
                f"{option} and {other} are the same file: {path}",
                "Give each result a file of its own.",
            )


def lock(descriptor: int, path: Path) -> None:
    """Have the file or directory at `path` for this process alone, until the descriptor is closed.

    Raises:
        UsageError: another process has it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"{path}: another process is writing it", "Wait for it, or end it."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def write_whole(path: Path, chunks: Iterable[str]) -> None:
    """Write a file under another name and rename it; behind a symbolic link, what it points to.

    What `is_special` is written to as it is: renaming would put a file in its place.

    Raises:
        OutputError: it cannot be written. What was there before is still there.
        BrokenPipeError: nobody reads stdout, or the like, any more.
    """
    try:
        if is_special(path):
            with _open(path) as file:
                file.writelines(chunks)
        else:
            _replace(_target(path), chunks)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _descriptor(path) is not None:
            raise
        raise unwritable(path, error) from error


def _replace(target: Path, chunks: Iterable[str]) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with _open(temporary) as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:  # Ctrl-C too leaves nothing behind
        temporary.unlink(missing_ok=True)
        raise


def _open(path: Path) -> Any:
    number = _descriptor(path)
    # A name of a file need not be UTF-8; \udcXX is how JSON can say what it is.
    return open(
        path if number is None else os.dup(number),  # where that is, and nothing is cut off
        "w",
        encoding="utf-8",
        errors="backslashreplace",
    )


def partial_of(path: Path) -> Path:
    """FILE.partial of a result that is under way: beside what a link points to."""
    target = Path(os.path.realpath(path))
    return target.with_name(f"{target.name}.partial")


def is_special(path: Path) -> bool:
    """Whether it is neither a file nor a directory, links followed, or stands for an open file.

    /dev/stdout does, and /dev/fd/3: a shell may have sent them to a file, perhaps to its end, and
    other results go there too.
    """
    if _descriptor(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:  # not there, or nobody may look
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _descriptor(path: Path) -> int | None:
    """Of the open file that a path such as /dev/stdout stands for."""
    folders = {os.path.realpath(folder) for folder in ("/dev/fd", "/proc/self/fd")}
    place = os.fspath(path)
    for _ in range(_LINKS):
        folder, name = os.path.split(place)
        if name.isdecimal() and os.path.realpath(folder) in folders:
            return int(name)
        if not os.path.islink(place):
            break
        place = os.path.join(folder, os.readlink(place))
    return None


def _target(path: Path) -> Path:
    target = Path(os.path.realpath(path))
    if os.path.islink(target):  # links that lead in a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


def unwritable(path: Path, error: OSError) -> OutputError:
    """The error to raise."""
    hint = "Is there space left on the disk?" if error.errno in _FULL else "Give another place."
    return OutputError(f"{path}: cannot be written: {error.strerror}", hint)
