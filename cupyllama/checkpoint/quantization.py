"""What `--quantize` asks for, and whether the checkpoint and the device can have it."""

from pathlib import Path

from cupyllama.checkpoint.fields import matrix_shapes
from cupyllama.checkpoint.sharded import stored_quantization
from cupyllama.config import ModelConfig
from cupyllama.errors import DeviceError, ModelError, UsageError
from cupyllama.parallel.devices import Device

CHOICES = ("auto", "none", "fp8")
_MULTIPLE = 16  # rows and columns of a matrix that cuBLASLt multiplies in fp8
_CAPABILITY = 89  # Ada; Hopper is 90


def choose_quantization(asked: str, model: Path, config: ModelConfig) -> str | None:
    """What the layers' matrices are to be: None for the dtype of the rest, or fp8.

    Args:
        asked: one of CHOICES; auto is what the checkpoint in `model` is.

    Raises:
        UsageError: the checkpoint is quantized, and what it was before is asked for.
        ModelError: a matrix has a size that does not go.
    """
    stored = stored_quantization(model)
    if asked == "auto":
        chosen = stored
    elif stored not in (None, asked):
        raise UsageError(
            f"--quantize {asked}: the matrices in {model} are {stored}, which nothing undoes",
            "Give --quantize auto, or the checkpoint that it was made from.",
        )
    else:
        chosen = None if asked == "none" else asked
    if chosen is not None:
        for name, shape in matrix_shapes(config).items():
            if any(size % _MULTIPLE for size in shape):
                raise ModelError(
                    f"{model}: {name} is {shape[0]} × {shape[1]}, and {chosen} needs multiples of "
                    f"{_MULTIPLE}",
                    "This model cannot be quantized: leave --quantize out.",
                )
    return chosen


def check_device(quantize: str | None, device: Device) -> None:
    """Raises DeviceError if the GPU cannot multiply in what was chosen; any CPU can."""
    if quantize is not None and device.kind == "cuda" and device.compute_capability < _CAPABILITY:
        found, least = (f"{c // 10}.{c % 10}" for c in (device.compute_capability, _CAPABILITY))
        raise DeviceError(
            f"{device.name} has no {quantize}: its compute capability is {found}, and {least} is "
            "the least",
            "Give --quantize none and a checkpoint that is not quantized, or use an Ada or Hopper "
            "GPU or a newer one.",
        )
