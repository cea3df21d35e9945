"""Each bench on a tiny shape: figures that can be, and a wrong kernel noticed."""

import json

import pytest
from click.testing import CliRunner

from cupyllama.bench import gemm, measure, shapes
from cupyllama.cli import cli
from cupyllama.kernels.definitions import FP8_ARCH
from cupyllama.quantized import Quantized

cupy = pytest.importorskip("cupy")
cuda = pytest.importorskip("cupyllama.ops.cuda")

pytestmark = pytest.mark.gpu

# Sizes that 8-bit products allow; four heads of 64, two for each key-value head.
TINY = (3, 256, 512, 4, 2, 1024)
TINY_OPT = (3, 256, 1024, 4, 1024)

both = pytest.mark.parametrize("shape", ["tiny", "tiny-opt"])


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setitem(shapes.OPT_SHAPES, "tiny-opt", TINY_OPT)
    monkeypatch.setattr(measure, "FLUSH_BYTES", 128 << 20)
    monkeypatch.setattr(measure, "COPY_BYTES", 128 << 20)
    monkeypatch.setattr(gemm, "CEILING_SECONDS", 0.1)
    monkeypatch.setattr(gemm, "WARM_SECONDS", 0.02)
    yield
    cupy.get_default_memory_pool().free_all_blocks()


def bench(*arguments, shape="tiny"):
    return CliRunner().invoke(cli, ["bench", *map(str, arguments), "--shape", shape])


def measured(path, *arguments, shape="tiny"):
    result = bench(*arguments, "--json", path, shape=shape)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    found = json.loads(path.read_text())
    assert found["bench"] == arguments[0] and found["gpu"] and found["versions"]["cupy"]
    return found, result.stdout


def has_fp8():
    return int(cupy.cuda.Device().compute_capability) >= FP8_ARCH


KERNELS = {
    "tiny": ["gather", "rmsnorm", "linear_rope", "attention", "linear_swiglu", "log_probs"]
    + ["rope", "swiglu", "dequantize"],
    "tiny-opt": ["gather", "add", "layernorm", "attention", "linear_relu", "linear", "log_probs"]
    + ["dequantize"],
}
FP8_KERNELS = {
    "tiny": ["quantize", "rmsnorm, fp8", "swiglu, fp8"],
    "tiny-opt": ["quantize", "layernorm, fp8"],
}


@both
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_kernels(tmp_path, dtype, shape):
    arguments = ["--dtype", dtype, "--micro-batch-tokens", 2048, "--repeats", 5]
    found, text = measured(tmp_path / "out.json", "kernels", *arguments, shape=shape)
    names = KERNELS[shape] + (FP8_KERNELS[shape] if has_fp8() else [])
    names = [*names, "attention, few-shot", "attention, own prompts"]
    assert [run["kernel"] for run in found["runs"]] == names
    assert found["copy_bytes_per_second"] > 1e10 and found["gemm_tflops"] > 0
    for run in found["runs"]:
        assert 1e-7 < run["seconds"] < 1e-2, run
        assert run["bytes"] > 0 and run["bytes_per_second"] < 1e14 and run["of_ceiling"] > 0, run
        assert run["kernel"] in text


PRODUCTS = {
    "tiny": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"],
    "tiny-opt": ["qkv_proj", "out_proj", "fc1", "fc2", "lm_head"],
}


@both
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "fp8"])
def test_gemm(tmp_path, dtype, shape):
    if dtype == "fp8" and not has_fp8():
        assert bench("gemm", "--dtype", "fp8").exit_code == 5
        return
    arguments = ["--dtype", dtype, "--tokens", 128, "--tokens", 32, "--repeats", 2]
    found, _ = measured(tmp_path / "out.json", "gemm", *arguments, shape=shape)
    assert [run["product"] for run in found["runs"][::2]] == PRODUCTS[shape]
    for run in found["runs"]:
        assert set(run["seconds"]) == ({"gemm"} if dtype == "fp8" else {"gemm", "gemmEx"})
        sizes = {(one["n"], one["k"]) for one in found["algorithms"]}
        assert (run["n"], run["k"]) in sizes
        assert all(1e-7 < seconds < 1e-2 for seconds in run["seconds"].values()), run


LAYER = {
    "tiny": {"linear_rope qkv_proj", "attention", "linear_swiglu gate_up_proj"},
    "tiny-opt": {"linear qkv_proj", "attention", "linear_relu fc1", "linear fc2"},
}


@both
@pytest.mark.parametrize("quantize", ["none", "fp8", "int8"])
def test_score(tmp_path, shape, quantize):
    if quantize == "fp8" and not has_fp8():
        assert bench("score", "--quantize", "fp8").exit_code == 5
        return
    sizes = ["--micro-batch-tokens", 512, "--micro-batch-tokens", 1024]
    arguments = ["--questions", 40, "--repeats", 2, "--quantize", quantize, *sizes]
    found, text = measured(tmp_path / "out.json", "score", *arguments, shape=shape)
    assert found["questions"] == 40 and len(found["runs"]) == 2
    for run in found["runs"]:
        assert len(run["seconds"]) == 2 and min(run["seconds"]) > 0
        assert run["questions_per_second"] > 0 and 0 < run["efficiency"] < 1.5
        assert run["tokens_asked"] > run["tokens_computed"] > 0
        # of the weights alone
        assert run["peak_memory_bytes"] > 3 * 256 * 512 * 3 * (2 if quantize == "none" else 1)
        spent = run["breakdown"]
        assert LAYER[shape] <= set(spent["layer"])
        parts = 2 * sum(spent["layer"].values()) + sum(spent["rest"].values())
        assert 0 < parts <= 1.05 * spent["seconds"]
    assert all(name in text for name in LAYER[shape])


def test_load(tmp_path):
    found, _ = measured(tmp_path / "out.json", "load", "--folder", tmp_path, "--repeats", 2)
    assert found["bytes"] > 1e6 and found["runs"][0]["of_pinned_copy"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json"]


def test_the_watch_agrees_with_the_copy():
    source, target = cupy.zeros(256 << 20, cupy.uint8), cupy.empty(256 << 20, cupy.uint8)
    watch = measure.Stopwatch(10)
    seconds = watch.seconds(lambda: target.data.copy_from_device_async(source.data, source.nbytes))
    assert 2 * source.nbytes / seconds == pytest.approx(measure.copy_rate(), rel=0.3)


def test_what_does_not_fit(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", (1000, 16384, 65536, 128, 128, 32000))
    result = bench("score")
    assert result.exit_code == 5 and "GB for its weights" in result.stderr


def off(out):
    """One in ten numbers wrong by a half."""
    if isinstance(out, Quantized):
        out.scale[::10] *= 1.5
    else:
        out.reshape(-1)[::10] *= out.dtype.type(1.5)
    return out


@pytest.mark.parametrize(
    "operation, also",
    [
        *(("gather", ""), ("rmsnorm", ""), ("rope", ""), ("attention", ""), ("swiglu", "")),
        *(("linear_rope", ""), ("linear_swiglu", "")),
        *(("add", ""), ("layernorm", ""), ("linear", ""), ("linear_relu", "")),
        *(("log_probs", ""), ("quantize", "fp8"), ("rmsnorm", "fp8"), ("swiglu", "fp8")),
        *(("layernorm", "fp8"), ("dequantize", "")),
    ],
)
def test_a_wrong_kernel_is_named(monkeypatch, operation, also):
    if also and not has_fp8():
        pytest.skip("no fp8")
    right = getattr(cuda, operation)

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        if operation == "log_probs":
            off(args[-1])
        elif isinstance(out, Quantized) or not also:
            off(out)
        return out

    monkeypatch.setattr(cuda, operation, wrong)
    shape = "tiny" if operation in KERNELS["tiny"] else "tiny-opt"
    result = bench("kernels", "--micro-batch-tokens", 2048, "--repeats", 2, shape=shape)
    assert result.exit_code == 1, result.output
    name = f"{operation}, fp8" if also and operation != "quantize" else operation
    assert result.stderr.startswith(f"cupyllama: {name}") and "is wrong" in result.stderr


def test_a_wrong_product_is_named(monkeypatch):
    from cupyllama.ops import gemm as module

    right = module.gemm

    def wrong(y, x, weight, accumulate=False):
        right(y, x, weight, accumulate)
        off(y)

    monkeypatch.setattr(module, "gemm", wrong)
    result = bench("gemm", "--tokens", 64)
    assert result.exit_code == 1 and result.stderr.startswith("cupyllama: gemm (qkv_proj of tiny)")
