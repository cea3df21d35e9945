"""tokenizer.json, or vocab.json with merges.txt, through HF tokenizers; and what goes in front."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from cupyllama.bpe import bpe_files, byte_of_character, is_bpe_file, read_bpe
from cupyllama.errors import ModelError
from cupyllama.tokenizer_files import (
    IS_IT_COMPLETE,
    added_token_ids,
    configured_flag,
    configured_token,
    json_beside,
    read_file,
)

# Metaseq's dictionary begins with these, and its prompts, OPT's, with </s>.
_METASEQ = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
_METASEQ_START = 2
_METASEQ_END = 2
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class HFTokenizer:
    """A `tokenizer.json`, or a `vocab.json` with its `merges.txt`, of the model in `model`."""

    def __init__(self, path: Path, model: Path | None = None):
        try:
            import tokenizers
        except ImportError as error:
            raise ModelError(
                f"{path}: the package tokenizers is needed to read it",
                "pip install 'cupyllama[tokenizers]'",
            ) from error
        if is_bpe_file(path):
            self.path = bpe_files(path)[0]
            self._tokenizer = read_bpe(path)
        else:
            self.path = path
            raw = read_file(path)
            try:
                self._tokenizer = tokenizers.Tokenizer.from_buffer(raw)
            except Exception as error:  # the Rust side raises plain Exception
                message = f"{path}: not a tokenizer.json: {error}"
                raise ModelError(message, IS_IT_COMPLETE) from error
        self.splits_at_spaces = False
        self._pieces: dict[int, str | bytes | None] = {}
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        own = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.size = 1 + max([*own, *added_token_ids(path)], default=-1)
        self.bos_token_id, self.adds_bos = self._bos(path.parent if model is None else model)

    def _bos(self, model: Path) -> tuple[int | None, bool]:
        """BOS, and whether it goes before a text: as add_bos_token says, else as texts show.

        Where neither says it, Metaseq's models get what they were trained with: OPT's files are
        also handed on with no settings, and transformers 5 leaves add_bos_token out of them.
        """
        name = configured_token(self.path, "bos_token")
        configured = None if name is None else self._tokenizer.token_to_id(name)
        before, asked = self._token_before_a_text(), configured_flag(self.path, "add_bos_token")
        usual = _METASEQ_START if self._is_metaseqs(model) else None
        if asked is None:
            start = usual if before is None else before
            return (configured if start is None else start), start is not None
        bos = next((bos for bos in (configured, before, usual) if bos is not None), None)
        return bos, asked and bos is not None

    def _token_before_a_text(self) -> int | None:
        """What the post-processor puts in front; of an empty text one could not tell that from EOS.

        The first token of a text that has tokens of its own, unless it is the text's own first.
        """
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a").ids
        return None if whole[: len(bare)] == bare else whole[0]

    def _is_metaseqs(self, model: Path) -> bool:
        """Others number their special tokens so, too: where config.json names a family, it counts.

        Metaseq's own release has no config.json.
        """
        family = json_beside(model / "config.json", "config.json").get("model_type", "opt")
        found = {token: self._tokenizer.token_to_id(token) for token in _METASEQ}
        return family == "opt" and found == _METASEQ

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with no special tokens added."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    @cached_property
    def eos_token_id(self) -> int | None:
        """As the settings beside it name it; Metaseq's have one of their own."""
        name = configured_token(self.path, "eos_token")
        if name is not None:
            return self._tokenizer.token_to_id(name)
        found = {token: self._tokenizer.token_to_id(token) for token in _METASEQ}
        return _METASEQ_END if found == _METASEQ else None

    @property
    def invalid_bytes(self) -> str:
        return "longest" if self._bytes_of_characters else "run"

    def piece(self, token_id: int) -> str | bytes | None:
        """As the tokenizer's decoder has it, with no special tokens."""
        if token_id not in self._pieces:
            self._pieces[token_id] = self._piece(token_id)
        return self._pieces[token_id]

    def _piece(self, token_id: int) -> str | bytes | None:
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._special:  # None: padding of the embedding
            return None
        if self._bytes_of_characters:
            try:
                return bytes([self._bytes_of_characters[character] for character in token])
            except KeyError:
                return token.encode()
        for step in self._decoding:
            if step["type"] == "Replace":
                token = token.replace(step["pattern"]["String"], step["content"])
            elif step["type"] == "Metaspace":
                token = token.replace(step["replacement"], " ")
            elif step["type"] == "ByteFallback" and (byte := _BYTE.fullmatch(token)):
                return bytes([int(byte[1], 16)])
        return token

    @cached_property
    def _special(self) -> set[int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token_id for token_id, token in added.items() if token.special}

    @cached_property
    def _bytes_of_characters(self) -> dict[str, int]:
        """Of a byte-level decoder; empty for any other."""
        is_byte_level = any(step["type"] == "ByteLevel" for step in self._decoding)
        return byte_of_character() if is_byte_level else {}

    @cached_property
    def _decoding(self) -> list[dict[str, Any]]:
        """What makes text of tokens, in steps.

        Fuse and Strip are left out: they change nothing of text behind other text.

        Raises:
            ModelError: a step is not known here.
        """
        decoder = self._tokenizer.decoder
        whole = {"type": "null"} if decoder is None else json.loads(decoder.__getstate__())
        steps = whole["decoders"] if whole["type"] == "Sequence" else [whole]
        kinds = [step["type"] for step in steps]
        for place, step in enumerate(steps):
            kind = step["type"]
            if not (
                kind in ("ByteFallback", "Fuse", "Metaspace")
                or (kind == "ByteLevel" and len(steps) == 1)
                or (
                    kind == "Replace"
                    and "String" in step["pattern"]
                    and "Fuse" not in kinds[:place]
                )
                or (kind == "Strip" and "Fuse" in kinds[:place] and not step["stop"])
            ):
                raise ModelError(
                    f"{self.path}: its decoder is {' + '.join(kinds)}, of which {kind} is not "
                    "known there",
                    "Generation reads ByteLevel, Metaspace, and Replace with ByteFallback.",
                )
        return steps
