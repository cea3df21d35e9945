"""Which files are the parts of a Metaseq checkpoint: those of a pattern, of a directory, or one."""

import os
import re
from fnmatch import fnmatch
from pathlib import Path

from cupyllama.checkpoint.source import INCOMPLETE
from cupyllama.errors import ModelError

# reshard-model_part-0.pt, checkpoint_last-model_part-0.pt
_PART = re.compile(r"(?P<set>.*?)(?P<number>\d+)\.pt")
_FSDP_SHARD = re.compile(r".*-shard\d+\.pt")
_SINGLE = ("reshard.pt", "restored.pt")  # how a model that was never split is published
_MAGIC = re.compile(r"[*?\[]")
_MOST_LISTED = 5

CONSOLIDATE = (
    "Metaseq's scripts/reshard_fsdp.py consolidates them: --num-output-shards 1 "
    "--unflatten-weights True, once for each model part."
)


def names_parts(model: Path) -> bool:
    """Whether it is a pattern or the name of a .pt file, instead of a directory's."""
    if os.path.isdir(model):  # which takes a name that is too long, unlike Path.is_dir
        return False
    a_part = model.suffix == ".pt" and os.path.isfile(model)
    return a_part or _MAGIC.search(model.name) is not None


def model_directory(model: Path) -> Path:
    """Where the files beside the weights are: config.json, the tokenizer."""
    return model.parent if names_parts(model) else model


def has_metaseq(model: Path) -> bool:
    """Whether weights in this form are meant, or there."""
    return names_parts(model) or bool(_in_directory(model))


def find_parts(model: Path) -> list[Path]:
    """The parts in their order, none missing between the first and the last.

    Raises:
        ModelError: there is none, one is missing or there twice, or they are of several sets.
    """
    if not names_parts(model):
        return _in_order(_in_directory(model), model)
    if os.path.isfile(model):
        return [model]
    try:
        there = sorted(path for path in model.parent.iterdir() if path.is_file())
    except OSError as error:
        raise ModelError(
            f"{model.parent}: {error.strerror}",
            "--model takes a directory, or a pattern for the names of files in one.",
        ) from error
    found = [path for path in there if fnmatch(path.name, model.name)]
    if not found:
        names = [path.name for path in there if path.suffix == ".pt"]
        listed = ", ".join(names[:_MOST_LISTED]) + (", …" if len(names) > _MOST_LISTED else "")
        raise ModelError(
            f"{model}: no file in {model.parent} has a name like {model.name}",
            f"It has {listed}." if names else "It has no .pt file at all.",
        )
    return _in_order(found, model)


def _in_directory(directory: Path) -> list[Path]:
    parts = [path for path in directory.glob("*.pt") if "model_part-" in path.name]
    singles = [directory / name for name in _SINGLE]
    return sorted(parts) or [path for path in singles if path.is_file()][:1]


def _in_order(found: list[Path], model: Path) -> list[Path]:
    if len(found) == 1 and _PART.fullmatch(found[0].name) is None:
        return found
    numbered: dict[int, Path] = {}
    sets: dict[str, Path] = {}
    for path in found:
        if _FSDP_SHARD.fullmatch(path.name):
            raise ModelError(f"{path}: is a shard of a part, as FSDP saves them", CONSOLIDATE)
        match = _PART.fullmatch(path.name)
        if match is None:
            raise ModelError(
                f"{path}: has no number at its end, though {model} stands for it too",
                "Give a pattern that the parts of one model alone have: "
                "--model 'DIR/reshard-model_part-*.pt'.",
            )
        sets.setdefault(match["set"], path)
        numbered[int(match["number"])] = path
    if len(sets) > 1:
        first, second, *_ = sets.values()
        raise ModelError(
            f"{model}: has parts of several checkpoints: {first.name} and {second.name}",
            f"Give a pattern for one of them: --model '{_beside(second, '*')}'.",
        )
    for number in range(max(numbered)):
        if number not in numbered:
            other = numbered[max(numbered)]
            raise ModelError(
                f"{_beside(other, number)}: no such file, though there is {other.name}", INCOMPLETE
            )
    return [numbered[number] for number in sorted(numbered)]


def _beside(part: Path, number: int | str) -> Path:
    """The name of another part of the same checkpoint."""
    return part.with_name(f"{_PART.fullmatch(part.name)['set']}{number}.pt")
