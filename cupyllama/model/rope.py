"""Rotary position tables."""

import numpy as np

from cupyllama.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position by which each pair of elements turns: (head_dim / 2,) float64.

    theta^(-2i / head_dim) (Su et al. 2021), scaled as `rope_scaling` says: linear divides all of
    them by a factor (Chen et al. 2023); llama3 keeps the fast ones, divides the slow ones and
    blends between (transformers, modeling_rope_utils).
    """
    head_dim = config.head_dim
    inverse = config.rope_theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    if scaling.rope_type == "linear":
        return inverse / scaling.factor
    turns = scaling.original_max_position_embeddings * inverse / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return keep * inverse + (1 - keep) * inverse / scaling.factor


def rope_tables(config: ModelConfig, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position times inverse frequency: two of (positions, head_dim / 2) float32."""
    angles = np.arange(positions, dtype=np.float64)[:, None] * inverse_frequencies(config)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
