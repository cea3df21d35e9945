"""Files of results: there whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cupyllama.errors import OutputError


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A JSON file that is there whole or not at all."""
    write_whole(path, [json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"])


def write_json_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """A file of one JSON object a line that is there whole or not at all."""
    write_whole(path, (json.dumps(record, allow_nan=False) + "\n" for record in records))


def check_writable(path: Path) -> None:
    """Find out before the run, not after it, that a result could not be written.

    Raises:
        OutputError: the directory is missing or refuses a new file.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
    if path.is_dir():
        raise OutputError(f"{path}: is a directory", "Give the name of a file.")


def write_whole(path: Path, chunks: Iterable[str]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path}: cannot be written: {error.strerror}", "Is there space left on the disk?"
        ) from error
