"""Every kernel compiles for every GPU generation, without a GPU, and keeps to its registers."""

import re
import subprocess
import sys
from importlib import resources

import pytest

from cupyllama import kernels
from cupyllama.kernels import definitions
from cupyllama.kernels.variants import variants

HEAD_SIZES = range(32, 257, 2)  # what ModelConfig accepts
ARCHS = (75, 80, 86, 89, 90, 100, 120)
SYSTEM_HEADERS = {"cuda_fp16.h", "cuda_bf16.h"}
FILES = sorted(
    entry.name
    for entry in resources.files(kernels).iterdir()
    if entry.name.endswith((".cu", ".cuh"))
)


def _compile(filename, arch, **constants):
    pytest.importorskip("cupy")
    return kernels.compile_cubin(filename, arch, **constants)


def _assert_no_spills(filename, arch, constants):
    cubin, log = _compile(filename, arch, **constants)
    assert cubin.startswith(b"\x7fELF"), f"{filename} {constants}"
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", log)
    assert usage, f"{filename} {constants}: {log}"
    assert set(usage) == {("0", "0", "0")}, f"{filename} {constants}: {log}"
    # wgmma that the compiler has wait for each other: right, and several times as slow.
    assert "serialized" not in log, f"{filename} {constants}: {log}"


@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills(arch):
    for filename, constants in variants(arch):
        _assert_no_spills(filename, arch, constants)


def _sample_of_head_sizes(arch):
    """Other sizes for each arch, more where most people are, the largest for all."""
    step = 10 if arch in (80, 90) else 14  # not a multiple of 4: sizes with 4-byte and 8-byte units
    return [*HEAD_SIZES[ARCHS.index(arch) :: step // 2], HEAD_SIZES[-1]]


@pytest.mark.parametrize("arch", [arch for arch in ARCHS if arch >= 80])
def test_no_spills_in_attention_mma_of_rare_head_sizes(arch):
    for i, head_dim in enumerate(_sample_of_head_sizes(arch)):
        constants = definitions.attention_mma_constants(("FP16", "BF16")[i % 2], head_dim, 32, 8)
        _assert_no_spills("attention_mma.cu", arch, constants)


@pytest.mark.parametrize("arch", [75, 80, 90])
def test_no_spills_in_attention_of_rare_head_sizes(arch):
    for i, head_dim in enumerate(_sample_of_head_sizes(arch)[::-3]):
        storage = ("FP32", "FP16", "BF16")[i % 3]
        constants = definitions.attention_constants(storage, head_dim, 32, 8)
        _assert_no_spills("attention.cu", arch, constants)


def test_shared_memory_fits():
    """What a block may have on any GPU from 8.0 on."""
    for head_dim in HEAD_SIZES:
        constants = definitions.attention_mma_constants("FP16", head_dim, 32, 8)
        assert definitions.attention_mma_shared_bytes(constants) <= 99 * 1024, constants


def test_every_file_has_a_variant():
    covered = {filename for arch in ARCHS for filename, _ in variants(arch)}
    assert covered == {name for name in FILES if name.endswith(".cu")}


@pytest.mark.parametrize("filename", FILES)
def test_includes(filename):
    text = resources.files(kernels).joinpath(filename).read_text(encoding="utf-8")
    for header in re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, re.MULTILINE):
        assert header in SYSTEM_HEADERS or header in FILES, header
    assert not re.search(r'#include "', kernels.source(filename)), "a local header was not pasted"


@pytest.mark.parametrize("broken", ["rope.cu", "common.cuh"])
def test_errors_name_file_and_line(monkeypatch, broken):
    clean = kernels.source
    marker = {"rope.cu": "constexpr int HALF", "common.cuh": "constexpr unsigned ALL_LANES"}[broken]

    def with_error(filename):
        return clean(filename).replace(marker, f"nonsense {marker}")

    text = resources.files(kernels).joinpath(broken).read_text(encoding="utf-8")
    line = text[: text.index(marker)].count("\n") + 1
    monkeypatch.setattr(kernels, "source", with_error)
    with pytest.raises(RuntimeError) as error:
        _compile("rope.cu", 80, **definitions.rope_constants("FP16", 128, 32, 32))
    # The first alone: a mistake brings others, on the lines that follow.
    first = re.search(r"^(.*)\((\d+)\): .*\berror\b", str(error.value), re.MULTILINE)
    assert first and first.groups() == (broken, str(line)), error.value


def test_import_is_free():
    code = "import sys, cupyllama.kernels; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("itemsize, storage", [(2, "FP16"), (4, "FP32")])
@pytest.mark.parametrize("hidden", [1, 96, 331, 4096, 6656, 8192, 8193, 16384])
def test_rmsnorm_threads_cover_the_row(hidden, itemsize, storage):
    threads = definitions.rmsnorm_constants(storage, hidden)["THREADS"]
    packs = hidden // definitions.pack_width(hidden, itemsize)
    assert threads % 32 == 0 and 32 <= threads <= 1024
    assert -(-packs // threads) * (hidden // packs) <= 40
