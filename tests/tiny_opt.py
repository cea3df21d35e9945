"""What is OPT's own about the tiny models: configurations, tensors, and how they are drawn."""

from __future__ import annotations

import math
from typing import Any

from tiny_spread import LOGIT_STD, RESIDUAL_STD, SCORE_STD


def _config(**changes: Any) -> dict[str, Any]:
    """An OPT ``config.json`` as Transformers 4 wrote it, with `changes`."""
    config: dict[str, Any] = {
        "_remove_final_layer_norm": False,
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "do_layer_norm_before": True,
        "dropout": 0.1,
        "eos_token_id": 2,
        "ffn_dim": 256,
        "hidden_size": 128,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "max_position_embeddings": 512,
        "model_type": "opt",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "pad_token_id": 1,
        "prefix": "</s>",
        "torch_dtype": "float32",
        "transformers_version": "4.21.0.dev0",
        "use_cache": True,
        "vocab_size": 320,
        "word_embed_proj_dim": 128,
    }
    config.update(changes)
    return config


OPT_MODELS: dict[str, dict[str, Any]] = {
    # All of the published ones but the 350m.
    "opt": _config(),
    # The 350m: norms behind the residual sums, none at the end, a narrower embedding.  No size is
    # a multiple of a vector's width.
    "opt_350m": _config(
        do_layer_norm_before=False,
        ffn_dim=149,
        hidden_size=102,
        num_attention_heads=3,
        vocab_size=331,
        word_embed_proj_dim=43,
    ),
    # As Transformers 5 writes it, with a head of its own, the projections, and few positions.
    "opt_untied": {
        key: value
        for key, value in _config(
            dtype="float32",
            enable_bias=True,
            ffn_dim=96,
            hidden_size=160,
            layer_norm_elementwise_affine=True,
            max_position_embeddings=64,
            num_attention_heads=2,
            num_hidden_layers=2,
            tie_word_embeddings=False,
            transformers_version="5.17.0",
            word_embed_proj_dim=64,
        ).items()
        if key not in ("torch_dtype", "prefix")
    },
}


def opt_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by Hugging Face's names."""
    hidden, inner, vocab = config["hidden_size"], config["ffn_dim"], config["vocab_size"]
    narrow = config["word_embed_proj_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.decoder.embed_tokens.weight": (vocab, narrow),
        "model.decoder.embed_positions.weight": (config["max_position_embeddings"] + 2, hidden),
    }
    if narrow != hidden:
        shapes["model.decoder.project_in.weight"] = (hidden, narrow)
        shapes["model.decoder.project_out.weight"] = (narrow, hidden)
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head.weight"] = (vocab, narrow)
    norms = ["model.decoder.final_layer_norm"] if config["do_layer_norm_before"] else []
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.decoder.layers.{layer}."
        norms += [prefix + "self_attn_layer_norm", prefix + "final_layer_norm"]
        matrices = {f"self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "out")}
        matrices |= {"fc1": (inner, hidden), "fc2": (hidden, inner)}
        for name, shape in matrices.items():
            shapes[f"{prefix}{name}.weight"] = shape
            shapes[f"{prefix}{name}.bias"] = shape[:1]
    for norm in norms:
        shapes[norm + ".weight"] = shapes[norm + ".bias"] = (hidden,)
    return shapes


def opt_std(tensor: str, shape: tuple[int, ...], config: dict[str, Any]) -> float:
    """The standard deviation to draw `tensor` with (norm weights are drawn around 1)."""
    logit_std = LOGIT_STD / math.sqrt(config["word_embed_proj_dim"])
    tied = config.get("tie_word_embeddings", True)
    embedding_std = logit_std if tied else RESIDUAL_STD
    # Behind a norm the residual stream has a mean square of 1.
    residual_std = embedding_std if config["do_layer_norm_before"] else 1.0
    part, kind = tensor.rsplit(".", 2)[-2:]
    if part.endswith("layer_norm"):
        return 0.1 if kind == "weight" else 0.3
    if part == "lm_head":
        return logit_std
    if part == "embed_tokens":
        return embedding_std
    if part == "embed_positions":
        return residual_std
    if kind == "bias":
        return residual_std if part in ("out_proj", "fc2") else 0.5
    output_std = {
        # A score is the dot product of q and k over sqrt(head_dim).
        "q_proj": math.sqrt(SCORE_STD),
        "k_proj": math.sqrt(SCORE_STD),
        "v_proj": 1.0,
        "out_proj": residual_std,
        "fc1": 1.5,
        "fc2": residual_std,
        "project_in": residual_std / embedding_std,
        "project_out": 1.0,
    }[part]
    return output_std / math.sqrt(shape[1])
