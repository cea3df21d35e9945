"""Record what Hugging Face's GPT-2 tokenizers make of awkward texts, as truth for the tests.

    python tools/record_opt_tokenizer.py --output tests/data/opt_bpe

Needs transformers 4, whose GPT2Tokenizer is a BPE in Python alone, next to the fast one.  A small
byte-level BPE is trained on the packaged demo's questions and on generated texts of another seed
than the recorded ones, and written as OPT's files are: ids in another order than the merges, its
special tokens first, and tokens that no merge makes last.

The tool refuses to record what would be no truth: a text on which the two tokenizers differ, or
tokenizer.json gives other ids when it is loaded again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import tokenizers
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
awkward_texts = importlib.import_module("awkward_texts").awkward_texts

MERGES = 3000
TEXTS = 2000
SEED, TRAINING_SEED = 5, 6
FIRST_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
LAST_TOKENS = ["<|endoftext|>", "madeupword0000", "<mask>"]  # as in OPT's vocabulary


def training_texts() -> list[str]:
    """The demo's questions, in English, and the awkward ones."""
    lines = (ROOT / "cupyllama" / "tasks" / "demo" / "questions.jsonl").read_text().splitlines()
    questions = [json.loads(line) for line in lines]
    return [
        *(" ".join([q["activity_label"], q["ctx"], *q["endings"]]) for q in questions),
        *awkward_texts(TEXTS, TRAINING_SEED),
    ]


def train() -> list[tuple[str, str]]:
    """The pairs that a BPE merges, in their order."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=len(alphabet) + MERGES, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(training_texts(), trainer)
    return [tuple(pair) for pair in json.loads(made.to_str())["model"]["merges"]]


def write_files(directory: Path, merges: list[tuple[str, str]]) -> None:
    """vocab.json, merges.txt and tokenizer_config.json, as facebook/opt-* have them."""
    tokens = sorted({*tokenizers.pre_tokenizers.ByteLevel.alphabet(), *map("".join, merges)})
    numbered = {token: i for i, token in enumerate([*FIRST_TOKENS, *tokens, *LAST_TOKENS])}
    vocabulary = json.dumps(numbered, ensure_ascii=False, separators=(",", ":"))
    (directory / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    token = {"__type": "AddedToken", **flags}
    settings = {
        "errors": "replace",
        "unk_token": {"content": "</s>", **token},
        "bos_token": {"content": "</s>", **token},
        "eos_token": {"content": "</s>", **token},
        "pad_token": {"content": "<pad>", **token},
        "add_prefix_space": False,
        "add_bos_token": True,
        "tokenizer_class": "GPT2Tokenizer",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def frame_of(saved: Path) -> str:
    """tokenizer.json without its vocabulary and merges, which vocab.json and merges.txt have."""
    content = json.loads(saved.read_text(encoding="utf-8"))
    content["model"].update(vocab={}, merges=[])
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def record(directory: Path, texts: list[str]) -> list[list[int]]:
    """Ids of each text, BOS first; tokenizer_frame.json beside the other files."""
    slow = transformers.GPT2Tokenizer.from_pretrained(directory)
    fast = transformers.GPT2TokenizerFast.from_pretrained(directory)
    if slow.is_fast:
        raise SystemExit(f"transformers {transformers.__version__} has no tokenizer in Python")
    with tempfile.TemporaryDirectory() as scratch:
        fast.save_pretrained(scratch)
        again = tokenizers.Tokenizer.from_file(f"{scratch}/tokenizer.json")
        (directory / "tokenizer_frame.json").write_text(frame_of(Path(scratch, "tokenizer.json")))
    recorded = []
    for text in texts:
        ids = slow(text).input_ids
        if not ids == fast(text).input_ids == again.encode(text).ids:
            raise SystemExit(f"the tokenizers differ on {text!r}")
        recorded.append(ids)
    return recorded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the directory to write")
    arguments = parser.parse_args()
    arguments.output.mkdir(exist_ok=True)
    write_files(arguments.output, train())
    texts = awkward_texts(TEXTS, SEED)
    rows = record(arguments.output, texts)
    np.savez_compressed(
        arguments.output / "ids.npz",
        ids=np.concatenate(rows).astype(np.uint16),
        lengths=np.array([len(row) for row in rows], np.uint16),
        texts_crc32=np.uint32(zlib.crc32("\0".join(texts).encode())),
        seed=np.int64(SEED),
    )
    print(f"{arguments.output}: {len(rows)} texts, {sum(map(len, rows))} ids")


if __name__ == "__main__":
    main()
