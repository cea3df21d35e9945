"""OPT's config.json."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from cupyllama.config import ModelConfig, Share
from cupyllama.config_reader import ConfigReader, shown
from cupyllama.packing import PADDING_SEGMENT

# Each model_type, and its classes.
CLASSES = {"opt": ("OPTForCausalLM",)}

# Rows of the table of positions before that of position 0: fairseq counted from the padding token
# on, which is 1.
POSITION_OFFSET = 2

_WITHOUT_EFFECT = frozenset({"dropout", "layerdrop", "init_std"})
_ONLY = {
    "enable_bias": (True,),
    "layer_norm_elementwise_affine": (True,),
    "_remove_final_layer_norm": (False,),
}


@dataclass(frozen=True)
class OptConfig(ModelConfig):
    """The numbers that define an OPT, under config.json's own names."""

    family: ClassVar[str] = "opt"

    ffn_dim: int
    word_embed_proj_dim: int  # columns of the embedding
    do_layer_norm_before: bool

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        ranks = 1 if self.share is None else self.share.size
        return self.hidden_size // (ranks * self.num_attention_heads)

    @property
    def intermediate_size(self) -> int:
        return self.ffn_dim

    @property
    def position_rows(self) -> int:
        """Rows of the table of positions."""
        return self.max_position_embeddings + POSITION_OFFSET

    @property
    def projects(self) -> bool:
        """Whether project_in and project_out stand between the embedding and the layers."""
        return self.word_embed_proj_dim != self.hidden_size

    @property
    def layer_parameters(self) -> int:
        return 4 * self.hidden_size * self.q_size + 2 * self.hidden_size * self.ffn_dim

    @property
    def head_parameters(self) -> int:
        project_out = self.hidden_size * self.word_embed_proj_dim if self.projects else 0
        return self.vocab_size * self.word_embed_proj_dim + project_out

    @property
    def mlp_width(self) -> int:
        return self.ffn_dim

    def part(self, share: Share) -> "OptConfig":
        return replace(
            self,
            num_attention_heads=self.num_attention_heads // share.size,
            ffn_dim=self.ffn_dim // share.size,
            tie_word_embeddings=False,
            share=share,
        )

    def as_hugging_face(self) -> dict[str, Any]:
        same = (
            "vocab_size hidden_size ffn_dim num_hidden_layers num_attention_heads "
            "word_embed_proj_dim do_layer_norm_before max_position_embeddings tie_word_embeddings "
            "bos_token_id"
        )
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "activation_function": "relu",
            "enable_bias": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
            **{key: getattr(self, key) for key in same.split()},
            "torch_dtype": self.dtype,
        }


def read_opt_config(reader: ConfigReader, model_type: str) -> OptConfig:
    """What config.json says, once its architecture is known.

    Raises:
        ModelError: as `load_config`.
    """
    hidden_size = reader.number("hidden_size", int)
    heads = reader.number("num_attention_heads", int)
    if hidden_size % heads:
        raise reader.refuse(
            f"hidden_size {hidden_size} is no multiple of {heads} num_attention_heads",
            "The heads of OPT share it evenly.",
        )
    reader.check_head_dim(hidden_size // heads)
    if (act := reader.take("activation_function", "relu")) != "relu":
        raise reader.refuse(f"activation_function is {shown(act)}", "Supported: relu.")
    config = OptConfig(
        vocab_size=reader.number("vocab_size", int),
        hidden_size=hidden_size,
        ffn_dim=reader.number("ffn_dim", int),
        num_hidden_layers=reader.number("num_hidden_layers", int),
        num_attention_heads=heads,
        word_embed_proj_dim=reader.number("word_embed_proj_dim", int, default=hidden_size),
        do_layer_norm_before=reader.flag("do_layer_norm_before", default=True),
        max_position_embeddings=reader.number(
            "max_position_embeddings",
            int,
            default=2048,
            least=PADDING_SEGMENT,  # padding has positions too
        ),
        tie_word_embeddings=reader.flag("tie_word_embeddings", default=True),
        bos_token_id=reader.token_id("bos_token_id", default=2),
        dtype=reader.dtype(),
    )
    reader.refuse_leftovers(_WITHOUT_EFFECT, _ONLY)
    return config
