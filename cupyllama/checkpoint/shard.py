"""`cupyllama shard`: a checkpoint rewritten as a file for each rank, in the layout of loading."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cupyllama.bpe import BPE_FILES
from cupyllama.checkpoint.fields import Field, check_names, stage_fields, stored_part
from cupyllama.checkpoint.meta import has_meta
from cupyllama.checkpoint.metaseq_parts import has_metaseq, model_directory
from cupyllama.checkpoint.quantization import choose_quantization
from cupyllama.checkpoint.shard_output import (
    check_output,
    check_space,
    locked,
    publish,
    save_progress,
    taken_up,
    write_small,
)
from cupyllama.checkpoint.sharded import (
    FORMAT,
    ID_KEY,
    QUANTIZATION,
    STAGE_KEY,
    TENSOR_PARALLEL,
    VERSION,
    array_name,
)
from cupyllama.checkpoint.slices import part_of_checkpoint
from cupyllama.checkpoint.source import DTYPES, Checkpoint, numpy_dtype, open_checkpoint
from cupyllama.checkpoint.stage_writer import (
    CHUNK_BYTES,
    PlannedArray,
    cannot_write,
    header_bytes,
    write_stage,
)
from cupyllama.checkpoint.stages import split_layers
from cupyllama.config import ModelConfig, Share, load_config
from cupyllama.errors import ModelError, UsageError
from cupyllama.tensor_parallel import check_tensor_parallel, part_of

_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *BPE_FILES,
)


@dataclass(frozen=True)
class ShardOptions:
    """What the command line asks for."""

    model: Path
    output: Path
    stages: int
    tensor_parallel: int = 1
    dtype: str = "auto"  # auto: as stored, or float32 where the parts of an array differ
    quantize: str = "auto"  # auto: as stored
    layers_per_stage: Sequence[int] | None = None
    force: bool = False
    quiet: bool = False
    chunk_bytes: int = CHUNK_BYTES


@dataclass(frozen=True)
class Sharded:
    """What was done."""

    output: Path
    files: int
    files_kept: int  # finished by an earlier run that was interrupted
    total_bytes: int
    written_bytes: int
    seconds: float
    tokenizer: bool

    def as_text(self) -> str:
        """Two lines, or three."""
        lines = [f"{self.output}: {self.files} stage files, {self.total_bytes / 1e9:.2f} GB"]
        rate = self.written_bytes / max(self.seconds, 1e-9) / 1e9
        lines.append(
            f"{self.written_bytes / 1e9:.2f} GB written in {self.seconds:.1f} s, {rate:.2f} GB/s"
            + (f"; {self.files_kept} files kept from an earlier run" if self.files_kept else "")
        )
        if not self.tokenizer:
            lines.append("no tokenizer found: score needs --tokenizer")
        return "\n".join(lines)


def shard(options: ShardOptions) -> Sharded:
    """Run the whole job.

    Raises:
        CupyllamaError: whatever the user can mend, each with its exit code.
    """
    began = time.perf_counter()
    options = replace(options, output=Path(os.path.abspath(options.output)))
    config, ranks = load_config(options.model), options.tensor_parallel
    check_tensor_parallel(config, ranks)
    shares = [Share(rank, ranks) for rank in range(ranks)] if ranks > 1 else [None]
    layers = split_layers(config, options.stages, options.layers_per_stage)
    checkpoint = open_checkpoint(options.model)
    check_names(checkpoint, config)
    configs = [part_of(config, share) for share in shares]
    quantize = choose_quantization(options.quantize, options.model, configs[0])
    sources = [part_of_checkpoint(checkpoint, config, share) for share in shares]
    stages = [
        _planned(source, own, span, options.dtype, quantize)
        for span in layers
        for source, own in zip(sources, configs, strict=True)
    ]
    small_files = _small_files(options, config)
    settings = _settings(options, checkpoint, layers, quantize, small_files["config.json"])
    check_output(options.output, options.model, options.force)
    partial = options.output.with_name(options.output.name + ".partial")
    try:
        with locked(partial):
            manifest = taken_up(partial, settings, options.force)
            kept = sum("sha256" in stage for stage in manifest["stages"])
            sizes = [_file_bytes(arrays, settings["id"], i) for i, arrays in enumerate(stages)]
            missing = [i for i, stage in enumerate(manifest["stages"]) if "sha256" not in stage]
            written = sum(sizes[i] for i in missing)
            extra = sum(map(len, small_files.values()))
            check_space(options.output, written + extra)
            with _progress(written, options.quiet) as on_bytes:
                for number in missing:
                    entry, arrays = manifest["stages"][number], stages[number]
                    source = sources[number % ranks]
                    entry["bytes"], entry["sha256"] = write_stage(
                        partial / entry["file"],
                        source,
                        arrays,
                        _metadata(settings["id"], number),
                        on_bytes,
                        options.chunk_bytes,
                    )
                    entry["pieces"] = _pieces(source, arrays)
                    save_progress(partial, manifest)
            write_small(partial, small_files, manifest)
            publish(partial, options.output)
    except OSError as error:
        raise cannot_write(options.output, error) from error
    return Sharded(
        output=options.output,
        files=len(stages),
        files_kept=kept,
        total_bytes=sum(sizes),
        written_bytes=written,
        seconds=time.perf_counter() - began,
        tokenizer=_has_tokenizer(small_files),
    )


def _planned(
    checkpoint: Checkpoint, config: ModelConfig, layers: range, dtype: str, quantize: str | None
) -> list[PlannedArray]:
    """The arrays of a stage; conversion loses nothing unless the user asks for it."""
    return [
        PlannedArray(
            array_name(layer, field.name), field, field.dtype or _dtype(checkpoint, field, dtype)
        )
        for layer, field in stage_fields(config, layers, quantize)
    ]


def _dtype(checkpoint: Checkpoint, field: Field, asked: str) -> str:
    """As safetensors spells it.

    Raises:
        UsageError: the checkpoint is quantized, and the rest of it was asked for in another dtype.
    """
    spellings = {str(known): name for name, known in DTYPES.items()}
    stored = {str(numpy_dtype(checkpoint.tensors[part])) for part in field.parts}
    if asked == "auto":
        return spellings[stored.pop()] if len(stored) == 1 else "F32"
    if checkpoint.quantization is not None and stored != {asked}:
        raise UsageError(
            f"--dtype {asked}: {checkpoint.directory} is {checkpoint.quantization}, and what is "
            f"not, is {stored.pop()}",
            "Leave --dtype out, or shard the checkpoint that it was made from.",
        )
    return spellings[asked]


def _small_files(options: ShardOptions, config: ModelConfig) -> dict[str, bytes]:
    """config.json, in Hugging Face's form and the dtype asked for, and the tokenizer."""
    model, files = model_directory(options.model), {}
    path = model / "config.json"
    try:
        if not path.is_file():
            raw = config.as_hugging_face()
        elif options.dtype == "auto":
            raw = None
            files["config.json"] = path.read_bytes()
        else:
            raw = json.loads(path.read_text(encoding="utf-8"))
        if raw is not None:
            if options.dtype != "auto":
                raw.pop("torch_dtype" if "dtype" in raw else "dtype", None)
                raw["dtype" if "dtype" in raw else "torch_dtype"] = options.dtype
            files["config.json"] = (json.dumps(raw, indent=2) + "\n").encode()
        folders = [model]
        if has_meta(model) or has_metaseq(options.model):
            # LLaMA/7B/consolidated.00.pth, opt-125m/reshard-model_part-0.pt
            folders.append(model.resolve().parent)
        for folder in folders:
            for name in _TOKENIZER_FILES:
                if (folder / name).is_file():
                    files[name] = (folder / name).read_bytes()
            if _has_tokenizer(files):
                break
    except OSError as error:
        raise ModelError(f"{error.filename}: {error.strerror}") from error
    return files


def _has_tokenizer(files: Collection[str]) -> bool:
    """Whether there is a file that is one, or the two that are one together."""
    pairs = zip(BPE_FILES[::2], BPE_FILES[1::2], strict=True)
    one = any(name in files for name in ("tokenizer.model", "tokenizer.json"))
    return one or any(vocabulary in files and merges in files for vocabulary, merges in pairs)


def _settings(
    options: ShardOptions,
    checkpoint: Checkpoint,
    layers: list[range],
    quantize: str | None,
    config: bytes,
) -> dict[str, Any]:
    """The head of the manifest: all that decides what the files hold, and an id made of it."""
    settings: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": options.dtype,
        QUANTIZATION: quantize,
        TENSOR_PARALLEL: options.tensor_parallel,
        "layers": [[span.start, span.stop] for span in layers],
        "source": {
            "name": options.model.resolve().name,
            "form": checkpoint.form,
            "digest": checkpoint.digest(),
        },
        "config_sha256": hashlib.sha256(config).hexdigest(),
    }
    settings["id"] = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return settings


def _metadata(identity: str, stage: int) -> dict[str, str]:
    return {"format": "np", ID_KEY: identity, STAGE_KEY: str(stage)}


def _file_bytes(arrays: list[PlannedArray], identity: str, stage: int) -> int:
    header = header_bytes(arrays, _metadata(identity, stage))
    return len(header) + sum(array.nbytes for array in arrays)


def _pieces(checkpoint: Checkpoint, arrays: list[PlannedArray]) -> dict[str, list]:
    """Of each array: tensor, file, offset and bytes of every run that it was made of."""
    return {
        array.name: [
            [origin.name, origin.path.name, origin.offset, origin.nbytes]
            for part in array.field.parts
            for origin in stored_part(checkpoint, part).origins
        ]
        for array in arrays
    }


@contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    from tqdm import tqdm

    with tqdm(
        total=total, unit="B", unit_scale=True, desc="sharding", disable=quiet or None, leave=False
    ) as bar:
        yield bar.update
