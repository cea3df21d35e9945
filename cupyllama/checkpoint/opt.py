"""Weight names of OPT, as Hugging Face writes them."""

from cupyllama.checkpoint.names import NameTable, Part, Parts
from cupyllama.config_opt import OptConfig

_LAYER = "model.decoder.layers.{}."
_ATTENTION = _LAYER + "self_attn."

_ENDS: Parts = {
    "model.decoder.embed_tokens.weight": Part(
        "embed_tokens", ("vocab_size", "word_embed_proj_dim")
    ),
    "model.decoder.embed_positions.weight": Part(
        "embed_positions", ("position_rows", "hidden_size")
    ),
    "model.decoder.version": None,
}
_LAYERS: Parts = {
    _LAYER + "self_attn_layer_norm.weight": Part("self_attn_layer_norm", ("hidden_size",)),
    _LAYER + "self_attn_layer_norm.bias": Part("self_attn_layer_norm_bias", ("hidden_size",)),
    _ATTENTION + "q_proj.weight": Part("qkv_proj", ("q_size", "hidden_size")),
    _ATTENTION + "k_proj.weight": Part("qkv_proj", ("kv_size", "hidden_size")),
    _ATTENTION + "v_proj.weight": Part("qkv_proj", ("kv_size", "hidden_size")),
    _ATTENTION + "q_proj.bias": Part("qkv_bias", ("q_size",)),
    _ATTENTION + "k_proj.bias": Part("qkv_bias", ("kv_size",)),
    _ATTENTION + "v_proj.bias": Part("qkv_bias", ("kv_size",)),
    _ATTENTION + "out_proj.weight": Part("out_proj", ("hidden_size", "q_size")),
    _ATTENTION + "out_proj.bias": Part("out_bias", ("hidden_size",)),
    _LAYER + "final_layer_norm.weight": Part("final_layer_norm", ("hidden_size",)),
    _LAYER + "final_layer_norm.bias": Part("final_layer_norm_bias", ("hidden_size",)),
    _LAYER + "fc1.weight": Part("fc1", ("ffn_dim", "hidden_size")),
    _LAYER + "fc1.bias": Part("fc1_bias", ("ffn_dim",)),
    _LAYER + "fc2.weight": Part("fc2", ("hidden_size", "ffn_dim")),
    _LAYER + "fc2.bias": Part("fc2_bias", ("hidden_size",)),
}
_PROJECTIONS: Parts = {
    "model.decoder.project_in.weight": Part("project_in", ("hidden_size", "word_embed_proj_dim")),
    "model.decoder.project_out.weight": Part("project_out", ("word_embed_proj_dim", "hidden_size")),
}
_FINAL_NORM: Parts = {
    "model.decoder.final_layer_norm.weight": Part("final_layer_norm", ("hidden_size",)),
    "model.decoder.final_layer_norm.bias": Part("final_layer_norm_bias", ("hidden_size",)),
}
_HEAD: Parts = {"lm_head.weight": Part("lm_head", ("head_rows", "word_embed_proj_dim"))}


def _parts(config: OptConfig) -> Parts:
    table = _ENDS | _LAYERS
    if config.projects:
        table |= _PROJECTIONS
    if config.do_layer_norm_before:  # after each block there is no need of one at the end
        table |= _FINAL_NORM
    return table if config.tie_word_embeddings else table | _HEAD


OPT_NAMES = NameTable(
    _parts,
    matrices=("qkv_proj", "out_proj", "fc1", "fc2"),
    first=("embed_tokens", "embed_positions", "project_in"),
    last=("final_layer_norm", "final_layer_norm_bias", "project_out", "lm_head"),
    older_prefixes={"decoder.": "model.decoder."},
)
