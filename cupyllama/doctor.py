"""`cupyllama doctor`: what this machine offers, and how to get what it lacks."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cupyllama.parallel.devices import (
    INSTALL_CUDA,
    SET_CACHE_DIR,
    choose_device,
    first_line,
    is_of_cache,
)

_MPI_VERSION = "from mpi4py import MPI; print(MPI.Get_library_version().split(',')[0])"


@dataclass(frozen=True)
class Finding:
    """One line of the report; a remedy where something is missing."""

    name: str
    found: str
    remedy: str = ""

    @property
    def mark(self) -> str:
        return "-" if self.remedy else "✓"


def examine() -> Iterator[Finding]:
    """Every part that scoring can use, in the order in which one needs the other."""
    cpu, _ = choose_device("cpu")
    memory = cpu.free_bytes()
    free = f", {memory / 1e9:.1f} GB free" if memory is not None else ""
    yield Finding("Python", f"{platform.python_version()} on {platform.system()}")
    yield Finding("CPU", f"{cpu.name}{free}")
    yield _driver()
    yield _cupy()
    yield _part("GPU", _gpus, "Without one, scoring runs on the CPU.")
    yield _part("NVRTC", _nvrtc, INSTALL_CUDA)
    yield _part("cuBLASLt", _cublas, INSTALL_CUDA)
    yield _part("kernels", _kernels, f"{INSTALL_CUDA} A V100 needs [cuda12].")
    yield _part("NCCL", _nccl, "Needed for several GPUs: pip install nvidia-nccl-cu13 (or -cu12).")
    yield _mpi()
    yield _part(
        "tokenizers", _tokenizers, "For tokenizer.json and vocab.json: pip install tokenizers"
    )


def _part(name: str, look: Callable[[], str], remedy: str) -> Finding:
    """What `look` finds, or why it cannot."""
    try:
        return Finding(name, look())
    except Exception as error:  # each library has its own way of not being there
        if is_of_cache(error):
            remedy = f"CuPy keeps its kernels there: {SET_CACHE_DIR}."
        return Finding(name, f"not usable: {first_line(error)}", remedy)


def _driver() -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding("driver", "no nvidia-smi", "Install NVIDIA's driver to use a GPU.")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode or not answer.stdout.strip():
        return Finding("driver", "nvidia-smi fails", "Reinstall NVIDIA's driver, or restart.")
    return Finding("driver", answer.stdout.split()[0])


def _cupy() -> Finding:
    for package in ("cupy-cuda13x", "cupy-cuda12x", "cupy"):
        try:
            return Finding("CuPy", f"{importlib.metadata.version(package)} ({package})")
        except importlib.metadata.PackageNotFoundError:
            continue
    return Finding("CuPy", "not installed", INSTALL_CUDA)


def _gpus() -> str:
    import cupy

    names = []
    for number in range(cupy.cuda.runtime.getDeviceCount()):
        properties = cupy.cuda.runtime.getDeviceProperties(number)
        with cupy.cuda.Device(number) as device:
            free, total = device.mem_info
        names.append(
            f"{number}: {properties['name'].decode()}, sm_{properties['major']}"
            f"{properties['minor']}, {properties['multiProcessorCount']} multiprocessors, "
            f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        )
    if not names:
        raise RuntimeError("CUDA sees no GPU")
    return "; ".join(names)


def _nvrtc() -> str:
    from cupy.cuda import nvrtc

    major, minor = nvrtc.getVersion()
    return f"{major}.{minor}"


def _cublas() -> str:
    from cupyllama.ops import cublaslt

    return str(cublaslt.version())


def _kernels() -> str:
    from cupyllama.ops import cuda

    cuda.check_libraries()
    return "compile and load"


def _nccl() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy's own words on what `available` says too
        from cupy.cuda import nccl

    if not nccl.available:
        raise RuntimeError("libnccl is not installed")
    version = nccl.get_version()
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _mpi() -> Finding:
    """In a process of its own: importing MPI starts it, and a broken one ends the process."""
    remedy = "Needed for several processes: pip install 'cupyllama[mpi]', or your system's MPI."
    command = [sys.executable, "-c", _MPI_VERSION]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=_single())
    if answer.returncode:
        reason = answer.stderr.strip().split("\n")[-1]
        return Finding("MPI", f"not usable: {reason}", remedy)
    launcher = "" if shutil.which("mpirun") else "; no mpirun on the PATH"
    return Finding("MPI", answer.stdout.strip() + launcher, remedy if launcher else "")


def _single() -> dict[str, str]:
    """The environment without a launcher's variables, so that the look joins no running job."""
    prefixes = ("OMPI_", "PMI_", "PMIX_")
    return {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}


def _tokenizers() -> str:
    return importlib.metadata.version("tokenizers")
