"""CUDA kernels, compiled at run time from the files in this folder.

`definitions` has what each is compiled with, `variants` what stands for all of that in tests.
"""

import functools
import os
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

from cupyllama.kernels.definitions import Constants

_LOCAL_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
_OPTIONS = ("--std=c++17",)
_DEFAULT_SHARED_BYTES = 48 * 1024
# Files of wgmma and setmaxnreg, which sm_90a has and CuPy would not ask for by itself.
_HOPPER = "_sm90.cu"


def source(filename: str) -> str:
    """The file with its local headers pasted in.

    CuPy keys its disk cache on the source text and the options, not on what an include path
    reaches: a pasted header cannot go stale.
    """
    text = resources.files(__package__).joinpath(filename).read_text(encoding="utf-8")

    def paste(match: re.Match) -> str:
        next_line = text.count("\n", 0, match.start()) + 2
        return f'#line 1 "{match[1]}"\n{source(match[1])}\n#line {next_line} "{filename}"'

    return f'#line 1 "{filename}"\n' + _LOCAL_INCLUDE.sub(paste, text)


def debugging() -> bool:
    """Whether each launch is to wait for its end: CUPYLLAMA_DEBUG=1 in the environment."""
    return os.environ.get("CUPYLLAMA_DEBUG", "0") not in ("", "0")


@functools.cache
def kernel(filename: str, name: str, shared_bytes: int = 0, **constants: Any) -> Callable:
    """The kernel `name` of a file, compiled for the current device with -D`constants`.

    Call it with grid, block, arguments and, if it has any, `shared_mem=shared_bytes`.  With
    CUPYLLAMA_DEBUG=1 in the environment each launch waits for its end, so that an error names the
    kernel that caused it.
    """
    import cupy

    options = _OPTIONS + _definitions(constants)
    if filename.endswith(_HOPPER):
        options += ("-arch=sm_90a",)
    function = cupy.RawModule(code=source(filename), options=options).get_function(name)
    if shared_bytes > _DEFAULT_SHARED_BYTES:
        function.max_dynamic_shared_size_bytes = shared_bytes
    if not debugging():
        return function
    return _checked(function, " ".join((filename, name, *_definitions(constants))))


def compile_cubin(filename: str, arch: int, **constants: Any) -> tuple[bytes, str]:
    """Compile a file for `sm_<arch>`; this needs no GPU.

    Returns:
        The cubin, and the compiler's log with registers, stack frame and spills of each kernel.

    Raises:
        RuntimeError: it does not compile; the message is the log.
    """
    from cupy._core.core import assemble_cupy_compiler_options
    from cupy.cuda import nvrtc

    # What RawModule would add itself: CuPy's include paths, -ftz and the architecture.
    options = assemble_cupy_compiler_options(_OPTIONS + _definitions(constants))
    suffix = "a" if filename.endswith(_HOPPER) else ""
    options += ("-ftz=true", f"-arch=sm_{arch}{suffix}", "--ptxas-options=-v")
    program = nvrtc.createProgram(source(filename), filename, (), ())
    try:
        nvrtc.compileProgram(program, options)
        # CuPy cuts the last byte off as if it ended a string; it is a zero.
        return nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(nvrtc.getProgramLog(program)) from error
    finally:
        nvrtc.destroyProgram(program)


def _definitions(constants: Constants) -> tuple[str, ...]:
    return tuple(f"-D{name}={value}" for name, value in sorted(constants.items()))


def _checked(function: Callable, title: str) -> Callable:
    import cupy

    def launch(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
            cupy.cuda.get_current_stream().synchronize()
        except Exception as error:
            raise RuntimeError(f"kernel {title}: {error}") from error

    return launch
