"""Model families, one file each, written against the names in `cupyllama.ops`.

Each file has three classes, and `cupyllama.families` names the files. LayerWeights, of one decoder
layer, and StageWeights(layers, …), of a contiguous slice of them, have the fields of the family's
name table, None for what a model has not; matrices may be `Quantized`. `stage` has what all Stages
are alike in.
Stage(config, weights, ops, positions, group) takes micro-batches through the slice by
forward(batch, hidden), and by next_logits(batch, hidden, cache) what is generated. Where ranks
share the matrices, config and weights are those of one of them, and `group.linear`,
`group.log_probs` and `group.logits` give all of them what `ops` would of the whole. What crosses
from stage to stage is one tensor, the residual stream, (tokens, hidden).
"""
