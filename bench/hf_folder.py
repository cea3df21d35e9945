"""A Hugging Face directory of a published shape, with random weights, that other engines read."""

import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
from safetensors.numpy import save_file

from cupyllama.bench.shapes import SHAPES
from cupyllama.checkpoint.fields import stage_fields
from cupyllama.config import load_config

SHAPES = SHAPES | {"tiny": (2, 128, 344, 4, 2, 32000)}  # to try a comparison without a GPU
WEIGHT_STD = 0.02  # of an untrained model
WRITERS = 16  # threads, each with a layer in float16 and a matrix in float32: 1.6 GB of LLaMA-30B
INDEX = "model.safetensors.index.json"


def write_folder(folder: Path, shape: str) -> None:
    """config.json and weights in float16 in `folder`, unless they are there.

    Raises:
        click.ClickException: it holds another model.
    """
    config, path = config_json(shape), folder / "config.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != config:
        raise click.ClickException(f"{path}: is of another model. Give another --folder.")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if not (folder / INDEX).exists():  # written last
        write_weights(folder)


def config_json(shape: str) -> dict[str, Any]:
    """The config.json of a shape."""
    layers, hidden, intermediate, heads, kv_heads, vocab = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": vocab,
    }


def write_weights(folder: Path) -> None:
    """A file a layer, and one for the ends; norms are 1, all else has the deviation WEIGHT_STD."""
    config = load_config(folder)
    parts: dict[int | None, dict[str, tuple[int, ...]]] = {}
    for layer, field in stage_fields(config, range(config.num_hidden_layers)):
        parts.setdefault(layer, {}).update(zip(field.parts, field.shapes, strict=True))

    def write(layer: int | None) -> dict[str, str]:
        file = f"model-{'ends' if layer is None else f'{layer:05d}'}.safetensors"
        tensors = {name: random_tensor(name, shape) for name, shape in parts[layer].items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        return dict.fromkeys(tensors, file)

    weight_map: dict[str, str] = {}
    with ThreadPoolExecutor(min(WRITERS, os.cpu_count() or 1)) as pool:
        for names in pool.map(write, parts):
            weight_map |= names
    size = sum((folder / file).stat().st_size for file in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The same for the same name, in float16."""
    if len(shape) == 1:
        return np.ones(shape, np.float16)
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    values = generator.standard_normal(shape, np.float32)
    values *= WEIGHT_STD
    return values.astype(np.float16)


def write_tokenizer(folder: Path, model: Path) -> None:
    """tokenizer.json in `folder`, which tokenises as the SentencePiece BPE `model` does.

    Left to read tokenizer.model, transformers 5 ranks merges by id, where SentencePiece goes by
    score: LLaMA's "▁▁" then wins over the word behind it.
    """
    import sentencepiece
    from tokenizers import Tokenizer, models, normalizers, processors

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = range(pieces.get_piece_size())
    vocabulary = {pieces.id_to_piece(index): index for index in ids}
    special = (pieces.is_control, pieces.is_unknown, pieces.is_byte, pieces.is_unused)
    normal = [index for index in ids if not any(test(index) for test in special)]
    merges = []
    for index in sorted(normal, key=lambda index: -pieces.get_score(index)):
        piece = pieces.id_to_piece(index)
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
    named = {"unk": pieces.unk_id(), "bos": pieces.bos_id(), "eos": pieces.eos_id()}
    names = {f"{kind}_token": pieces.id_to_piece(index) for kind, index in named.items()}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=names["unk_token"],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[names["bos_token"], "$A"],
        special_tokens=[(names["bos_token"], named["bos"])],
    )
    tokenizer.add_special_tokens(list(names.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, **names}
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
