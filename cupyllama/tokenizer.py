"""Text to token ids and back: SentencePiece's tokenizer.model, or what HF tokenizers reads."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cupyllama.bpe import BPE_FILES, is_bpe_file
from cupyllama.checkpoint.metaseq_parts import model_directory
from cupyllama.errors import ModelError
from cupyllama.hf_tokenizer import HFTokenizer
from cupyllama.tokenizer_files import (
    IS_IT_COMPLETE,
    added_token_ids,
    configured_flag,
    read_file,
)

_PADDED_TO = 8
_PART = 256
_SPACE = "▁"  # how SentencePiece writes a space


class Tokenizer(Protocol):
    """What scoring and generation need of a tokenizer."""

    path: Path
    size: int  # ids run from 0 to size - 1
    bos_token_id: int | None
    adds_bos: bool  # whether the tokenizer itself puts BOS before a text
    splits_at_spaces: bool  # ids of "a b" are those of "a" and those of "b" (`can_split`)
    eos_token_id: int | None
    # What becomes of bytes that are no character, each to a U+FFFD: "each"; "longest": several, as
    # far as they might have become one; "run": all bytes in a row with them, characters too.
    invalid_bytes: str

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with no special tokens added."""
        ...

    def piece(self, token_id: int) -> str | bytes | None:
        """What a token behind other text stands for; as bytes, perhaps a part of a character.

        None is as if it were not there. An empty text is none either, but ends a character.
        """
        ...


class SentencePieceTokenizer:
    """A `tokenizer.model`, with the settings that tokenizer_config.json beside it has."""

    invalid_bytes = "each"

    def __init__(self, path: Path):
        import sentencepiece

        self.path = path
        self._processor = sentencepiece.SentencePieceProcessor()
        raw = read_file(path)
        try:
            self._processor.LoadFromSerializedProto(raw)
        except RuntimeError as error:
            raise ModelError(
                f"{path}: not a SentencePiece model",
                f"{IS_IT_COMPLETE} LLaMA 3 ships a tiktoken file under this name: use its "
                "tokenizer.json.",
            ) from error
        pieces = self._processor.GetPieceSize()
        self.size = max([pieces, *(1 + token_id for token_id in added_token_ids(path))])
        bos = self._processor.bos_id()
        self.bos_token_id = bos if bos >= 0 else None
        self.adds_bos = (
            configured_flag(path, "add_bos_token") is not False and self.bos_token_id is not None
        )
        self.splits_at_spaces = self._splits_at_spaces()
        self._pieces: dict[int, str | bytes] = {}

    @property
    def eos_token_id(self) -> int | None:
        eos = self._processor.eos_id()
        return eos if eos >= 0 else None

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

    def piece(self, token_id: int) -> str | bytes:
        if token_id not in self._pieces:
            self._pieces[token_id] = self._piece(token_id)
        return self._pieces[token_id]

    def _piece(self, token_id: int) -> str | bytes:
        processor = self._processor
        if token_id >= processor.GetPieceSize() or processor.IsControl(token_id):
            return ""  # the former were added to it, as [PAD] is, or are padding of the embedding
        if processor.IsUnknown(token_id):
            return processor.DecodeIds([token_id])
        piece = processor.IdToPiece(token_id)
        if processor.IsByte(token_id):
            return bytes([int(piece[len("<0x") : -1], 16)])
        return piece.replace(_SPACE, " ")


def load_tokenizer(model: Path, path: Path | None = None) -> Tokenizer:
    """The tokenizer at `path`, a file or a directory, else that beside the model's weights.

    A directory's is tokenizer.model, else tokenizer.json, else vocab.json with merges.txt (in
    Metaseq's releases gpt2-vocab.json with gpt2-merges.txt).

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    if path is None or os.path.isdir(path):
        directory = model_directory(model) if path is None else path
        candidates = [directory / n for n in ("tokenizer.model", "tokenizer.json", *BPE_FILES)]
        path = next((candidate for candidate in candidates if os.path.isfile(candidate)), None)
        if path is None:
            raise ModelError(
                f"{directory}: has no tokenizer.model, no tokenizer.json, and no vocab.json with "
                "merges.txt",
                "Give the file with --tokenizer.",
            )
    if path.suffix == ".json" or is_bpe_file(path):
        return HFTokenizer(path, model)
    return SentencePieceTokenizer(path)


def can_split(left: str, right: str) -> bool:
    """Whether a tokenizer that splits at spaces takes "left right" apart without fail.

    Runs of spaces have pieces of their own, and Unicode normalisation may join a space with a
    combining character behind it.
    """
    return left[-1:] not in ("", " ", _SPACE) and right[:1].isascii() and right[:1] not in ("", " ")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, model: Path) -> None:
    """Refuse a tokenizer that belongs to another model.

    Rows may be padded to a multiple of 8, as Metaseq pads OPT's 50,265 tokens to 50,272 rows.
    """
    if vocab_size in (tokenizer.size, _PADDED_TO * math.ceil(tokenizer.size / _PADDED_TO)):
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
