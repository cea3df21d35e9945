"""The directory that `cupyllama shard` makes: refused, taken up, and put in its place whole.

Everything is written beside the output, in OUT.partial, and renamed at the end. A manifest there
grows with every finished stage file, so that an interrupted run can be taken up again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cupyllama
from cupyllama.checkpoint.sharded import (
    FORMAT,
    MANIFEST,
    TENSOR_PARALLEL,
    checked_stage,
    is_sharded,
    stage_file,
)
from cupyllama.checkpoint.stage_writer import sync_directory
from cupyllama.errors import ModelError, OutputError, UsageError
from cupyllama.files import lock, write_json

_UNFINISHED = "manifest.partial.json"


def check_output(output: Path, model: Path, force: bool) -> None:
    """Refuse before anything is written what would destroy something.

    Raises:
        UsageError: the output is there and may not be replaced.
        OutputError: the directory that it is to lie in is missing.
    """
    if not os.path.isdir(output.parent):
        raise OutputError(f"{output}: the directory {output.parent} does not exist")
    if not os.path.lexists(output):
        return
    if os.path.realpath(output) == os.path.realpath(model):
        raise UsageError(f"{output}: is the model itself", "Give another --output.")
    if not force:
        raise UsageError(f"{output}: exists", "Give another --output, or replace it with --force.")
    if output.is_symlink() or not is_sharded(output):
        raise UsageError(
            f"{output}: is no sharded checkpoint, so --force does not replace it",
            "Remove it yourself, or give another --output.",
        )


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """The directory, made if need be, for this process alone."""
    partial.mkdir(exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        lock(descriptor, partial)
        yield
    finally:
        os.close(descriptor)


def taken_up(partial: Path, settings: dict[str, Any], force: bool) -> dict[str, Any]:
    """The manifest of an earlier run with the same settings, its finished files checked, or new.

    Raises:
        UsageError: the earlier run had other settings, or the directory is none of ours.
    """
    manifest = _earlier(partial)
    differing = [key for key in settings if manifest.get(key) != settings[key] and key != "id"]
    found = sorted(entry.name for entry in partial.iterdir())
    if found and manifest.get("format") != FORMAT:
        raise UsageError(
            f"{partial}: exists and was not written by shard", "Move or remove it, and try again."
        )
    if found and differing:
        if not force:
            raise UsageError(
                f"{partial}: is of an interrupted run that differs in {', '.join(differing)}",
                "Give the same settings to go on with it; --force or removing it begins anew.",
            )
        for name in found:
            (partial / name).unlink()
        manifest = {}
    earlier = {stage["file"]: stage for stage in manifest.get("stages", [])}
    manifest = {**settings, "cupyllama": cupyllama.__version__, "stages": [], "files": {}}
    stages, ranks = len(settings["layers"]), settings[TENSOR_PARALLEL]
    for number in range(stages * ranks):
        file = stage_file(number, stages, ranks)
        entry: dict[str, Any] = {"file": file, "layers": settings["layers"][number // ranks]}
        known = earlier.get(entry["file"], {})
        if "sha256" in known and _is_whole(partial, known, settings["id"], number):
            entry = known
        manifest["stages"].append(entry)
    save_progress(partial, manifest)
    return manifest


def save_progress(partial: Path, manifest: dict[str, Any]) -> None:
    """Write down what is finished so far."""
    write_json(partial / _UNFINISHED, manifest)


def _earlier(partial: Path) -> dict[str, Any]:
    for name in (_UNFINISHED, MANIFEST):
        try:
            manifest = json.loads((partial / name).read_bytes())
            return manifest if isinstance(manifest, dict) else {}
        except FileNotFoundError:
            continue
        except ValueError:
            return {}
    return {}


def _is_whole(partial: Path, entry: dict[str, Any], identity: str, stage: int) -> bool:
    try:
        checked_stage(partial / entry["file"], entry["bytes"], identity, stage)
    except ModelError:
        return False
    return True


def check_space(output: Path, need: int) -> None:
    """Raises OutputError if the disk has not as much room as is yet to be written."""
    free = shutil.disk_usage(output.parent).free
    if need > free:
        raise OutputError(
            f"{output}: needs {need / 1e9:.2f} GB, and {output.parent} has {free / 1e9:.2f} GB "
            "free",
            "Free some space, or give an --output on another disk.",
        )


def write_small(partial: Path, files: dict[str, bytes], manifest: dict[str, Any]) -> None:
    """config.json, tokenizer, and the manifest last: its name is what makes a directory whole."""
    for name, content in files.items():
        with open(partial / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        manifest["files"][name] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    save_progress(partial, manifest)
    os.replace(partial / _UNFINISHED, partial / MANIFEST)
    sync_directory(partial)


def publish(partial: Path, output: Path) -> None:
    """Rename the directory to its name; one that is replaced is removed after that."""
    replaced = output.with_name(f"{output.name}.replaced-{os.getpid()}")
    replaces = output.exists()
    if replaces:
        os.rename(output, replaced)
    os.rename(partial, output)
    sync_directory(output.parent)
    if replaces:
        shutil.rmtree(replaced)
