"""The way to a GPU, on one that does nothing before it is waited for: a missing wait shows."""

import builtins
import ctypes
import errno
import os
import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from test_loading import DTYPES, Derived, check_load
from test_quantization import assert_same, every_kind, truth, write_strange_model
from tiny_models import write_tiny_model

from cupyllama import loading, pages, readers
from cupyllama.checkpoint.fields import stage_bytes, stage_fields
from cupyllama.checkpoint.safetensors import SafetensorsCheckpoint
from cupyllama.config import load_config
from cupyllama.errors import ModelError
from cupyllama.loading import PIECES_PER_CHUNK, load_stage
from cupyllama.ops import reference

cupy = pytest.importorskip("cupy")
from cupyllama.ops import transfer  # noqa: E402


class DeviceArray(np.ndarray):
    """Host memory that calls itself the device's."""

    @property
    def data(self) -> SimpleNamespace:
        return SimpleNamespace(ptr=self.ctypes.data)

    def get(self) -> np.ndarray:
        return np.array(self)


class Stream:
    """Work that waits until it is asked for; that of every other stream may be done at once."""

    made: dict[int, "Stream"] = {}
    haste = False
    current = threading.local()

    def __init__(self, non_blocking: bool = False):
        self.work: list = []
        self.hasty = self.haste and len(self.made) % 2 == 1
        self.ptr = id(self)
        self.made[self.ptr] = self

    def do(self, work) -> None:
        self.work.append(work)
        if self.hasty:
            self.synchronize()

    def synchronize(self) -> None:
        while self.work:
            self.work.pop(0)()

    @property
    def done(self) -> bool:
        return not self.work

    def __enter__(self) -> "Stream":
        self.current.stream = self
        return self

    def __exit__(self, *error) -> None: ...


class Driver:
    """What transfer.py calls of CUDA's runtime."""

    memcpyHostToDevice = 1

    def __init__(self):
        self.registered: list[range] = []
        self.failing = False

    def hostRegister(self, address: int, nbytes: int, flags: int) -> None:  # noqa: N802
        if self.failing:
            raise MemoryError("nothing can be pinned")
        self.registered.append(range(address, address + nbytes))

    def hostUnregister(self, address: int) -> None:  # noqa: N802
        (memory,) = [memory for memory in self.registered if memory.start == address]
        self.registered.remove(memory)

    def memcpyAsync(self, to: int, source: int, nbytes: int, kind: int, stream: int) -> None:  # noqa: N802
        (memory,) = [memory for memory in self.registered if source in memory]
        assert source + nbytes <= memory.stop
        copy = (to, source, nbytes)
        Stream.made[stream].do(lambda: ctypes.memmove(*copy))


@pytest.fixture
def driver(monkeypatch):
    """The lazy device in CuPy's place; it must be left with nothing registered."""
    fake = Driver()
    main = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(transfer, "runtime", fake)
    cuda = SimpleNamespace(
        Stream=Stream,
        Device=lambda number=0: SimpleNamespace(id=number, use=lambda: None),
        get_current_stream=lambda: main,
    )
    monkeypatch.setattr(transfer, "cupy", SimpleNamespace(cuda=cuda, empty=empty))
    monkeypatch.setattr(transfer, "quantize", quantize)
    # All but the decision whether arrays are the host's.
    monkeypatch.setattr(
        loading,
        "isinstance",
        lambda value, kind: (
            builtins.isinstance(value, kind) and not builtins.isinstance(value, DeviceArray)
        ),
        raising=False,
    )
    yield fake
    assert fake.registered == []
    Stream.made.clear()


def empty(shape, dtype):
    """Not empty, so that what is not written shows."""
    return np.full(shape, 0xA5, dtype).view(DeviceArray)


def quantize(x, out):
    Stream.current.stream.do(lambda: reference.quantize(x, out))


OPS = SimpleNamespace(empty=empty)


by_either = pytest.mark.parametrize("by", [{"aio": False}, {}], ids=["threads", "aio"])


@by_either
@pytest.mark.parametrize("kind", [SafetensorsCheckpoint, Derived])
@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_every_pair_of_dtypes(saved, wanted, kind, by, driver, tmp_path):
    directory = write_tiny_model("attention_bias", tmp_path, dtype=saved, shards=3)
    check_load(directory, OPS, DTYPES[wanted], kind, threads=3, piece_bytes=4099, **by)


@by_either
@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize(("threads", "piece_bytes"), [(1, 5001), (12, 1002), (4, 1 << 20)])
@pytest.mark.parametrize("haste", [False, True])
def test_any_cut(haste, buffers, threads, piece_bytes, by, driver, tmp_path, monkeypatch):
    monkeypatch.setattr(Stream, "haste", haste)
    directory = write_tiny_model("odd", tmp_path, dtype="float16")
    cut = {"threads": threads, "piece_bytes": piece_bytes, "buffers": buffers}
    check_load(directory, OPS, np.float16, **cut, **by)


def load_as_it_lies(directory, checkpoint=None, **options):
    config, checkpoint = load_config(directory), checkpoint or SafetensorsCheckpoint(directory)
    stage = (config, range(2), np.dtype(np.float16), OPS)
    return load_stage(checkpoint, *stage, threads=3, **options)


def test_a_file_that_ends_early_is_named(driver, tmp_path):
    directory = write_tiny_model("gqa", tmp_path, dtype="float16")
    checkpoint = SafetensorsCheckpoint(directory)
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ModelError, match="model.safetensors: ends inside"):
        load_as_it_lies(directory, checkpoint, piece_bytes=1000)


def test_a_file_that_cannot_be_read_is_named(driver, tmp_path, monkeypatch):
    directory = write_tiny_model("gqa", tmp_path, dtype="float16")
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: opened(path, os.O_WRONLY))
    with pytest.raises(ModelError, match="model.safetensors: Bad file descriptor"):
        load_as_it_lies(directory)


class Library:
    """The C library, but for what is given."""

    def __init__(self, real, **functions):
        self.real = real
        vars(self).update(functions)

    def __getattr__(self, name):
        return getattr(self.real, name)


def test_what_was_not_read_at_once_is_asked_for_again(driver, tmp_path, monkeypatch):
    """Of every request for more than 700 bytes the library reads 700."""
    real, asked = readers.library(), []

    def read(pointer):
        request = readers._Request.from_address(pointer.value)
        asked.append(request.nbytes)
        request.nbytes = min(request.nbytes, 700)
        return real.aio_read(pointer)

    monkeypatch.setattr(readers, "library", partial(Library, real, aio_read=read))
    directory = write_tiny_model("gqa", tmp_path, dtype="float16")
    check_load(directory, OPS, np.float16, threads=3, piece_bytes=2000)
    assert {2000, 1300, 600} <= set(asked)


def test_a_read_that_cannot_begin_is_named(driver, tmp_path, monkeypatch):
    """Such as for want of threads."""
    real = readers.library()

    def read(pointer):
        ctypes.set_errno(errno.EAGAIN)
        return -1

    monkeypatch.setattr(readers, "library", partial(Library, real, aio_read=read))
    directory = write_tiny_model("gqa", tmp_path, dtype="float16")
    with pytest.raises(ModelError, match="model.safetensors: Resource temporarily unavailable"):
        load_as_it_lies(directory)


def test_a_rest_that_cannot_be_read_is_named(driver, tmp_path, monkeypatch):
    """The library reads 700 bytes, and then it has no thread for those that are left."""
    real = readers.library()

    def read(pointer):
        request = readers._Request.from_address(pointer.value)
        if request.nbytes == 1300:
            ctypes.set_errno(errno.EAGAIN)
            return -1
        request.nbytes = min(request.nbytes, 700)
        return real.aio_read(pointer)

    monkeypatch.setattr(readers, "library", partial(Library, real, aio_read=read))
    directory = write_tiny_model("gqa", tmp_path, dtype="float16")
    with pytest.raises(ModelError, match="model.safetensors: Resource temporarily unavailable"):
        load_as_it_lies(directory, piece_bytes=2000)


def test_files_one_after_another_in_one_buffer(tmp_path):
    """More files than buffers: a buffer's duplicate is of the file that was asked for last."""
    contents = {number: bytes([number]) * (50 + number) for number in range(1, 8)}
    files = {}
    for number, content in contents.items():
        (tmp_path / str(number)).write_bytes(content)
        files[number] = os.open(tmp_path / str(number), os.O_RDONLY)
    with readers.open_readers(2, 2, 100) as opened:
        for number, file in files.items():
            opened.ask(number % 2, file, 3, 100)
            answers = []
            while not answers:
                answers += opened.answers()
            ((buffer, count),) = answers
            assert (buffer, count) == (number % 2, 47 + number)
            assert bytes(opened.memory[buffer][:count]) == contents[number][3:]
    for file in files.values():
        os.close(file)


@pytest.mark.parametrize(
    ("saved", "quantize", "aio", "reads"),
    [
        ("float16", None, True, "all"),
        ("float16", None, False, "nothing"),
        ("bfloat16", None, True, "nothing"),  # every number is converted
        ("bfloat16", "int8", True, "nothing"),
        ("float16", "int8", True, "some"),  # embedding and norms
    ],
)
def test_the_library_reads_what_is_only_copied(
    saved, quantize, aio, reads, driver, tmp_path, monkeypatch
):
    asked, ask = [], readers.Readers.ask
    monkeypatch.setattr(
        readers.Readers, "ask", lambda *request: (asked.append(request[-1]), ask(*request))
    )
    directory = write_tiny_model("gqa", tmp_path, dtype=saved)
    load_as_it_lies(directory, aio=aio, quantize=quantize)
    stage = stage_bytes(load_config(directory), range(2), np.dtype(np.float16))
    assert {"nothing": sum(asked) == 0, "some": 0 < sum(asked) < stage, "all": sum(asked) == stage}[
        reads
    ]


def test_without_the_library_threads_read_all(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "library", lambda: None)
    monkeypatch.setattr(loading, "open_readers", None)
    directory = write_tiny_model("gqa", tmp_path, dtype="float16")
    check_load(directory, OPS, np.float16, threads=3)


def test_an_interrupt_before_a_request_is_noted(tmp_path):
    """It is neither under way nor asked for, and another one is."""
    (tmp_path / "f").write_bytes(b"x" * 10)
    file = os.open(tmp_path / "f", os.O_RDONLY)
    opened = readers.Readers(2, 2, 100)
    opened._requests[0].error = 0
    opened.ask(1, file, 0, 10)
    opened.close()
    assert not opened._asked
    os.close(file)


def test_loading_that_is_broken_off_leaves_nothing_open(driver, tmp_path, monkeypatch):
    made, make, ended = [], readers.Readers.__init__, {}
    forget = readers.Readers._forget

    def note(self, buffer):
        ended[buffer] = int(self._errors[buffer])
        forget(self, buffer)

    monkeypatch.setattr(readers.Readers, "_forget", note)
    monkeypatch.setattr(
        readers.Readers, "__init__", lambda self, *sizes: (made.append(self), make(self, *sizes))[1]
    )

    def on_bytes(count):
        raise KeyboardInterrupt

    directory = write_tiny_model("gqa", tmp_path, dtype="float16")
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(KeyboardInterrupt):
        load_as_it_lies(directory, piece_bytes=1000, on_bytes=on_bytes)
    (opened,) = made
    assert opened._duplicates and not opened._asked
    assert len(ended) == len(opened._duplicates) and errno.EINPROGRESS not in ended.values()
    assert set(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("kind", [SafetensorsCheckpoint, Derived])
@pytest.mark.parametrize(("threads", "piece_bytes"), [(1, 5001), (5, 1002), (4, 1 << 20)])
@pytest.mark.parametrize("haste", [False, True])
@every_kind
def test_rows_quantized_on_the_way(
    quantize, haste, threads, piece_bytes, kind, buffers, driver, tmp_path, monkeypatch
):
    monkeypatch.setattr(Stream, "haste", haste)
    directory = write_strange_model(tmp_path, dtype="float16")
    config, layers = load_config(directory), range(3)
    weights = load_stage(
        *(kind(directory), config, layers, np.dtype(np.float32), OPS),
        threads=threads,
        piece_bytes=piece_bytes,
        buffers=buffers,
        quantize=quantize,
    )
    assert_same(weights, truth(directory, layers, quantize=quantize), layers)


def test_device_memory_is_that_of_the_stage_and_a_chunk_a_thread(driver, tmp_path, monkeypatch):
    directory = write_tiny_model("gqa", tmp_path, dtype="float16")
    config, sizes = load_config(directory), []

    def counted(shape, dtype):
        sizes.append(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return empty(shape, dtype)

    monkeypatch.setattr(transfer.cupy, "empty", counted)
    ops = SimpleNamespace(empty=counted)
    load_stage(
        *(SafetensorsCheckpoint(directory), config, range(2), np.dtype(np.float16), ops),
        threads=3,
        piece_bytes=1000,
        quantize="fp8",
    )
    stage, staging = sizes
    alignment = 511 * len(list(stage_fields(config, range(2), "fp8")))
    assert 0 <= stage - stage_bytes(config, range(2), np.dtype(np.float16), "fp8") <= alignment
    assert staging == 3 * 8192  # 8 pieces of 1000 bytes, in whole pages


@pytest.mark.parametrize("quantize", [None, "fp8"])
def test_chunks_are_coarse_but_for_the_end(quantize, driver, tmp_path, monkeypatch):
    chunks, write = [], transfer.DeviceWriter.write
    monkeypatch.setattr(
        transfer.DeviceWriter,
        "write",
        lambda self, chunk: (chunks.append(chunk), write(self, chunk))[1],
    )
    directory = write_tiny_model("gqa", tmp_path, dtype="float16")
    config, half = load_config(directory), np.dtype(np.float16)
    load_stage(
        *(SafetensorsCheckpoint(directory), config, range(2), half, OPS),
        threads=1,  # so that chunks are begun in their order
        piece_bytes=2000,
        aio=False,
        quantize=quantize,
    )
    pieces = [-(-int(np.prod(chunk.target.shape)) // chunk.step) for chunk in chunks]
    left = np.cumsum([chunk.nbytes for chunk in chunks][::-1])[::-1]
    assert left[0] == stage_bytes(config, range(2), half, quantize)
    tail = PIECES_PER_CHUNK * 2000
    assert {n for n, rest in zip(pieces, left, strict=True) if rest < tail} == {1}
    assert max(pieces) == PIECES_PER_CHUNK and sum(pieces) > 4 * len(pieces)


def test_memory_that_cannot_be_pinned_is_told(driver, tmp_path):
    directory = write_tiny_model("gqa", tmp_path)
    config, checkpoint = load_config(directory), SafetensorsCheckpoint(directory)
    driver.failing = True
    with pytest.raises(MemoryError, match="pinned"):
        load_stage(checkpoint, config, range(2), np.dtype(np.float16), OPS, piece_bytes=1000)


def test_memory_is_registered_once(driver, tmp_path, monkeypatch):
    calls, register = [], driver.hostRegister
    monkeypatch.setattr(driver, "hostRegister", lambda *a: (calls.append(a), register(*a)))
    directory = write_tiny_model("gqa", tmp_path)
    config, checkpoint = load_config(directory), SafetensorsCheckpoint(directory)
    load_stage(checkpoint, config, range(2), np.dtype(np.float16), OPS, threads=7, buffers=2)
    assert len(calls) == 1 and calls[0][0] % pages.HUGE_PAGE == 0
