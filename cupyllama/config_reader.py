"""Keys out of config.json, one by one; what is left over must have no effect."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cupyllama.errors import ModelError

DTYPES = ("float32", "float16", "bfloat16")

# A key is read, or in one of these two tables or those of its family, or refused: false may switch
# mathematics off just as true may switch it on. Null says nothing, and transformers writes nulls.
#
# Keys that say nothing about the forward pass of a trained model, whatever their value. So does
# *_dropout, which is for training.
_WITHOUT_EFFECT = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version use_cache initializer_range
    bos_token_id eos_token_id pad_token_id unk_token_id decoder_start_token_id sep_token_id
    return_dict output_hidden_states output_attentions use_return_dict torchscript
    use_bfloat16 is_decoder cross_attention_hidden_size chunk_size_feed_forward problem_type
    id2label label2id finetuning_task task_specific_params tokenizer_class prefix name_or_path
    max_sequence_length model_max_length max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens bad_words_ids tf_legacy_loss attn_implementation unsloth_version
    unsloth_fixed neftune_noise_alpha transformers.js_config
    """.split()
)

# Keys that change nothing at these values alone.
_ONLY: dict[str, tuple] = {
    "add_cross_attention": (False,),
    "auto_map": ({},),  # code that the checkpoint brings with it
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, []),
    "tie_encoder_decoder": (False,),
}
_IF_HARMLESS = "Remove the key if it has no effect on the forward pass."

# A size beyond it is a mistake, and it is the end of what int() and float() can be trusted with.
_MOST = 1e12

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def shown(value: Any) -> str:
    """A value in a message: on one line, and no longer than a line."""
    return _SHORT.repr(value)


class ConfigReader:
    """Takes keys out of config.json one by one; what is left over must have no effect."""

    def __init__(self, path: Path, raw: dict[str, Any], prefix: str = ""):
        """`prefix`: what stands before a key in messages."""
        self.path = path
        self.left = dict(raw)
        self.prefix = prefix

    def refuse(self, what: str, hint: str = "") -> ModelError:
        """The error to raise."""
        return ModelError(f"{self.path}: {what}", hint)

    def take(self, key: str, default: Any = None) -> Any:
        """The value, whatever it is; null is as good as absent."""
        value = self.left.pop(key, None)
        return default if value is None else value

    def number(
        self,
        key: str,
        kind: type,
        default: Any = None,
        least: float = 1,
        above: float = float("-inf"),
    ) -> Any:
        """A finite int or float; without a default, one that must be there."""
        value = self.take(key, default)
        name = self.prefix + key
        if value is None:
            raise self.refuse(f"{name} is missing", "Is the download complete?")
        valid = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (valid and least <= value < _MOST and value > above and value == kind(value)):
            bound = f"of {least} or more" if least > above else f"above {above}"
            noun = "a whole number" if kind is int else "a number"
            raise self.refuse(f"{name} is {shown(value)}", f"Expected: {noun} {bound}.")
        return kind(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.refuse(f"{key} is {shown(value)}", "Expected: true or false.")
        return value

    def token_id(self, key: str, default: int | None = None) -> int | None:
        """A token, or None for what is none."""
        value = self.take(key, default)
        return value if isinstance(value, int) and value >= 0 else None

    def dtype(self) -> str:
        """`dtype` (transformers 5), else `torch_dtype` (4), else float32 as they assume."""
        new, old = self.take("dtype"), self.take("torch_dtype")
        name = str(new or old or "float32").removeprefix("torch.")
        if name not in DTYPES:
            raise self.refuse(f"dtype is {shown(name)}", f"Supported: {', '.join(DTYPES)}.")
        return name

    def check_head_dim(self, head_dim: int) -> None:
        """Refuse a size that the kernels do not have."""
        if not 32 <= head_dim <= 256 or head_dim % 2:
            raise self.refuse(f"head_dim is {head_dim}", "Supported: even sizes from 32 to 256.")

    def refuse_leftovers(
        self, without_effect: frozenset[str], only: Mapping[str, tuple[Any, ...]]
    ) -> None:
        """Refuse what is left and might change the mathematics.

        Args:
            without_effect: keys of this family whose values do not matter.
            only: keys of this family that change nothing at these values alone.
        """
        if (quantization := self.left.get("quantization_config")) is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise self.refuse(
                f"quantization_config ({method}) is not supported",
                "Give the checkpoint that it was quantised from.",
            )
        without_effect, harmless = _WITHOUT_EFFECT | without_effect, _ONLY | dict(only)
        for key, value in self.left.items():
            if key in harmless and value is not None:
                if value not in harmless[key]:
                    what = f"{key} is {shown(value)}, which is not supported"
                    raise self.refuse(what, _IF_HARMLESS)
                continue
            if value is None or key in without_effect or key.startswith("_"):
                continue
            if key.endswith("_dropout") and isinstance(value, (int, float)):
                continue
            raise self.refuse(
                f"{key} = {shown(value)} is not known, and may change the mathematics",
                _IF_HARMLESS,
            )
