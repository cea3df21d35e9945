"""Text to token ids: SentencePiece's tokenizer.model, or tokenizer.json through HF tokenizers."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from cupyllama.errors import ModelError

_PART = 256
_IS_IT_COMPLETE = "Is the download complete?"
_LFS_POINTER = b"version https://git-lfs"
_SPACE = "▁"  # how SentencePiece writes a space


class Tokenizer(Protocol):
    """What scoring needs of a tokenizer."""

    path: Path
    size: int  # ids run from 0 to size - 1
    bos_token_id: int | None
    adds_bos: bool  # whether the tokenizer itself puts BOS before a text
    splits_at_spaces: bool  # ids of "a b" are those of "a" and those of "b" (`can_split`)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with no special tokens added."""
        ...


class SentencePieceTokenizer:
    """A `tokenizer.model`, with the settings that tokenizer_config.json beside it has."""

    def __init__(self, path: Path):
        import sentencepiece

        self.path = path
        self._processor = sentencepiece.SentencePieceProcessor()
        raw = _read(path)
        try:
            self._processor.LoadFromSerializedProto(raw)
        except RuntimeError as error:
            raise ModelError(
                f"{path}: not a SentencePiece model",
                "LLaMA 3 ships a tiktoken file under this name: use its tokenizer.json.",
            ) from error
        pieces = self._processor.GetPieceSize()
        self.size = max([pieces, *(1 + token_id for token_id in _added_token_ids(path))])
        bos = self._processor.bos_id()
        self.bos_token_id = bos if bos >= 0 else None
        self.adds_bos = _add_bos_token(path) is not False and self.bos_token_id is not None
        self.splits_at_spaces = self._splits_at_spaces()

    def _splits_at_spaces(self) -> bool:
        """Whether no piece reaches over a space, so that merging cannot either.

        A text is "▁" and its characters, spaces as "▁", to SentencePiece; pieces with "▁" behind
        another character are what could join two words.
        """
        pieces = (self._processor.IdToPiece(i) for i in range(self._processor.GetPieceSize()))
        crosses = any(_SPACE in piece.lstrip(_SPACE) for piece in pieces)
        return not crosses and self.encode(["a b"])[0] == sum(self.encode(["a", "b"]), [])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        # In parts: SentencePiece keeps Python's other threads, which load weights, waiting.
        parts = (texts[first : first + _PART] for first in range(0, len(texts), _PART))
        return [ids for part in parts for ids in self._processor.EncodeAsIds(list(part))]


class HFTokenizer:
    """A `tokenizer.json`."""

    def __init__(self, path: Path):
        try:
            import tokenizers
        except ImportError as error:
            raise ModelError(
                f"{path}: the package tokenizers is needed to read it",
                "pip install 'cupyllama[tokenizers]'",
            ) from error
        self.path = path
        raw = _read(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:  # the Rust side raises plain Exception
            raise ModelError(f"{path}: not a tokenizer.json: {error}", _IS_IT_COMPLETE) from error
        self.splits_at_spaces = False
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        own = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.size = 1 + max([*own, *_added_token_ids(path)], default=-1)
        self.bos_token_id, self.adds_bos = self._bos()

    def _bos(self) -> tuple[int | None, bool]:
        """BOS, and whether it goes before a text: as add_bos_token says, else as texts show."""
        configured, before = self._configured_bos(), self._token_before_a_text()
        asked = _add_bos_token(self.path)
        if asked is None:
            return (configured if before is None else before), before is not None
        bos = before if configured is None else configured
        return bos, asked and bos is not None

    def _token_before_a_text(self) -> int | None:
        """What the post-processor puts in front; of an empty text one could not tell that from EOS.

        The first token of a text that has tokens of its own, unless it is the text's own first.
        """
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a").ids
        return None if whole[: len(bare)] == bare else whole[0]

    def _configured_bos(self) -> int | None:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _json_beside(self.path, name).get("bos_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return self._tokenizer.token_to_id(token)
        return None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def load_tokenizer(model: Path, path: Path | None = None) -> Tokenizer:
    """The tokenizer at `path`, else tokenizer.model or tokenizer.json of the model directory.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    if path is not None and os.path.isdir(path):
        model, path = path, None
    if path is None:
        candidates = [model / "tokenizer.model", model / "tokenizer.json"]
        path = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
        if path is None:
            raise ModelError(
                f"{model}: has no tokenizer.model and no tokenizer.json",
                "Give the file with --tokenizer.",
            )
    return HFTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def can_split(left: str, right: str) -> bool:
    """Whether a tokenizer that splits at spaces takes "left right" apart without fail.

    Runs of spaces have pieces of their own, and Unicode normalisation may join a space with a
    combining character behind it.
    """
    return left[-1:] not in ("", " ", _SPACE) and right[:1].isascii() and right[:1] not in ("", " ")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, model: Path) -> None:
    """Refuse a tokenizer that belongs to another model."""
    if tokenizer.size == vocab_size:
        return
    if tokenizer.size < vocab_size:
        way_out = (
            "If the last rows are only padding, name the last one in added_tokens.json beside the "
            f'tokenizer: {{"<unused>": {vocab_size - 1}}}.'
        )
    else:
        way_out = (
            "If the tokens too many were added to it, as [PAD] often is, take them out of "
            "added_tokens.json, tokenizer_config.json or tokenizer.json: scoring needs none."
        )
    raise ModelError(
        f"{tokenizer.path}: has {tokenizer.size} tokens, but the embedding of {model} has "
        f"{vocab_size} rows",
        f"Is it another model's tokenizer? Give the right one with --tokenizer. {way_out}",
    )


def _read(path: Path) -> bytes:
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


def _json_beside(path: Path, name: str) -> dict[str, Any]:
    """What a JSON file in the tokenizer's directory holds; nothing, if there is none."""
    beside = path.parent / name
    if not os.path.isfile(beside):
        return {}
    try:
        settings = json.loads(_read(beside))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{beside}: not valid JSON: {error}", _IS_IT_COMPLETE) from error
    if not isinstance(settings, dict):
        raise ModelError(f"{beside}: not a JSON object", _IS_IT_COMPLETE)
    return settings


def _add_bos_token(path: Path) -> bool | None:
    """Whether tokenizer_config.json wants BOS before a text; None if it does not say."""
    asked = _json_beside(path, "tokenizer_config.json").get("add_bos_token")
    if not isinstance(asked, bool | None):
        raise ModelError(
            f"{path.parent / 'tokenizer_config.json'}: add_bos_token is {asked!r}",
            "Expected: true, false or null.",
        )
    return asked


def _added_token_ids(path: Path) -> list[int]:
    """Ids that Hugging Face adds to the tokenizer's own."""
    ids = []
    for name in ("added_tokens.json", "tokenizer_config.json"):
        settings = _json_beside(path, name)
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
