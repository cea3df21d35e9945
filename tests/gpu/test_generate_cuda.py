"""`cupyllama generate` and `cupyllama bench generate` on the GPU."""

import json

import pytest
from click.testing import CliRunner
from tiny_generation import write_overflowing_model
from tiny_tokenizer import write_tokenizer

from cupyllama.bench import measure, shapes
from cupyllama.cli import cli
from cupyllama.kernels.definitions import FP8_ARCH

cupy = pytest.importorskip("cupy")

pytestmark = pytest.mark.gpu

PROMPTS = ["The man on the roof", "A lady walks to a", "She pours", "How to choose a bike:"]


def generate(device, *arguments):
    given = ["generate", "--demo", "--quiet", "--device", device, *arguments]
    result = CliRunner().invoke(cli, list(map(str, given)))
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.stdout


def records(device, folder, *arguments):
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    path = folder / "out.jsonl"
    generate(device, "--prompts", folder / "prompts.txt", "--output", path, *arguments)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "more",
    [["--batch-size", 3], ["--beam-width", 3], ["--batch-size", 3, "--repetition-penalty", 2]],
)
def test_the_demo_says_what_it_says_on_the_cpu(tmp_path, more):
    more = ["--max-new-tokens", 60, "--dtype", "float32", *more]
    expected = records("cpu", tmp_path, *more)
    assert len({record["text"] for record in expected}) == len(PROMPTS)
    assert records("cuda", tmp_path, *more) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_seed_gives_the_same_text_again(tmp_path, dtype, quantize):
    more = ["--max-new-tokens", 40, "--dtype", dtype, "--quantize", quantize, "--top-p", 0.95]
    first = records("cuda", tmp_path, *more, "--seed", 3)
    assert records("cuda", tmp_path, *more, "--seed", 3) == first
    assert records("cuda", tmp_path, *more, "--seed", 4) != first


def test_one_prompt_streams_the_text_of_the_file():
    more = ["--max-new-tokens", 60, "--dtype", "float32", "--stop", " small"]
    expected = generate("cpu", "--prompt", PROMPTS[0], *more)
    assert generate("cuda", "--prompt", PROMPTS[0], *more) == expected != "\n"


@pytest.mark.parametrize(
    "more", [[], ["--top-p", 0.9], ["--beam-width", 2], ["--repetition-penalty", 1.2]]
)
def test_float16_that_overflows(more, tmp_path):
    """Another dtype is the remedy, as the hint says."""
    model = write_overflowing_model(tmp_path / "model")
    write_tokenizer(model, json.loads((model / "config.json").read_text())["vocab_size"])
    given = ["generate", "--model", model, "--device", "cuda", "--quiet", "--prompt", "the man"]
    given += ["--max-new-tokens", 5, *more]
    results = {
        dtype: CliRunner().invoke(cli, [*map(str, given), "--dtype", dtype])
        for dtype in ("float16", "bfloat16", "float32")
    }
    assert [result.exit_code for result in results.values()] == [3, 0, 0], results
    refused = results["float16"]
    assert refused.stderr.startswith("cupyllama: --prompt: the logits of new token 1 are NaN or")
    assert "try --dtype bfloat16 or float32" in refused.stderr and refused.stdout == ""


# Sizes that 8-bit products allow; four heads of 64, two for each key-value head.
SHAPES = {"tiny": (3, 256, 512, 4, 2, 1024), "tiny-opt": (3, 256, 1024, 4, 1024)}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", SHAPES["tiny"])
    monkeypatch.setitem(shapes.OPT_SHAPES, "tiny-opt", SHAPES["tiny-opt"])
    monkeypatch.setattr(measure, "COPY_BYTES", 128 << 20)
    yield
    cupy.get_default_memory_pool().free_all_blocks()


@pytest.mark.parametrize("shape", ["tiny", "tiny-opt"])
def test_a_sweep(tiny, shape, tmp_path):
    kinds = ["none", "int8"]
    if int(cupy.cuda.Device().compute_capability) >= FP8_ARCH:
        kinds.append("fp8")
    # No GPU has memory for 4 million sequences, each of two blocks of 8 KiB a layer.
    path, sizes = tmp_path / "out.json", [1, 3, 4_000_000, 64]
    given = ["--shape", shape, "--batch-sizes", ",".join(map(str, sizes)), "--new-tokens", 20]
    given += ["--quantize", ",".join(kinds), "--json", path]
    result = CliRunner().invoke(cli, ["bench", "generate", *map(str, given)])
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    settings = json.loads(path.read_text())["settings"]
    assert [setting["quantize"] or "none" for setting in settings] == kinds
    for setting in settings:
        runs = setting["runs"]
        assert [run["out_of_memory"] for run in runs] == [size > 1000 for size in sizes]
        for run in runs:
            if not run["out_of_memory"]:
                assert run["times_floor"] > 1 and run["peak_memory_bytes"] > 0
        assert runs[3]["queries_per_second"] > 4 * runs[0]["queries_per_second"]
