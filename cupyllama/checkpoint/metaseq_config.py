"""The settings of a Metaseq training run, as its checkpoints have them, to an OPT's config.

`cfg` is a mapping, an argparse.Namespace or an omegaconf.DictConfig, and so is `cfg.model`; older
checkpoints have `args`. They come as `pickles.Instance`s, of which only what is asked for is read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cupyllama.checkpoint.pickles import Instance
from cupyllama.checkpoint.source import INCOMPLETE, Tensor
from cupyllama.config_opt import POSITION_OFFSET, OptConfig, read_opt_config
from cupyllama.config_reader import ConfigReader, shown
from cupyllama.errors import ModelError

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HEADS = "decoder_attention_heads"
_NORM_FIRST = "decoder_normalize_before"
# What the model does, whatever its settings are called.
_ONLY = {"activation_fn": "relu", "no_scale_embedding": True, "alibi": False}
_LARGEST = 1 << 62
_CONFIG_BESIDE = (
    "Put a config.json beside the parts: that of the same model in Hugging Face's form, as of "
    "facebook/opt-125m."
)


def config_of(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> OptConfig:
    """The config of a model.

    Args:
        path: the file that messages name.
        tensors: of all parts, by Hugging Face's names.
        state: what a part has besides.

    Raises:
        ModelError: the number of heads is not said, or the settings and the weights contradict
            each other, or are not those of an OPT.
    """
    heads = _setting(state, _HEADS)
    if type(heads) is not int:
        found = "does not say" if heads is None else f"says {shown(heads)} for"
        raise ModelError(
            f"{path}: its cfg {found} {_HEADS}, and the shapes of weights cannot tell",
            _CONFIG_BESIDE,
        )
    for name, value in _ONLY.items():
        if (found := _setting(state, name)) not in (None, value):
            raise ModelError(
                f"{path}: its cfg has {name} = {shown(found)}",
                f"Supported: {value}, as OPT has it.",
            )
    embedding = _shaped(path, tensors, "model.decoder.embed_tokens.weight", 2)
    hidden = _shaped(path, tensors, "model.decoder.layers.0.self_attn.out_proj.weight", 2).shape[0]
    inner = _shaped(path, tensors, "model.decoder.layers.0.fc1.weight", 2).shape[0]
    positions = _shaped(path, tensors, "model.decoder.embed_positions.weight", 2).shape[0]
    numbers = [name.split(".")[3] for name in tensors if name.startswith("model.decoder.layers.")]
    layers = 1 + max(map(int, numbers))
    shapes = {
        "decoder_layers": layers,
        "decoder_embed_dim": hidden,
        "decoder_ffn_embed_dim": inner,
        _NORM_FIRST: "model.decoder.final_layer_norm.weight" in tensors,
    }
    for name, value in shapes.items():
        if (found := _setting(state, name)) not in (None, value):
            raise ModelError(
                f"{path}: its cfg has {name} = {shown(found)}, but the weights make it {value}",
                f"Do they belong to the same model? {_CONFIG_BESIDE}",
            )
    if embedding.dtype not in _DTYPES:
        raise ModelError(f"{path}: the embedding is stored as {embedding.dtype}")
    raw = {
        "vocab_size": embedding.shape[0],
        "word_embed_proj_dim": embedding.shape[1],
        "hidden_size": hidden,
        "ffn_dim": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions - POSITION_OFFSET,
        "do_layer_norm_before": shapes[_NORM_FIRST],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "dtype": _DTYPES[embedding.dtype],
    }
    return read_opt_config(ConfigReader(path, raw), "opt")


def check_config_beside(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse a config.json of another number of heads: no shape would tell.

    Raises:
        ModelError: as said.
    """
    beside, said = path.with_name("config.json"), _setting(state, _HEADS)
    if type(said) is not int or not beside.is_file():
        return
    try:
        found = json.loads(beside.read_bytes()).get("num_attention_heads", said)
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # whoever reads it as a config says what is wrong with it
    if found != said:
        raise ModelError(
            f"{beside}: has {shown(found)} num_attention_heads, but the cfg in {path.name} has "
            f"{said} {_HEADS}",
            "Do config.json and the weights belong to the same model?",
        )


def says_tied(state: Mapping[str, Any]) -> bool | None:
    """Whether the head is the embedding; None where the settings do not say."""
    said = _setting(state, "share_decoder_input_output_embed")
    return said if isinstance(said, bool) else None


def stored_parts(state: Mapping[str, Any]) -> int | None:
    """How many parts the model was trained in; it may have been put together since."""
    for holder in (_member(state.get("cfg"), "common"), *_model_settings(state)):
        if type(found := _member(holder, "model_parallel_size")) is int:
            return found
    return None


def steps(state: Mapping[str, Any]) -> int | None:
    """After how many updates the model was saved; None where it does not say."""
    history = state.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else None
    for holder in (last, state.get("extra_state"), state):
        if type(found := _member(holder, "num_updates")) is int:
            return found
    return None


def _shaped(path: Path, tensors: Mapping[str, Tensor], name: str, dimensions: int) -> Tensor:
    if name not in tensors or len(tensors[name].shape) != dimensions:
        raise ModelError(f"{path}: has no matrix for {name}", INCOMPLETE)
    return tensors[name]


def _setting(state: Mapping[str, Any], name: str) -> Any:
    """What the model was made with; None where it is not said."""
    found = (_member(holder, name) for holder in _model_settings(state))
    # A container is no setting; and no message could show it, small as it may be in the pickle.
    return next((value for value in found if isinstance(value, (str, int, float))), None)


def _model_settings(state: Mapping[str, Any]) -> list[Any]:
    cfg, args = state.get("cfg"), state.get("args")
    return [_member(cfg, "model"), cfg, args]


def _member(holder: Any, name: str) -> Any:
    """`holder.name` or `holder[name]`, whatever kind of object it is said to be."""
    if isinstance(holder, Instance) and isinstance(holder.state, dict):
        # An omegaconf container has its nodes in _content; of others, the state is the attributes.
        content = holder.state.get("_content", holder.state)
    else:
        content = holder
    return _value(content.get(name)) if isinstance(content, dict) else None


def _value(found: Any) -> Any:
    """What a node of omegaconf or an enum stands for, else what it is."""
    if isinstance(found, Instance) and isinstance(found.state, dict) and "_val" in found.state:
        found = found.state["_val"]
    if isinstance(found, Instance) and found.state is None and found.arguments:
        last = found.arguments[-1]  # of the enum's class alone, or of getattr and the class
        return last if isinstance(last, str) else found
    # Beyond some size, Python refuses to print a number.
    return None if isinstance(found, int) and abs(found) > _LARGEST else found
