"""What all benches share: one GPU, time on it, what it reaches at most, the frame of a result."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from cupyllama.errors import CupyllamaError, DeviceError
from cupyllama.parallel.devices import Device, choose_device
from cupyllama.parallel.world import World, one_process
from cupyllama.provenance import versions

Array = Any
Launch = Callable[[], Any]

REPEATS = 50
WARM_UP = 5
# Ten times the largest L2 cache, and long enough to read that the host has queued the next launch
# before it is through: 0.2 ms on an H100, a launch takes 0.01 to 0.05 ms.
FLUSH_BYTES = 512 << 20
COPY_BYTES = 1 << 30

# ‖got - expected‖ / ‖expected‖: half a unit in the last place of each storage, and room for sums.
# Eight bits are compared with as many, of which a few are rounded the other way.
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-5, "float8_e4m3fn": 5e-3}


@dataclass(frozen=True)
class Ceilings:
    """What the GPU reaches at most, measured in the same run."""

    copy_bytes_per_second: float  # read and written
    gemm_flops_per_second: float

    def seconds(self, nbytes: int, flops: int) -> float:
        """The least time for so much traffic and so much arithmetic, one beside the other."""
        return max(nbytes / self.copy_bytes_per_second, flops / self.gemm_flops_per_second)


def one_gpu() -> Device:
    """The GPU of this process, which is alone.

    Raises:
        UsageError: there are several ranks.
        DeviceError: there is no usable GPU.
    """
    return gpu_of(one_process("this bench measures one GPU"))


def gpu_of(world: World) -> Device:
    """The GPU of a rank.

    Raises:
        DeviceError: there is no usable GPU.
    """
    return choose_device("cuda", world.local_rank, world.local_size)[0]


@contextmanager
def enough_memory(device: Device) -> Iterator[None]:
    """Makes a DeviceError of running out of the device's memory."""
    try:
        with device.ops.memory_errors():
            yield
    except MemoryError as error:
        raise DeviceError(
            f"{device.name} is out of memory: {error}", "Give a smaller --shape, or fewer tokens."
        ) from error


class Stopwatch:
    """Times launches that find nothing of their own in the L2 cache."""

    def __init__(self, repeats: int = REPEATS):
        import cupy

        self.repeats = repeats
        # Read, not written: what is dirty in the cache would be written back during the launch.
        self._other = cupy.zeros((FLUSH_BYTES // (4 * 4096), 4096), np.float32)
        self._largest = cupy.empty(len(self._other), np.float32)

    def seconds(self, launch: Launch) -> float:
        """The median time of a launch."""
        for _ in range(WARM_UP):
            launch()
        marks = []
        for _ in range(self.repeats):
            self._other.max(axis=1, out=self._largest)
            begin = mark()
            launch()
            marks.append((begin, mark()))
        return statistics.median(seconds_between(begin, end) for begin, end in marks)


def stream_seconds(launches: Sequence[Launch], times: int) -> float:
    """Time of all launches in turn, in a stream of `times` turns without gaps."""
    begin = mark()
    for _ in range(times):
        for launch in launches:
            launch()
    return seconds_between(begin, mark()) / times


def copy_rate() -> float:
    """Bytes a second, read and written, of a large copy within the device: the median of 20."""
    import cupy

    source, target = cupy.zeros(COPY_BYTES, np.uint8), cupy.zeros(COPY_BYTES, np.uint8)

    def copy() -> None:
        target.data.copy_from_device_async(source.data, COPY_BYTES)

    stream_seconds([copy], WARM_UP)
    return 2 * COPY_BYTES / statistics.median(stream_seconds([copy], 1) for _ in range(20))


def on_host(array: Array) -> np.ndarray:
    """The array itself if it is NumPy's, else a copy of it."""
    return array if isinstance(array, np.ndarray) else array.get()


def check(name: str, got: Array, expected: np.ndarray, dtype: np.dtype) -> None:
    """Compare a result, on the device or here, with its definition.

    Args:
        dtype: what the numbers are stored in, or were computed from.

    Raises:
        CupyllamaError: it is off by more than rounding, or holds no numbers.
    """
    got, expected = (on_host(array).astype(np.float64) for array in (got, expected))
    assert got.shape == expected.shape, f"{got.shape} {expected.shape}"
    error = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)
    if not error <= TOLERANCE[dtype.name]:  # which NaN is not either
        raise CupyllamaError(
            f"{name} is wrong: off by {error:.2g} of its norm in {dtype.name}, where rounding "
            f"explains {TOLERANCE[dtype.name]:.0e}",
            "Please report it with what `cupyllama doctor` says.",
        )


def result(bench: str, device: Device, **content: Any) -> dict[str, Any]:
    """What --json writes: when, on what and with what it was measured, and what came."""
    return {
        "bench": bench,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": device.name,
        "versions": versions(device),
        **content,
    }


def mark() -> Any:
    import cupy

    event = cupy.cuda.Event()
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    import cupy

    end.synchronize()
    return cupy.cuda.get_elapsed_time(begin, end) / 1e3
