"""What went into a result: digests and versions, so that another run can be told apart from it."""

import hashlib
import importlib.metadata
import platform
from pathlib import Path

import cupyllama
from cupyllama.checkpoint.source import Checkpoint
from cupyllama.config import ModelConfig
from cupyllama.parallel.devices import Device


def digests(
    checkpoint: Checkpoint, config: ModelConfig, tokenizer: Path, data: str
) -> dict[str, str]:
    """SHA-256 of what went in; the model's is over config.json and a sample of each tensor."""
    model = hashlib.sha256(repr(config).encode() + checkpoint.digest().encode()).hexdigest()
    return {
        "model": model,
        "tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
        "data": data,
    }


def versions(device: Device) -> dict[str, str]:
    """Of everything that can change a bit of the result."""
    found = {"cupyllama": cupyllama.__version__, "python": platform.python_version()}
    for package in ("numpy", "sentencepiece", "safetensors"):
        found[package] = importlib.metadata.version(package)
    if device.kind == "cuda":
        import cupy
        from cupy_backends.cuda.libs import cublas

        found["cupy"] = cupy.__version__
        found["cuda_runtime"] = str(cupy.cuda.runtime.runtimeGetVersion())
        found["cuda_driver"] = str(cupy.cuda.runtime.driverGetVersion())
        found["cublas"] = str(cublas.getVersion(cupy.cuda.device.get_cublas_handle()))
    return found
