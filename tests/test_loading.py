"""Loading in threads: the same arrays however the work is cut, and a clean end however it ends."""

import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from tiny_models import write_tiny_model

from cupyllama.checkpoint.fields import stage_bytes, stage_fields
from cupyllama.checkpoint.safetensors import SafetensorsCheckpoint
from cupyllama.checkpoint.source import Checkpoint, StoredTensor, numpy_dtype
from cupyllama.config import ModelConfig, load_config
from cupyllama.crew import for_each
from cupyllama.errors import ModelError
from cupyllama.loading import load_stage
from cupyllama.model.llama import StageWeights
from cupyllama.ops import reference

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# Bytes: one element at a time, cut rows, a size that is no multiple of an element's, and no cut.
PIECES = [1, 1002, 4099, 1 << 30]


def naive(checkpoint: Checkpoint, config: ModelConfig, layers: range, dtype) -> dict:
    """The arrays of a stage by (layer, name): each tensor read whole, converted, stacked."""
    arrays = {}
    for layer, field in stage_fields(config, layers):
        parts = []
        for name, shape in zip(field.parts, field.shapes, strict=True):
            parts.append(np.empty(shape, numpy_dtype(checkpoint.tensors[name])))
            checkpoint.read_into(name, parts[-1])
        arrays[layer, field.name] = np.concatenate(parts).astype(dtype)
    return arrays


def assert_same(weights: StageWeights, expected: dict, layers: range) -> None:
    """Bit for bit."""
    for (layer, name), array in expected.items():
        if layer is not None:
            found = getattr(weights.layers[layer - layers.start], name)
        else:
            found = getattr(weights, name)
            if found is None and name == "embed_tokens":
                found = weights.lm_head  # tied, and this is the last of several stages
        found = found if isinstance(found, np.ndarray) else found.get()
        assert found.dtype == array.dtype and found.shape == array.shape
        assert found.tobytes() == array.tobytes(), f"{layer} {name}"


class Derived(SafetensorsCheckpoint):
    """A checkpoint in which some tensors must be put together."""

    def locate(self, name: str) -> StoredTensor | None:
        return None if "mlp" in name or "q_proj" in name else super().locate(name)


def check_load(directory: Path, ops: ModuleType, dtype, kind=SafetensorsCheckpoint, **cut) -> None:
    """Load every stage of one layer, and all layers: against `naive`, and by the bytes."""
    config = load_config(directory)
    last, dtype = config.num_hidden_layers, np.dtype(dtype)
    for layers in [range(last), *(range(layer, layer + 1) for layer in range(last))]:
        expected = naive(SafetensorsCheckpoint(directory), config, layers, dtype)
        checkpoint, told = kind(directory), []
        weights = load_stage(checkpoint, config, layers, dtype, ops, told.append, **cut)
        assert_same(weights, expected, layers)
        assert sum(told) == stage_bytes(config, layers, dtype)
        elements = sum(array.size for array in expected.values())
        stored = next(iter(checkpoint.tensors.values()))
        assert checkpoint.bytes_read == elements * numpy_dtype(stored).itemsize


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Every test ends with the threads and the open files that it began with."""
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("piece_bytes", PIECES[1:])
@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_every_pair_of_dtypes_in_pieces_of_any_size(saved, wanted, piece_bytes, tmp_path):
    directory = write_tiny_model("attention_bias", tmp_path, dtype=saved, shards=3)
    check_load(directory, reference, DTYPES[wanted], threads=3, piece_bytes=piece_bytes)


@pytest.mark.parametrize("name", ["odd", "tied", "gqa", "opt_350m", "opt_untied"])
@pytest.mark.parametrize("threads", [1, 2, 40])
def test_any_number_of_threads(name, threads, tmp_path):
    directory = write_tiny_model(name, tmp_path, dtype="float16")
    check_load(directory, reference, np.float32, threads=threads, piece_bytes=999)


def test_one_element_at_a_time(tmp_path):
    directory = write_tiny_model("tied", tmp_path, dtype="float16")
    config, layer = load_config(directory), range(1, 2)
    checkpoint = SafetensorsCheckpoint(directory)
    weights = load_stage(
        checkpoint, config, layer, np.dtype(np.float16), reference, piece_bytes=PIECES[0]
    )
    assert_same(weights, naive(checkpoint, config, layer, np.float16), layer)


@pytest.mark.parametrize("wanted", DTYPES)
def test_tensors_that_are_put_together(wanted, tmp_path):
    directory = write_tiny_model("llama1", tmp_path, dtype="bfloat16")
    check_load(directory, reference, DTYPES[wanted], Derived, piece_bytes=1000)


def test_the_defaults(tmp_path):
    check_load(write_tiny_model("llama3_rope", tmp_path, shards=2), reference, np.float32)


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_one_allocation_that_goes_with_the_last_array(quantize, tmp_path):
    directory = write_tiny_model("gqa", tmp_path)
    config, checkpoint = load_config(directory), SafetensorsCheckpoint(directory)
    weights = load_stage(
        checkpoint, config, range(2), np.dtype(np.float32), reference, quantize=quantize
    )
    arrays = [weights.embed_tokens, weights.norm, weights.lm_head]
    arrays += [weights.layers[0].o_proj, weights.layers[1].input_layernorm]
    if quantize:
        matrix = arrays.pop(3)
        arrays += [matrix.values, matrix.scale]
        del matrix
    roots = []
    for array in arrays:
        while array.base is not None:
            array = array.base
        roots.append(array)
    assert all(root is roots[0] for root in roots)
    gone = weakref.ref(roots[0])
    del weights, arrays, array, roots
    assert gone() is None


def test_values_beyond_float16_become_infinite_without_a_warning(tmp_path):
    from safetensors.numpy import load_file, save_file

    path = write_tiny_model("gqa", tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, path)
    config = load_config(tmp_path)
    weights = load_stage(
        SafetensorsCheckpoint(tmp_path), config, range(2), np.dtype(np.float16), reference
    )
    assert np.isinf(weights.norm[3]) and np.isfinite(weights.norm).sum() == len(weights.norm) - 1


@pytest.mark.parametrize("kind", [SafetensorsCheckpoint, Derived])
@pytest.mark.parametrize("piece_bytes", [1000, 1 << 20])
@pytest.mark.parametrize("wanted", [np.float16, np.float32])
def test_a_file_that_ends_early_is_named(kind, piece_bytes, wanted, tmp_path):
    directory = write_tiny_model("gqa", tmp_path, shards=2)
    config, checkpoint = load_config(directory), kind(directory)
    path = max(checkpoint.tensors.values(), key=lambda t: (t.path, t.offset)).path
    os.truncate(path, path.stat().st_size - 1)  # after the header was checked
    with pytest.raises(ModelError, match=f"{path.name}: ends ") as error:
        load_stage(
            checkpoint, config, range(2), np.dtype(wanted), reference, piece_bytes=piece_bytes
        )
    assert error.value.exit_code == 3
    if kind is SafetensorsCheckpoint:
        last = max(
            (t for t in checkpoint.tensors.values() if t.path == path), key=lambda t: t.offset
        )
        assert f"ends inside {last.name}" in str(error.value)


def test_a_file_that_goes_away_is_named(tmp_path):
    directory = write_tiny_model("gqa", tmp_path, shards=2)
    config, checkpoint = load_config(directory), SafetensorsCheckpoint(directory)
    gone = sorted(directory.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=f"{gone.name}: No such file"):
        load_stage(checkpoint, config, range(2), np.dtype(np.float32), reference)


def test_a_read_that_fails_is_named(tmp_path, monkeypatch):
    def broken(*arguments):
        raise OSError(5, "Input/output error")

    directory = write_tiny_model("gqa", tmp_path)
    config, checkpoint = load_config(directory), SafetensorsCheckpoint(directory)
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(ModelError, match="model.safetensors: Input/output error"):
        load_stage(checkpoint, config, range(2), np.dtype(np.float32), reference)


def test_short_reads_go_on(tmp_path, monkeypatch):
    whole = os.preadv
    directory = write_tiny_model("gqa", tmp_path)
    monkeypatch.setattr(os, "preadv", lambda f, views, at: whole(f, [views[0][:700]], at))
    check_load(directory, reference, np.float16, piece_bytes=4099)


def test_memory_that_ends_is_told(tmp_path, monkeypatch):
    def scarce(shape, dtype):
        raise MemoryError("no room")

    directory = write_tiny_model("gqa", tmp_path)
    config, checkpoint = load_config(directory), SafetensorsCheckpoint(directory)
    monkeypatch.setattr(reference, "empty", scarce)
    with pytest.raises(MemoryError, match="no room"):
        load_stage(checkpoint, config, range(2), np.dtype(np.float32), reference)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_ends_every_thread(raised, tmp_path):
    def interrupt(count):
        raise raised

    directory = write_tiny_model("gqa", tmp_path)
    config, checkpoint = load_config(directory), SafetensorsCheckpoint(directory)
    arguments = (config, range(2), np.dtype(np.float32), reference, interrupt)
    with pytest.raises(raised):
        load_stage(checkpoint, *arguments, piece_bytes=1000)
    assert checkpoint.bytes_read < stage_bytes(config, range(2), np.dtype(np.float32))


def test_every_job_is_done_once_and_told_in_the_calling_thread():
    done, told = [], []

    def on_done(job: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        told.append(job)

    for_each(range(1000), lambda: nullcontext(lambda job: [done.append(job)]), 7, on_done)
    assert sorted(done) == sorted(told) == list(range(1000))


def test_no_jobs_and_few_jobs_start_no_needless_threads():
    entered = []

    @contextmanager
    def worker():
        entered.append(threading.current_thread().name)
        yield lambda job: []

    for_each([], worker, 5)
    assert entered == []
    for_each([1, 2], worker, 5)
    assert len(entered) == 2


def test_the_first_error_cancels_the_other_threads_and_is_raised():
    released, left, done = threading.Event(), [], []

    @contextmanager
    def worker():
        try:
            yield work
        finally:
            left.append(threading.current_thread())

    def work(job: int) -> Iterator[None]:
        if job == 3:
            released.set()
            raise LookupError("the fourth job")
        released.wait(10)
        done.append(job)
        yield

    with pytest.raises(LookupError, match="the fourth job"):
        for_each(range(100_000), worker, 4)
    assert len(left) == 4 and len(done) < 100_000


def test_an_error_ends_a_job_between_its_steps():
    began, told = threading.Event(), []

    def work(job: int) -> Iterator[None]:
        if job == 0:
            began.wait(10)
            raise LookupError("the first job")
        for _ in range(10_000):  # seconds, if nobody ended it
            began.set()
            time.sleep(0.001)
            yield

    begin = time.monotonic()
    with pytest.raises(LookupError, match="the first job"):
        for_each(range(2), lambda: nullcontext(work), 2, told.append)
    assert time.monotonic() - begin < 5 and told == []


@pytest.mark.parametrize("where", ["entering", "leaving", "jobs"])
def test_errors_around_the_jobs_are_raised(where):
    @contextmanager
    def worker():
        if where == "entering":
            raise MemoryError(where)
        yield lambda job: []
        if where == "leaving":
            raise MemoryError(where)

    def jobs():
        yield from range(10)
        if where == "jobs":
            raise MemoryError(where)

    with pytest.raises(MemoryError, match=where):
        for_each(jobs(), worker, 3)
