"""Write an OPT of Hugging Face's form as Metaseq has it: model parts, each a file of torch.save.

    python tools/make_metaseq.py --model path/to/opt --parts 2 --output path/to/metaseq
    python tools/make_metaseq.py --torch --output tests/data/metaseq

Without --model, a tiny one is drawn.  The files have what Metaseq's scripts/reshard_fsdp.py leaves
of a training run: under "model" the weights, those of a layer being views of one storage, as FSDP
had them; under "cfg" the settings, as a container of omegaconf's; and the rest of its state.

With --torch they are written by torch.save and the settings are made by omegaconf itself.  Without,
neither need be there: the zip and the pickle are written here, and the settings are of classes that
have omegaconf's names and fields.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pickle
import re
import sys
import zlib
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
opt_shapes = importlib.import_module("tiny_opt").opt_shapes

SEED = 7
UPDATES = 143_000
# Small enough to be kept: 32 is the least size of a head, 64 the least number of positions.
DRAWN = {
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "ffn_dim": 40,
    "hidden_size": 64,
    "max_position_embeddings": 64,
    "model_type": "opt",
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "torch_dtype": "float16",
    "vocab_size": 48,
    "word_embed_proj_dim": 64,
}
# Where both forms have one name for a weight: the axis that parts are cut along, None for a copy.
_AXES = {
    "embed_tokens.weight": 0,
    "embed_positions.weight": None,
    "self_attn.out_proj.weight": 1,
    "self_attn.out_proj.bias": None,
    "fc1.weight": 0,
    "fc1.bias": 0,
    "fc2.weight": 1,
    "fc2.bias": None,
    "self_attn_layer_norm.weight": None,
    "self_attn_layer_norm.bias": None,
    "final_layer_norm.weight": None,
    "final_layer_norm.bias": None,
}
_RENAMED = {
    "model.decoder.final_layer_norm.weight": "decoder.layer_norm.weight",
    "model.decoder.final_layer_norm.bias": "decoder.layer_norm.bias",
    "model.decoder.project_in.weight": "decoder.project_in_dim.weight",
    "model.decoder.project_out.weight": "decoder.project_out_dim.weight",
}


def drawn_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tiny model's, by Hugging Face's names; the same wherever they are drawn."""
    return {
        name: (
            np.random.default_rng([SEED, zlib.crc32(name.encode())]).integers(-2000, 2001, shape)
            / 8192
        ).astype(config["torch_dtype"])
        for name, shape in opt_shapes(config).items()
    }


def part_tensors(tensors: dict[str, np.ndarray], part: int, parts: int) -> dict[str, np.ndarray]:
    """What one part has of a Hugging Face checkpoint's tensors, by Metaseq's names."""

    def cut(values: np.ndarray, axis: int | None) -> np.ndarray:
        return values if axis is None else np.split(values, parts, axis)[part]

    embedding = tensors["model.decoder.embed_tokens.weight"]
    found = {"decoder.version": np.full(1, 3, embedding.dtype)}
    for name, values in tensors.items():
        new = name.removeprefix("model.")
        kind = re.sub(r"^decoder\.(layers\.\d+\.)?", "", new)
        if name in _RENAMED:
            found[_RENAMED[name]] = values
        elif "k_proj" in name:
            stacked = (name.replace("k_proj", other) for other in ("k_proj", "v_proj", "q_proj"))
            rows = [cut(tensors[other], 0) for other in stacked]
            found[new.replace("k_proj", "qkv_proj")] = np.concatenate(rows)
        elif not re.search("v_proj|q_proj|lm_head", name):
            found[new] = cut(values, _AXES[kind])
    found["decoder.output_projection.weight"] = (
        cut(tensors["lm_head.weight"], 0)
        if "lm_head.weight" in tensors
        else found["decoder.embed_tokens.weight"]
    )
    return found


def settings_of(config: dict[str, Any], parts: int) -> dict[str, Any]:
    """The settings of a training run, as far as Metaseq's have a say in what is computed."""
    return {
        "_name": None,
        "common": {"fp16": True, "seed": 1, "model_parallel_size": parts},
        "task": {"_name": "streaming_language_modeling", "tokens_per_sample": 2048},
        "model": {
            "_name": "transformer_lm_megatron",
            "activation_fn": config["activation_function"],
            "dropout": 0.1,
            "decoder_embed_dim": config["hidden_size"],
            "decoder_input_dim": config["word_embed_proj_dim"],
            "decoder_output_dim": config["word_embed_proj_dim"],
            "decoder_ffn_embed_dim": config["ffn_dim"],
            "decoder_layers": config["num_hidden_layers"],
            "decoder_attention_heads": config["num_attention_heads"],
            "decoder_normalize_before": config["do_layer_norm_before"],
            "share_decoder_input_output_embed": config.get("tie_word_embeddings", True),
            "decoder_learned_pos": True,
            "no_scale_embedding": True,
            "alibi": False,
            "max_target_positions": "${task.tokens_per_sample}",
        },
        "optimizer": {"_name": "adam", "adam_betas": [0.9, 0.95], "lr": [6e-4]},
    }


def rest_of(updates: int) -> dict[str, Any]:
    """What else a part has."""
    history = {"optimizer_name": "MemoryEfficientFP16Optimizer", "num_updates": updates}
    meters = OrderedDict(train=OrderedDict(loss=(10, {"val": 2.5, "round": 3})))
    return {
        "criterion": None,
        "optimizer_history": [history],
        "task_state": {},
        "extra_state": {"metrics": meters, "previous_training_time": 3600.0, "val_loss": None},
        "shard_metadata": {},
    }


def stand_in_container(settings: dict[str, Any]) -> bytes:
    """The pickle of a DictConfig, as omegaconf 2 has it, of classes that only bear its names."""
    names = {
        "omegaconf.dictconfig": "DictConfig",
        "omegaconf.listconfig": "ListConfig",
        "omegaconf.nodes": "AnyNode",
        "omegaconf.base": "ContainerMetadata",
    }
    modules = {"omegaconf": ModuleType("omegaconf")}
    kinds = {}
    for module, name in names.items():
        modules[module] = ModuleType(module)
        kinds[name] = type(name, (), {"__module__": module})
        setattr(modules[module], name, kinds[name])

    def make(value: Any, parent: Any) -> Any:
        kind = {dict: "DictConfig", list: "ListConfig"}.get(type(value), "AnyNode")
        node, metadata = kinds[kind](), kinds["ContainerMetadata"]()
        metadata.__dict__ = {"ref_type": Any, "object_type": type(value), "optional": True}
        node.__dict__ = {"_metadata": metadata, "_parent": parent}
        if kind == "DictConfig":
            node._content = {key: make(inner, node) for key, inner in value.items()}
        elif kind == "ListConfig":
            node._content = [make(inner, node) for inner in value]
        else:
            node._val = value
        return node

    shadowed = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        return pickle.dumps(make(settings, None), protocol=2)
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(shadowed)


def flattened(tensors: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, int]]:
    """Of each tensor, the storage that it shares with those of its layer, and where it begins."""
    groups: dict[str, dict[int, np.ndarray]] = {}
    group_of = {name: re.match(r"(decoder\.layers\.\d+)?", name)[0] for name in tensors}
    for name, values in tensors.items():  # a tied head is the embedding itself
        groups.setdefault(group_of[name], {})[values.__array_interface__["data"][0]] = values
    begins, storages = {}, {}
    for group, members in groups.items():
        storages[group] = np.concatenate([values.reshape(-1) for values in members.values()])
        begin = 0
        for address, values in members.items():
            begins[address] = begin
            begin += values.size
    return {
        name: (storages[group_of[name]], begins[values.__array_interface__["data"][0]])
        for name, values in tensors.items()
    }


def write_part(path: Path, tensors: dict[str, np.ndarray], pickled: dict[str, bytes]) -> None:
    """A part without torch: the rest of what it has comes as pickles of protocol 2."""
    makers = importlib.import_module("checkpoint_makers")
    keys: dict[int, str] = {}
    storages, model = {}, {}
    for name, (storage, begin) in flattened(tensors).items():
        key = keys.setdefault(id(storage), str(len(keys)))
        storages[key] = storage.tobytes()
        shape = tensors[name].shape
        kind = makers.STORAGES[storage.dtype]
        strides = makers.contiguous(shape)
        model[name] = makers.rebuild(key, kind, storage.size, begin, shape, strides)
    rest = {key: makers.Pickled(value) for key, value in pickled.items()}
    makers.write_archive(path, makers.dumps({"model": model, **rest}), storages, folder=path.stem)


def write_part_by_torch(
    path: Path, tensors: dict[str, np.ndarray], settings: dict[str, Any], rest: dict[str, Any]
) -> None:
    """A part as Metaseq would write it."""
    import torch
    from omegaconf import OmegaConf

    views = {}
    whole: dict[int, Any] = {}
    for name, (storage, begin) in flattened(tensors).items():
        flat = whole.setdefault(id(storage), torch.from_numpy(storage))
        values = tensors[name]
        views[name] = flat[begin : begin + values.size].view(values.shape)
    torch.save({"model": views, "cfg": OmegaConf.create(settings), **rest}, path)


def write_metaseq(
    directory: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    parts: int = 2,
    by_torch: bool = False,
    cfg: bytes | None = None,
    updates: int = UPDATES,
) -> Path:
    """All parts of a model of Hugging Face's form.

    Args:
        cfg: a pickle to have as "cfg" instead, where torch does not write.
    """
    directory.mkdir(parents=True, exist_ok=True)
    settings, rest = settings_of(config, parts), rest_of(updates)
    for part in range(parts):
        path = directory / f"reshard-model_part-{part}.pt"
        found = part_tensors(tensors, part, parts)
        if by_torch:
            write_part_by_torch(path, found, settings, rest)
        else:
            pickled = {"cfg": container(settings) if cfg is None else cfg}
            pickled |= {key: pickle.dumps(value, protocol=2) for key, value in rest.items()}
            write_part(path, found, pickled)
    return directory


def container(settings: dict[str, Any]) -> bytes:
    """The pickle of the settings as omegaconf's, of its own classes where it is installed."""
    try:
        from omegaconf import OmegaConf
    except ImportError:
        return stand_in_container(settings)
    return pickle.dumps(OmegaConf.create(settings), protocol=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="directory with model*.safetensors")
    parser.add_argument("--parts", type=int, default=2)
    parser.add_argument("--torch", action="store_true", help="let torch.save write")
    parser.add_argument("--output", type=Path, required=True, help="the directory to write")
    arguments = parser.parse_args()
    if arguments.model is None:
        config, tensors = DRAWN, drawn_tensors(DRAWN)
    else:
        from safetensors.numpy import load_file

        config = json.loads((arguments.model / "config.json").read_text())
        tensors = {}
        for file in sorted(arguments.model.glob("model*.safetensors")):
            tensors |= load_file(file)
    write_metaseq(arguments.output, config, tensors, arguments.parts, arguments.torch)
    total = sum(path.stat().st_size for path in arguments.output.glob("*.pt"))
    print(f"{arguments.output}: {arguments.parts} parts, {total:,} bytes")


if __name__ == "__main__":
    main()
