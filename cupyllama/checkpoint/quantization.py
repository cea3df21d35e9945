"""What `--quantize` asks for, and whether the checkpoint and the device can have it."""

from pathlib import Path

from cupyllama.checkpoint.fields import matrix_shapes
from cupyllama.checkpoint.sharded import stored_quantization
from cupyllama.config import ModelConfig
from cupyllama.errors import DeviceError, ModelError, UsageError
from cupyllama.parallel.devices import Device

CHOICES = ("auto", "none", "fp8", "int8")
_MULTIPLE = 16  # rows and columns of a matrix that cuBLASLt multiplies in fp8
_CAPABILITY = 89  # Ada; Hopper is 90


def choose_quantization(asked: str, model: Path, config: ModelConfig) -> str | None:
    """What the layers' matrices are to be: None for the dtype of the rest, fp8 or int8.

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
    if chosen == "fp8":
        for name, shape in matrix_shapes(config).items():
            if any(size % _MULTIPLE for size in shape):
                raise ModelError(
                    f"{model}: {name} is {shape[0]} × {shape[1]}, and {chosen} needs multiples of "
                    f"{_MULTIPLE}",
                    "Give --quantize int8, which takes any size, or leave --quantize out.",
                )
    return chosen


def check_device(quantize: str | None, device: Device) -> None:
    """Raises DeviceError if the GPU cannot multiply in what was chosen; any CPU can.

    int8 is multiplied in the dtype of the rest, by any GPU.
    """
    if quantize == "fp8" and device.kind == "cuda" and device.compute_capability < _CAPABILITY:
        found, least = (f"{c // 10}.{c % 10}" for c in (device.compute_capability, _CAPABILITY))
        raise DeviceError(
            f"{device.name} has no {quantize}: its compute capability is {found}, and {least} is "
            "the least",
            "Give --quantize int8 or none, and a checkpoint that is not fp8, or use an Ada or "
            "Hopper GPU or a newer one.",
        )
