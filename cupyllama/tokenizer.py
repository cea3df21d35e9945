"""Text to token ids: SentencePiece's tokenizer.model, or tokenizer.json through HF tokenizers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cupyllama.errors import ModelError

_PART = 256
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
        try:
            self._processor.LoadFromSerializedProto(_read(path))
        except RuntimeError as error:
            raise ModelError(
                f"{path}: not a SentencePiece model",
                "LLaMA 3 ships a tiktoken file under this name: use its tokenizer.json.",
            ) from error
        settings = _json_beside(path, "tokenizer_config.json")
        pieces = self._processor.GetPieceSize()
        self.size = max([pieces, *(1 + token_id for token_id in _added_token_ids(path, settings))])
        bos = self._processor.bos_id()
        self.bos_token_id = bos if bos >= 0 else None
        self.adds_bos = settings.get("add_bos_token", True) and self.bos_token_id is not None
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
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(_read(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise ModelError(
                f"{path}: not a tokenizer.json: {error}", "Is the download complete?"
            ) from error
        self.splits_at_spaces = False
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        added = self._tokenizer.encode("").ids  # what the post-processor puts around a text
        self.adds_bos = bool(added)
        self.bos_token_id = added[0] if added else self._configured_bos()

    def _configured_bos(self) -> int | None:
        token = _json_beside(self.path, "tokenizer_config.json").get("bos_token")
        token = token.get("content") if isinstance(token, dict) else token
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def load_tokenizer(model: Path, path: Path | None = None) -> Tokenizer:
    """The tokenizer at `path`, else tokenizer.model or tokenizer.json of the model directory.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    if path is not None and path.is_dir():
        model, path = path, None
    if path is None:
        candidates = [model / "tokenizer.model", model / "tokenizer.json"]
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
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
    if tokenizer.size != vocab_size:
        raise ModelError(
            f"{tokenizer.path}: has {tokenizer.size} tokens, but the embedding of {model} has "
            f"{vocab_size} rows",
            "Is it another model's tokenizer? Give the right one with --tokenizer.",
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error


def _json_beside(path: Path, name: str) -> dict:
    beside = path.parent / name
    if not beside.is_file():
        return {}
    try:
        settings = json.loads(_read(beside))
    except ValueError as error:
        raise ModelError(f"{beside}: not valid JSON: {error}") from error
    return settings if isinstance(settings, dict) else {}


def _added_token_ids(path: Path, settings: dict) -> list[int]:
    """Ids that Hugging Face adds to SentencePiece's own."""
    listed = _json_beside(path, "added_tokens.json").values()
    decoder = settings.get("added_tokens_decoder", {})
    return [*(int(token_id) for token_id in listed), *(int(token_id) for token_id in decoder)]
