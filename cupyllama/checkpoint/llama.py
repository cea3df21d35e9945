"""Weight names of the LLaMA family, as Hugging Face writes them."""

from cupyllama.checkpoint.names import NameTable, Part, Parts
from cupyllama.config_llama import LlamaConfig

_ATTENTION = "model.layers.{}.self_attn."
_MLP = "model.layers.{}.mlp."

_WEIGHTS: Parts = {
    "model.embed_tokens.weight": Part("embed_tokens", ("vocab_size", "hidden_size")),
    "model.layers.{}.input_layernorm.weight": Part("input_layernorm", ("hidden_size",)),
    _ATTENTION + "q_proj.weight": Part("qkv_proj", ("q_size", "hidden_size")),
    _ATTENTION + "k_proj.weight": Part("qkv_proj", ("kv_size", "hidden_size")),
    _ATTENTION + "v_proj.weight": Part("qkv_proj", ("kv_size", "hidden_size")),
    _ATTENTION + "o_proj.weight": Part("o_proj", ("hidden_size", "q_size")),
    _ATTENTION + "rotary_emb.inv_freq": None,
    "model.layers.{}.post_attention_layernorm.weight": Part(
        "post_attention_layernorm", ("hidden_size",)
    ),
    _MLP + "gate_proj.weight": Part("gate_up_proj", ("intermediate_size", "hidden_size")),
    _MLP + "up_proj.weight": Part("gate_up_proj", ("intermediate_size", "hidden_size")),
    _MLP + "down_proj.weight": Part("down_proj", ("hidden_size", "intermediate_size")),
    "model.norm.weight": Part("norm", ("hidden_size",)),
}
_BIASES: Parts = {
    _ATTENTION + "q_proj.bias": Part("qkv_bias", ("q_size",)),
    _ATTENTION + "k_proj.bias": Part("qkv_bias", ("kv_size",)),
    _ATTENTION + "v_proj.bias": Part("qkv_bias", ("kv_size",)),
    _ATTENTION + "o_proj.bias": Part("o_bias", ("hidden_size",)),
}
_HEAD: Parts = {"lm_head.weight": Part("lm_head", ("head_rows", "hidden_size"))}


def _parts(config: LlamaConfig) -> Parts:
    table = _WEIGHTS | _BIASES if config.attention_bias else dict(_WEIGHTS)
    return table if config.tie_word_embeddings else table | _HEAD


LLAMA_NAMES = NameTable(
    _parts,
    matrices=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    first=("embed_tokens",),
    last=("norm", "lm_head"),
)
