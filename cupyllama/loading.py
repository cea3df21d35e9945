"""The weights of a stage, from a checkpoint to the device."""

from collections.abc import Callable
from typing import Any

import numpy as np

from cupyllama.checkpoint.llama import check_names, stage_fields
from cupyllama.checkpoint.safetensors import SafetensorsCheckpoint
from cupyllama.config import ModelConfig
from cupyllama.model.llama import LayerWeights, StageWeights


def load_stage(
    checkpoint: SafetensorsCheckpoint,
    config: ModelConfig,
    layers: range,
    dtype: np.dtype,
    to_device: Callable[[np.ndarray], Any],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> StageWeights:
    """Read the tensors of `layers` and no others, fuse them, and hand each to `to_device`.

    Args:
        dtype: what the weights are stored as; conversion happens on the way.
        on_bytes: called with the bytes of each array as it is loaded.
    """
    check_names(checkpoint, config)
    ends: dict[str, Any] = {}
    by_layer: dict[int, dict[str, Any]] = {layer: {} for layer in layers}
    for layer, field in stage_fields(config, layers):
        host = np.empty(field.shape, dtype)
        first = 0
        for name, shape in zip(field.parts, field.shapes, strict=True):
            checkpoint.read_into(name, host[first : first + shape[0]])
            first += shape[0]
        target = ends if layer is None else by_layer[layer]
        target[field.name] = to_device(host)
        on_bytes(host.nbytes)
    if config.tie_word_embeddings and layers.stop == config.num_hidden_layers:
        ends["lm_head"] = ends["embed_tokens"]
        if layers.start > 0:
            del ends["embed_tokens"]
    return StageWeights([LayerWeights(**by_layer[layer]) for layer in layers], **ends)
