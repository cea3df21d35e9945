"""What went into a result: digests and versions, so that another run can be told apart from it."""

import hashlib
import importlib.metadata
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import cupyllama
from cupyllama.bpe import bpe_files, is_bpe_file
from cupyllama.checkpoint.source import Checkpoint
from cupyllama.config import ModelConfig
from cupyllama.parallel.devices import Device


def digests(
    checkpoint: Checkpoint, config: ModelConfig, tokenizer: Path, data: str
) -> dict[str, str]:
    """SHA-256 of what went in; the model's is over config.json and a sample of each tensor.

    Args:
        tokenizer: its file; of vocab.json and merges.txt either, and both are counted.
    """
    files = bpe_files(tokenizer) if is_bpe_file(tokenizer) else (tokenizer,)
    model = hashlib.sha256(config_json(config).encode() + checkpoint.digest().encode()).hexdigest()
    return {
        "model": model,
        "tokenizer": hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest(),
        "data": data,
    }


def config_json(config: ModelConfig) -> str:
    """The same text for the same model in every release.

    What is off (null, false) is left out, so that a field that a later release adds changes
    nothing where it is off; and the order of the fields does not count.
    """
    fields = asdict(config)
    on = {key: value for key, value in fields.items() if value is not None and value is not False}
    return json.dumps(on, sort_keys=True)


def versions(device: Device) -> dict[str, str]:
    """Of everything that can change a bit of the result."""
    found = {"cupyllama": cupyllama.__version__, "python": platform.python_version()}
    for package in ("numpy", "ml_dtypes", "safetensors", "sentencepiece", "threadpoolctl"):
        found[package] = importlib.metadata.version(package)
    if "tokenizers" in sys.modules:  # imported for a tokenizer.json, and for nothing else
        found["tokenizers"] = importlib.metadata.version("tokenizers")
    if device.kind == "cuda":
        import cupy
        from cupy_backends.cuda.libs import cublas, nvrtc

        found["cupy"] = cupy.__version__
        found["cuda_runtime"] = str(cupy.cuda.runtime.runtimeGetVersion())
        found["cuda_driver"] = str(cupy.cuda.runtime.driverGetVersion())
        found["cublas"] = str(cublas.getVersion(cupy.cuda.device.get_cublas_handle()))
        found["nvrtc"] = ".".join(map(str, nvrtc.getVersion()))
    return found
