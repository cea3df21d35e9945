"""The files of a tokenizer: read with errors that name them, and the settings beside them."""

import json
import os
from pathlib import Path
from typing import Any

from cupyllama.errors import ModelError

IS_IT_COMPLETE = "Is the download complete?"
_LFS_POINTER = b"version https://git-lfs"


def read_file(path: Path) -> bytes:
    """The bytes of a file that the user may have named.

    Raises:
        ModelError: it cannot be read, or git-lfs has not fetched it.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        hint = "Give a file that can be read with --tokenizer."
        raise ModelError(f"{path}: {error.strerror}", hint) from error
    if raw.startswith(_LFS_POINTER):
        raise ModelError(
            f"{path}: is a git-lfs pointer, not the file that it stands for",
            "Run git lfs pull in its directory, or download the file itself.",
        )
    return raw


def read_json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        ModelError: it cannot be read, or is not a JSON object.
    """
    try:
        settings = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}", IS_IT_COMPLETE) from error
    if not isinstance(settings, dict):
        raise ModelError(f"{path}: not a JSON object", IS_IT_COMPLETE)
    return settings


def json_beside(path: Path, name: str) -> dict[str, Any]:
    """What a JSON file in the tokenizer's directory holds; nothing, if there is none."""
    beside = path.parent / name
    return read_json_object(beside) if os.path.isfile(beside) else {}


def configured_flag(path: Path, name: str) -> bool | None:
    """What tokenizer_config.json says of `name`, as add_bos_token; None if it does not say."""
    flag = json_beside(path, "tokenizer_config.json").get(name)
    if not isinstance(flag, bool | None):
        raise ModelError(
            f"{path.parent / 'tokenizer_config.json'}: {name} is {flag!r}",
            "Expected: true, false or null.",
        )
    return flag


def configured_token(path: Path, name: str) -> str | None:
    """The token that the settings beside the tokenizer give `name`, as bos_token."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = json_beside(path, file).get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def added_token_ids(path: Path) -> list[int]:
    """Ids that Hugging Face adds to the tokenizer's own."""
    ids = []
    for name in ("added_tokens.json", "tokenizer_config.json"):
        settings = json_beside(path, name)
        if name == "tokenizer_config.json":  # id -> token; added_tokens.json has token -> id
            listed = settings.get("added_tokens_decoder") or {}
        else:
            listed = settings.values()
        try:
            ids += [int(token_id) for token_id in listed]
        except (TypeError, ValueError, OverflowError) as error:
            raise ModelError(
                f"{path.parent / name}: the id of an added token is no number: {error}",
                "Expected: whole numbers.",
            ) from error
    return ids
