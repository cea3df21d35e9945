"""The processor a process computes on: the GPU if there is a usable one, else the CPU."""

import os
import platform
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from cupyllama.errors import DeviceError

INSTALL_CUDA = "Install CuPy for your driver: pip install 'cupyllama[cuda13]' (or [cuda12])."
SET_CACHE_DIR = "set CUPY_CACHE_DIR to a directory that can be written"


@dataclass(frozen=True)
class Device:
    """One processor, and the operations that run on it."""

    kind: str  # "cuda" or "cpu"
    name: str
    ops: ModuleType
    compute_capability: int = 0  # 90 for 9.0; 0 on a CPU
    place: str = ""  # host and GPU: equal for two ranks that share one
    number: int = 0  # of the GPU among those visible

    def use(self) -> None:
        """Make it the current device of this thread."""
        if self.kind == "cuda":
            import cupy

            cupy.cuda.Device(self.number).use()

    def free_bytes(self) -> int | None:
        """Memory that can be had now, or None where the system does not say."""
        if self.kind == "cuda":
            import cupy

            # What the pool holds without using it can be had as well.
            return cupy.cuda.Device().mem_info[0] + cupy.get_default_memory_pool().free_bytes()
        return _available_host_bytes()

    def supports(self, dtype: str) -> bool:
        """bfloat16 needs an Ampere GPU or newer."""
        return dtype != "bfloat16" or self.kind == "cpu" or self.compute_capability >= 80


def choose_device(kind: str, local_rank: int = 0, local_size: int = 1) -> tuple[Device, str]:
    """The device for `--device auto|cuda|cpu`, and why `auto` took the CPU, if it did.

    The ranks of a host take its visible GPUs in order; where there are fewer GPUs than ranks,
    neighbours share one. A launcher that shows each of its processes one GPU
    (CUDA_VISIBLE_DEVICES) has chosen already.

    Raises:
        DeviceError: cuda is asked for and cannot be had.
    """
    if kind == "cpu":
        return _cpu(), ""
    reason = why_no_cuda(local_rank, local_size)
    if not reason:
        return _cuda(local_rank, local_size), ""
    if kind == "cuda":
        raise DeviceError(f"no usable GPU: {reason}", "`cupyllama doctor` says what is missing.")
    return _cpu(), reason


def why_no_cuda(local_rank: int = 0, local_size: int = 1) -> str:
    """What keeps CuPy from this rank's GPU, or an empty string."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed"
    except OSError as error:  # it makes its cache, by default in the home directory
        return _with_remedy(error)
    try:
        gpus = cupy.cuda.runtime.getDeviceCount()
        if gpus == 0:
            return "CUDA sees no GPU"
        from cupyllama.ops import cuda

        # On the rank's own GPU: a context of every rank on the first one would cost memory there.
        cupy.cuda.Device(gpu_of_rank(local_rank, local_size, gpus)).use()
        cuda.check_libraries()
    except Exception as error:  # a missing driver or library: CUDARuntimeError, ImportError, …
        return _with_remedy(error)
    return ""


def first_line(error: Exception) -> str:
    """What a library says, without its explanations."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def is_of_cache(error: Exception) -> bool:
    """Whether CuPy's cache cannot be used; a library that cannot be loaded has no errno."""
    return isinstance(error, OSError) and error.errno is not None


def _with_remedy(error: Exception) -> str:
    said = first_line(error)
    return f"CuPy's cache: {said}: {SET_CACHE_DIR}" if is_of_cache(error) else said


def _cpu() -> Device:
    from cupyllama.ops import reference

    return Device("cpu", _processor_name(), reference, place=f"{platform.node()}/cpu")


def gpu_of_rank(local_rank: int, local_size: int, gpus: int) -> int:
    """Which of the visible GPUs a rank takes."""
    return local_rank if local_size <= gpus else local_rank * gpus // local_size


def _cuda(local_rank: int, local_size: int) -> Device:
    import cupy

    from cupyllama.ops import cuda

    number = gpu_of_rank(local_rank, local_size, cupy.cuda.runtime.getDeviceCount())
    properties = cupy.cuda.runtime.getDeviceProperties(number)
    capability = 10 * properties["major"] + properties["minor"]
    place = f"{platform.node()}/{cupy.cuda.runtime.deviceGetPCIBusId(number)}"
    device = Device("cuda", properties["name"].decode(), cuda, capability, place, number)
    device.use()
    return device


def storage_dtype(name: str) -> np.dtype:
    """The NumPy dtype of `float32`, `float16` or `bfloat16`."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def choose_dtype(asked: str, saved: str, device: Device) -> str:
    """`--dtype`: as saved (float32 as float16) on a GPU, float32 on a CPU, where auto is asked.

    Raises:
        DeviceError: the device cannot compute in the dtype asked for.
    """
    if asked != "auto":
        if not device.supports(asked):
            raise DeviceError(
                f"{device.name} has no {asked}", "Give --dtype float16, or float32 to be exact."
            )
        return asked
    if device.kind == "cpu":
        return "float32"
    return gpu_dtype(saved) if device.supports(saved) else "float16"


def gpu_dtype(saved: str) -> str:
    """The 16-bit dtype nearest to what a checkpoint was saved in."""
    return "bfloat16" if saved == "bfloat16" else "float16"


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line for line in file if line.startswith("model name")), ":")
            name = name.split(":", 1)[1].strip()
    except OSError:
        name = platform.processor()
    return f"{name or platform.machine()} ({os.cpu_count()} cores)"


def _available_host_bytes() -> int | None:
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
    except OSError:
        pass
    return None
