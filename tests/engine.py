"""The engine as the tests drive it: token rows in, scores out, no text and no files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cupyllama.checkpoint.source import open_checkpoint
from cupyllama.config import load_config
from cupyllama.evaluate import ChoiceScores, Line, evaluate, plan
from cupyllama.families import Stage, family_of
from cupyllama.loading import load_stage
from cupyllama.ops import reference
from cupyllama.packing import TokenRow


def build_stage(
    model: Path, ops=reference, dtype=np.float32, positions: int = 512, quantize: str | None = None
) -> Stage:
    """All layers of a checkpoint directory, for rows of `positions` tokens if it takes them."""
    config = load_config(model)
    layers = range(config.num_hidden_layers)
    checkpoint, dtype = open_checkpoint(model), np.dtype(dtype)
    weights = load_stage(checkpoint, config, layers, dtype, ops, quantize=quantize)
    positions = min(positions, config.max_position_embeddings)
    return family_of(config).model.Stage(config, weights, ops, positions)


def question_rows(questions: Sequence[dict]) -> list[TokenRow]:
    """One row a choice of questions given as token ids: {"context": …, "endings": […]}."""
    rows: list[TokenRow] = []
    for question in questions:
        context = question["context"]
        for ending in question["endings"]:
            rows.append(TokenRow(context + ending, len(context), len(rows)))
    return rows


def score_rows(
    stage: Stage, rows: Sequence[TokenRow], micro_batch_tokens: int = 1024
) -> ChoiceScores:
    """Every row's log-likelihood."""
    scores = ChoiceScores.empty(len(rows), micro_batch_tokens)
    evaluate(Line(stage), rows, plan(rows, micro_batch_tokens, stage.ops), scores)
    return scores
