"""GPT-2's byte-level BPE from vocab.json and merges.txt, as OPT comes with, checked before use.

A text is cut into words by GPT-2's pattern, each byte of a word becomes one of 256 printable
characters, and pairs are merged in the order of merges.txt. HF tokenizers does all of this; but a
file cut short gives it other ids without a word, so both files are checked against each other.
"""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from cupyllama.errors import ModelError
from cupyllama.tokenizer_files import (
    IS_IT_COMPLETE,
    configured_flag,
    configured_token,
    json_beside,
    read_file,
    read_json_object,
)

if TYPE_CHECKING:
    import tokenizers

BPE_FILES = ("vocab.json", "merges.txt", "gpt2-vocab.json", "gpt2-merges.txt")  # Metaseq: gpt2-
_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
_DO_THEY_BELONG_TOGETHER = (
    "Is the download complete? Do vocab.json and merges.txt belong to one model?"
)
# Special tokens that a text is searched for, as facebook/opt-* name them.
_SPECIAL_TOKENS = {
    "bos_token": "</s>",
    "eos_token": "</s>",
    "unk_token": "</s>",
    "pad_token": "<pad>",
}
# In OPT's vocabulary no merge makes <s>, <mask>, <|endoftext|>, madeupword0000 and their like.
_MADE_BY_NO_MERGE = re.compile(r"<[ -~]*>|\[[A-Z]+\]|madeupword\d{4}")


def is_bpe_file(path: Path) -> bool:
    """Whether the name is that of one of the two files: vocab.json, gpt2-merges.txt."""
    return path.name.endswith(("vocab.json", "merges.txt"))


def bpe_files(path: Path) -> tuple[Path, Path]:
    """The vocabulary and the merges, where `path` is one of them and the other lies beside it.

    Raises:
        ModelError: only one of them is there.
    """
    prefix = path.name.removesuffix("vocab.json").removesuffix("merges.txt")
    files = path.with_name(f"{prefix}vocab.json"), path.with_name(f"{prefix}merges.txt")
    for file, other in (files, files[::-1]):
        if os.path.isfile(other) and not os.path.isfile(file):
            raise ModelError(
                f"{file}: is not there, and {other.name} is of no use without it",
                "Download both from where the model comes from.",
            )
    return files


def read_bpe(path: Path) -> "tokenizers.Tokenizer":
    """The tokenizer of the two files, with no post-processor: nothing goes before a text.

    Raises:
        ModelError: a file is missing, broken or cut short, or another class of tokenizer's.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary, merges = bpe_files(path)
    _check_class(vocabulary)
    ids = _read_vocabulary(vocabulary, pre_tokenizers.ByteLevel.alphabet())
    pairs = _read_merges(merges, ids)
    made = {left + right for left, right in pairs}.union(pre_tokenizers.ByteLevel.alphabet())
    _check_all_made(vocabulary, merges, ids, made, len(pairs))
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=configured_flag(vocabulary, "add_prefix_space") or False
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = _special_tokens(vocabulary)
    tokenizer.add_special_tokens([AddedToken(token) for token in special if token in ids])
    return tokenizer


def byte_of_character() -> dict[str, int]:
    """The byte that each of the 256 printable characters stands for.

    Those that are printable in Latin-1 stand for themselves, the others for what is left, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(256 + place): byte for place, byte in enumerate(others)}


def _check_class(path: Path) -> None:
    """Other classes read files of these names by another pattern: Qwen2Tokenizer cuts digits."""
    name = json_beside(path, "tokenizer_config.json").get("tokenizer_class")
    if name is not None and name not in _CLASSES:
        raise ModelError(
            f"{path.parent / 'tokenizer_config.json'}: tokenizer_class is {name!r}, and "
            f"{path.name} can be read as {_CLASSES[0]}'s alone",
            "Give the model's tokenizer.json with --tokenizer.",
        )


def _read_vocabulary(path: Path, alphabet: Collection[str]) -> dict[str, int]:
    """Token -> id, where the ids run from 0 without a gap."""
    ids = read_json_object(path)
    token_of_id: dict[int, str] = {}
    for token, token_id in ids.items():
        if type(token_id) is not int or token_id < 0:  # True is an int too
            raise ModelError(
                f"{path}: the id of {token!r} is {token_id!r}", "Expected: whole numbers from 0."
            )
        if token_id in token_of_id:
            raise ModelError(
                f"{path}: {token_of_id[token_id]!r} and {token!r} have one id, {token_id}",
                IS_IT_COMPLETE,
            )
        token_of_id[token_id] = token
    for token_id in range(len(ids)):
        if token_id not in token_of_id:
            raise ModelError(
                f"{path}: has no token of id {token_id}, and ids up to {max(token_of_id)}",
                IS_IT_COMPLETE,
            )
    for character in sorted(alphabet):
        if character not in ids:  # BPE would drop that byte from a text
            raise ModelError(
                f"{path}: has no token {character!r}, which stands for a byte",
                "Is it GPT-2's byte-level BPE? It has a token for each of the 256 bytes.",
            )
    return ids


def _read_merges(path: Path, ids: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs in the order of the file, each and its result in the vocabulary."""
    try:
        lines = read_file(path).decode().rstrip("\r\n").split("\n")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: not UTF-8: {error}", IS_IT_COMPLETE) from error
    start = 1 if lines[0].startswith("#version") else 0
    pairs = []
    for number, line in enumerate(lines[start:], start + 1):
        left, space, right = line.removesuffix("\r").partition(" ")
        if not left or not right or " " in right:
            raise ModelError(
                f"{path}, line {number}: is no pair of tokens: {line[:60]!r}", IS_IT_COMPLETE
            )
        for token in (left, right, left + right):
            if token not in ids:
                raise ModelError(
                    f"{path}, line {number}: merges {left!r} and {right!r}, and the vocabulary "
                    f"has no {token!r}",
                    _DO_THEY_BELONG_TOGETHER,
                )
        pairs.append((left, right))
    return pairs


def _check_all_made(
    vocabulary: Path, merges: Path, ids: dict[str, int], made: set[str], pairs: int
) -> None:
    """Refuse merges that leave tokens of the vocabulary out of reach: the file was cut."""
    named = {*_special_tokens(vocabulary), *json_beside(vocabulary, "added_tokens.json")}
    missing = [
        token
        for token in sorted(ids, key=ids.__getitem__)
        if token not in made and token not in named and not _MADE_BY_NO_MERGE.fullmatch(token)
    ]
    if missing:
        raise ModelError(
            f"{merges}: has {pairs:,} merges, and none makes {len(missing):,} of the "
            f"{len(ids):,} tokens of {vocabulary.name}, {missing[0]!r} the first",
            f"{_DO_THEY_BELONG_TOGETHER} A token that no merge is to make must be named in "
            f"added_tokens.json beside it: {json.dumps({missing[0]: ids[missing[0]]})}.",
        )


def _special_tokens(path: Path) -> set[str]:
    return {configured_token(path, name) or usual for name, usual in _SPECIAL_TOKENS.items()}
