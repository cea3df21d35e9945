"""8-bit weights: the same bits however they come about, the definition of fp8, every refusal."""

import json
import os
import shutil
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import e4m3_truth
import int8_truth
import ml_dtypes
import numpy as np
import pytest
from checkpoint_makers import write_pytorch_model
from click.testing import CliRunner
from e4m3_truth import MIDDLES, NUMBERS, nearest
from safetensors.numpy import load_file, save_file
from test_loading import DTYPES, PIECES, Derived, naive
from test_shard import meta_model
from tiny_models import write_tiny_model
from tiny_tokenizer import write_tokenizer

from cupyllama.background import BackgroundLoad
from cupyllama.checkpoint.e4m3 import e4m3_bits
from cupyllama.checkpoint.eight_bit import quantize_rows
from cupyllama.checkpoint.fields import SCALE, matrix_shapes, stage_bytes, stage_fields
from cupyllama.checkpoint.llama import LLAMA_NAMES
from cupyllama.checkpoint.quantization import check_device, choose_quantization
from cupyllama.checkpoint.safetensors import SafetensorsCheckpoint, read_header
from cupyllama.checkpoint.shard import ShardOptions, shard
from cupyllama.checkpoint.source import open_checkpoint
from cupyllama.cli import cli
from cupyllama.config import load_config
from cupyllama.errors import DeviceError, ModelError, UsageError
from cupyllama.journal import Journal
from cupyllama.loading import load_stage
from cupyllama.ops import reference
from cupyllama.parallel.devices import Device, choose_device
from cupyllama.quantized import Quantized

ATTENTION = "model.layers.0.self_attn."
MATRICES = LLAMA_NAMES.matrices
TRUTHS = {"fp8": e4m3_truth.quantized, "int8": int8_truth.quantized}

every_kind = pytest.mark.parametrize("quantize", list(TRUTHS))


def run(model, output, stages=1, **options):
    return shard(ShardOptions(model, output, stages, quiet=True, **options))


def load(directory, layers=None, dtype=np.float32, kind=open_checkpoint, told=None, **options):
    config = load_config(directory)
    layers = range(config.num_hidden_layers) if layers is None else layers
    on_bytes = (lambda count: None) if told is None else told.append
    options = {"quantize": "fp8"} | options
    return load_stage(
        kind(directory), config, layers, np.dtype(dtype), reference, on_bytes, **options
    )


def write_strange_model(directory, name="attention_bias", dtype="float32"):
    """Rows of zeros, NaN, infinity, subnormal numbers, and numbers far apart."""
    write_tiny_model(name, directory, dtype="float32")
    tensors = load_file(directory / "model.safetensors")
    q, k = tensors[ATTENTION + "q_proj.weight"], tensors[ATTENTION + "k_proj.weight"]
    q[0], q[3], q[-1] = 0, -0.0, 1e-39
    q[5, 7], q[6, 2], q[6, 9], q[8] = np.nan, np.nan, -3, np.nan
    k[0] = np.logspace(-9, 1, k.shape[1]) * (-1) ** np.arange(k.shape[1])
    k[1, 0], k[-1] = 6e4, np.arange(k.shape[1]) / 7
    tensors["model.layers.1.mlp.down_proj.weight"][2, 3] = -np.float32(2.0**-60)
    if dtype != "float32":
        tensors = {name: array.astype(DTYPES[dtype]) for name, array in tensors.items()}
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text()) | {"torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def truth(directory, layers, dtype=np.float32, quantize="fp8"):
    """The arrays of a stage by (layer, name): matrices from each stored tensor by itself."""
    checkpoint, config = SafetensorsCheckpoint(directory), load_config(directory)
    arrays = naive(checkpoint, config, layers, dtype)
    for layer, field in stage_fields(config, layers):
        if field.name in MATRICES:
            parts = []
            for name, shape in zip(field.parts, field.shapes, strict=True):
                stored = np.empty(shape, DTYPES[config.dtype])
                checkpoint.read_into(name, stored)
                parts.append(TRUTHS[quantize](stored))
            values, scales = map(np.concatenate, zip(*parts, strict=True))
            arrays[layer, field.name] = Quantized(values, scales)
    return arrays


def assert_same(weights, expected, layers):
    """Bit for bit."""
    for (layer, name), array in expected.items():
        found = getattr(weights if layer is None else weights.layers[layer - layers.start], name)
        pairs = [(found, array)]
        if isinstance(array, Quantized):
            assert isinstance(found, Quantized) and found.scale.dtype == np.float32
            pairs = [(found.values, array.values), (found.scale, array.scale)]
        for a, b in pairs:
            assert a.dtype == b.dtype and a.shape == b.shape
            a = a if isinstance(a, np.ndarray) else a.get()
            assert a.tobytes() == b.tobytes(), f"{layer} {name}"


def assert_equal(weights, others):
    """Two stages, bit for bit."""
    assert len(weights.layers) == len(others.layers)
    for layer, other in zip(weights.layers, others.layers, strict=True):
        expected = {(0, name): array for name, array in vars(other).items() if array is not None}
        assert_same(SimpleNamespace(layers=[layer]), expected, range(1))
    for name in ("embed_tokens", "norm", "lm_head"):
        a, b = getattr(weights, name), getattr(others, name)
        assert (a is None) == (b is None) and (a is None or a.tobytes() == b.tobytes())


# --- the definition ------------------------------------------------------------------------------


def test_the_truth_knows_every_number_of_ml_dtypes():
    of_bytes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(NUMBERS, of_bytes.astype(np.float64))


def test_every_upper_half_and_what_lies_beside_every_middle():
    """All that can matter: a number, the middle of two, and the floats next to both."""
    halves = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    special = np.concatenate([MIDDLES, NUMBERS, [1e-45, 2.0**-10, 2.0**-9, 447.99]])
    special = special.astype(np.float32)
    beside = [special, np.nextafter(special, np.float32(1e9)), np.nextafter(special, 0)]
    x = np.concatenate([halves, *beside, *(-s for s in beside)])
    x = x[np.abs(x) <= 448]
    assert len(x) > 30_000
    np.testing.assert_array_equal(e4m3_bits(x), nearest(x))


@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_reference_and_of_the_truth(dtype, quantize):
    rng = np.random.default_rng(1)
    for shape in [(1, 1), (3, 16), (70, 48), (2, 70_000), (0, 16), (700, 176)]:
        x = rng.standard_normal(shape) * np.exp(
            3 * rng.standard_normal((len(rng.random(shape)), 1))
        )
        x[rng.random(shape) < 0.01] = np.nan
        x[rng.random(shape) < 0.1] = 0
        x = x.astype(DTYPES[dtype])
        found, expected = (f(x, kind=quantize) for f in (quantize_rows, reference.quantize))
        assert found.kind == expected.kind == quantize
        assert found.values.tobytes() == expected.values.tobytes()
        assert found.scale.tobytes() == expected.scale.tobytes()
        if x.size < 5000:
            values, scale = TRUTHS[quantize](x)
            assert found.values.tobytes() == values.tobytes()
            assert found.scale.tobytes() == scale.tobytes()


# --- while loading -------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_bytes", PIECES[1:])
@pytest.mark.parametrize("kind", [SafetensorsCheckpoint, Derived])
@pytest.mark.parametrize("saved", DTYPES)
@every_kind
def test_strange_rows_cut_anywhere(quantize, saved, kind, piece_bytes, tmp_path):
    directory = write_strange_model(tmp_path, dtype=saved)
    cut = {"threads": 3, "piece_bytes": piece_bytes, "kind": kind, "quantize": quantize}
    for layers in (range(3), range(1, 2)):
        expected = truth(directory, layers, quantize=quantize)
        assert_same(load(directory, layers, **cut), expected, layers)


@every_kind
def test_the_dtype_of_the_rest_changes_no_matrix(quantize, tmp_path):
    directory = write_strange_model(tmp_path, dtype="bfloat16")
    for dtype in DTYPES.values():
        layers = range(3)
        weights = load(directory, layers, dtype, quantize=quantize)
        assert_same(weights, truth(directory, layers, dtype, quantize), layers)


def test_one_element_at_a_time_in_many_threads(tmp_path):
    directory = write_tiny_model("tied", tmp_path, dtype="float16")
    layers = range(1)
    weights = load(directory, layers, np.float16, threads=40, piece_bytes=1)
    assert_same(weights, truth(directory, layers, np.float16), layers)


@every_kind
def test_bytes_are_those_of_what_is_there(quantize, tmp_path):
    directory, told = write_tiny_model("gqa", tmp_path, dtype="float16"), []
    config, half = load_config(directory), np.dtype(np.float16)
    # q k v of 64 · (8 + 2 + 2) rows of 128, o of 128 rows of 512, gate and up of 2 · 256 rows of
    # 128, down of 128 rows of 256, with 4 bytes a row; two norms of 128.
    matrices = 768 * (128 + 4) + 128 * (512 + 4) + 512 * (128 + 4) + 128 * (256 + 4)
    ends = 2 * (2 * 320 * 128 + 128)
    nbytes = stage_bytes(config, range(2), half, quantize)
    assert nbytes == 2 * (matrices + 2 * 2 * 128) + ends
    load(directory, dtype=half, told=told, piece_bytes=5000, quantize=quantize)
    assert sum(told) == nbytes
    run(directory, tmp_path / "out", 2, quantize=quantize)
    told.clear()
    checkpoint = open_checkpoint(tmp_path / "out")
    load(tmp_path / "out", range(2), half, lambda _: checkpoint, told, quantize=quantize)
    assert sum(told) == checkpoint.bytes_read == nbytes
    message = f"take {nbytes / 1e9:.1f} GB in float16 and {quantize}"
    device = replace(choose_device("cpu")[0])
    object.__setattr__(device, "free_bytes", lambda: 1000)
    with pytest.raises(DeviceError, match=message):
        BackgroundLoad(checkpoint, config, range(2), "float16", device, False, quantize)


def wide_model(directory):
    """12.6 MB in layers of 2.1, in float32."""
    config = load_config(write_tiny_model("gqa", directory))
    raw = json.loads((directory / "config.json").read_text())
    raw |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
    (directory / "config.json").write_text(json.dumps(raw))
    config = load_config(directory)
    rng, tensors = np.random.default_rng(0), {}
    for _, field in stage_fields(config, range(6)):
        for name, shape in zip(field.parts, field.shapes, strict=True):
            tensors[name] = rng.standard_normal(shape, np.float32)
    save_file(tensors, directory / "model.safetensors")
    return config


@every_kind
@pytest.mark.parametrize("how", ["load", "shard"])
def test_memory_is_bounded(how, quantize, tmp_path):
    config = wide_model(tmp_path / "m")
    run(tmp_path / "m", tmp_path / "warm", quantize=quantize)
    stage = stage_bytes(config, range(6), np.dtype(np.float16), quantize)
    tracemalloc.start()
    try:
        if how == "load":
            cut = {"threads": 4, "piece_bytes": 20_000}
            load(tmp_path / "m", dtype=np.float16, quantize=quantize, **cut)
            least, most = stage, stage + (2 << 20)
        else:
            run(tmp_path / "m", tmp_path / "out", quantize=quantize, chunk_bytes=20_000)
            least, most = 0, (20 + 8 * os.cpu_count()) * 20_000 + (1 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert least < peak < most < 2 * stage
    assert stage > 3 << 20


# --- sharded -------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("saved", DTYPES)
def test_shard_then_load_is_load(saved, quantize, tmp_path):
    directory, kind = write_strange_model(tmp_path / "m", dtype=saved), {"quantize": quantize}
    expected = load(directory, **kind)
    for stages in (1, 2, 3):
        output = tmp_path / str(stages)
        run(directory, output, stages, chunk_bytes=3000, **kind)
        assert_equal(load(output, **kind), expected)
        for layers in [range(0, 1), range(1, 3), range(2, 3)]:
            assert_equal(load(output, layers, **kind), load(directory, layers, **kind))
    run(tmp_path / "3", tmp_path / "again", 2)
    assert_equal(load(tmp_path / "again", **kind), expected)
    run(tmp_path / "1", tmp_path / "asked", 2, dtype=saved, **kind)
    assert_equal(load(tmp_path / "asked", **kind), expected)
    digests = {open_checkpoint(tmp_path / name).digest() for name in ("1", "2", "again", "asked")}
    assert len(digests) == 1


@every_kind
def test_tied_pytorch_and_meta_sources(quantize, tmp_path):
    (tmp_path / "LLaMA").mkdir()
    for directory in (
        write_tiny_model("tied", tmp_path / "tied", dtype="float16"),
        write_pytorch_model("llama1", tmp_path / "pytorch"),
        meta_model(tmp_path / "LLaMA" / "7B"),
    ):
        output, kind = tmp_path / f"{directory.name}-out", {"quantize": quantize}
        run(directory, output, 2, chunk_bytes=2000, **kind)
        assert_equal(load(output, **kind), load(directory, piece_bytes=3000, **kind))
    expected = load(write_tiny_model("llama1", tmp_path / "hf"), **kind)
    assert_equal(load(tmp_path / "pytorch-out", **kind), expected)
    assert_equal(load(tmp_path / "7B-out", **kind), expected)


@pytest.mark.parametrize(("quantize", "stored"), [("fp8", "F8_E4M3"), ("int8", "I8")])
def test_the_files(quantize, stored, tmp_path):
    directory = write_tiny_model("gqa", tmp_path / "m", dtype="bfloat16")
    output = tmp_path / "out"
    run(directory, output, quantize=quantize, dtype="float16")
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["quantization"] == quantize
    config = load_config(output)
    arrays, _ = read_header(output / manifest["stages"][0]["file"])
    for name, shape in matrix_shapes(config).items():
        for layer in range(2):
            matrix, scale = (arrays[f"layers.{layer}.{name}{end}"] for end in ("", SCALE))
            assert (matrix.dtype, matrix.shape) == (stored, shape)
            assert (scale.dtype, scale.shape) == ("F32", shape[:1])
            pieces = manifest["stages"][0]["pieces"]
            assert pieces[matrix.name] == pieces[scale.name] != []
    rest = {a.dtype for n, a in arrays.items() if not any(m in n for m in MATRICES)}
    assert rest == {"F16"}
    tensors = open_checkpoint(output).tensors
    assert tensors[ATTENTION + "k_proj.weight"].dtype == stored
    scale = tensors[ATTENTION + "k_proj.weight_scale"]
    assert (scale.dtype, scale.shape) == ("F32", (128,))
    plain = json.loads((run(directory, tmp_path / "p").output / "manifest.json").read_text())
    assert plain["quantization"] is None


def test_an_interrupted_run_goes_on_only_with_the_same_setting(tmp_path, monkeypatch):
    from cupyllama.checkpoint import shard as sharding

    directory, write = write_tiny_model("llama1", tmp_path / "m"), sharding.write_stage

    def broken(path, *arguments):
        if path.name.startswith("stage-01"):
            raise KeyboardInterrupt
        return write(path, *arguments)

    monkeypatch.setattr(sharding, "write_stage", broken)
    with pytest.raises(KeyboardInterrupt):
        run(directory, tmp_path / "out", 3, quantize="fp8")
    monkeypatch.setattr(sharding, "write_stage", write)
    with pytest.raises(UsageError, match="differs in quantization"):
        run(directory, tmp_path / "out", 3)
    assert run(directory, tmp_path / "out", 3, quantize="fp8").files_kept == 1
    assert_equal(load(tmp_path / "out"), load(directory))


# --- refusals ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """A quantized checkpoint, and what it was made from."""
    folder = tmp_path_factory.mktemp("fp8")
    write_tokenizer(write_tiny_model("gqa", folder / "m", dtype="float16"))
    run(folder / "m", folder / "out", 2, quantize="fp8")
    return folder


def test_what_was_chosen(fp8):
    config = load_config(fp8 / "m")
    for asked, stored, chosen in [
        *(("auto", "m", None), ("none", "m", None), ("fp8", "m", "fp8")),
        *(("auto", "out", "fp8"), ("fp8", "out", "fp8"), ("int8", "m", "int8")),
    ]:
        assert choose_quantization(asked, fp8 / stored, config) == chosen
    with pytest.raises(UsageError, match="--quantize none: .*out are fp8") as error:
        choose_quantization("none", fp8 / "out", config)
    assert "--quantize auto" in error.value.hint
    with pytest.raises(UsageError, match="--quantize int8: .*out are fp8"):
        choose_quantization("int8", fp8 / "out", config)
    with pytest.raises(ModelError, match="fp8 already"):
        load(fp8 / "out", quantize=None)


def test_sizes_that_do_not_go(tmp_path):
    directory = write_tiny_model("gqa", tmp_path)
    config = load_config(directory)
    with pytest.raises(ModelError, match="qkv_proj is 384 × 136, and fp8") as error:
        choose_quantization(
            "fp8",
            directory,
            replace(config, hidden_size=136, intermediate_size=264, num_attention_heads=2),
        )
    assert "Give --quantize int8" in error.value.hint
    for asked, chosen in (("none", None), ("int8", "int8")):
        assert choose_quantization(asked, directory, replace(config, hidden_size=136)) == chosen
    with pytest.raises(ModelError, match="down_proj is 128 × 264"):
        choose_quantization("fp8", directory, replace(config, intermediate_size=264))


def test_gpus_without_fp8():
    for capability in (70, 80, 86):
        device = Device("cuda", "A100", reference, capability)
        with pytest.raises(
            DeviceError, match=f"A100 has no fp8: .*{capability / 10}, and 8.9"
        ) as e:
            check_device("fp8", device)
        assert "--quantize int8 or none" in e.value.hint
        for quantize in (None, "int8"):
            check_device(quantize, device)
    for device in (Device("cuda", "L4", reference, 89), Device("cpu", "x", reference)):
        check_device("fp8", device)


def test_sharding_cannot_undo_it(fp8, tmp_path):
    with pytest.raises(UsageError, match="--quantize none"):
        run(fp8 / "out", tmp_path / "again", quantize="none")
    with pytest.raises(UsageError, match="--dtype bfloat16: .*out is fp8, and .*float16"):
        run(fp8 / "out", tmp_path / "again", dtype="bfloat16")
    assert not list(tmp_path.iterdir())


def test_broken_quantized_directories(fp8, tmp_path):
    folder = shutil.copytree(fp8 / "out", tmp_path / "w")
    manifest = json.loads((folder / "manifest.json").read_text())
    for broken, message in [
        ({"quantization": "int3"}, "quantization 'int3'; this cupyllama reads fp8, int8"),
        ({"quantization": None}, "scale is not an array of this stage"),
    ]:
        (folder / "manifest.json").write_text(json.dumps(manifest | broken))
        with pytest.raises(ModelError, match=message):
            open_checkpoint(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    path = folder / manifest["stages"][0]["file"]
    path.write_bytes(path.read_bytes().replace(b'"F8_E4M3"', b'"F8_E5M2"', 1))
    with pytest.raises(ModelError, match="stored as F8_E5M2, not F8_E4M3"):
        load(folder)
    plain = shutil.copytree(fp8 / "m", tmp_path / "plain")
    path = plain / "model.safetensors"
    tensors = load_file(path)
    name = ATTENTION + "o_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    save_file(tensors, path)
    for quantize in (None, "fp8"):
        with pytest.raises(ModelError, match=f"{name} is stored as F8_E4M3"):
            load(plain, quantize=quantize)


# --- the command line ----------------------------------------------------------------------------


def score(*arguments):
    fixed = ["score", "--device", "cpu", "--quiet", "--limit", "12"]
    return CliRunner().invoke(cli, [*fixed, *map(str, arguments)])


def answers(path):
    return [json.loads(line)["loglikelihoods"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("quantize", "most"), [("fp8", 0.1), ("int8", 0.01)])
def test_the_demo_in_eight_bits(quantize, most, tmp_path):
    for asked in ("none", quantize):
        result = score(
            *("--demo", "--quantize", asked, "--samples", tmp_path / asked),
            *("--output", tmp_path / f"{asked}.json"),
        )
        assert result.exit_code == 0, result.output
        assert (f"float32 and {quantize} on" in result.stdout) == (asked == quantize)
        config = json.loads((tmp_path / f"{asked}.json").read_text())["config"]
        assert config["quantize"] == asked
    plain, found = (np.concatenate(answers(tmp_path / name)) for name in ("none", quantize))
    difference = np.abs(plain - found).max()
    assert 0 < difference < most * np.abs(plain).max()


@every_kind
def test_sharded_or_not_the_answers_are_the_same(quantize, tmp_path, monkeypatch):
    from cupyllama.tasks.files import demo_directory

    data = ("--data", demo_directory() / "questions.jsonl")
    out, demo = tmp_path / "out", demo_directory()
    sharding = ["shard", "--model", demo, "--output", out, "--stages", 2, "--quiet"]
    result = CliRunner().invoke(cli, [*map(str, sharding), "--quantize", quantize])
    assert result.exit_code == 0, result.output
    made = score("--demo", "--quantize", quantize, "--samples", tmp_path / "made")
    stored = score("--model", out, *data, "--samples", tmp_path / "stored")
    assert made.exit_code == stored.exit_code == 0, stored.output
    assert answers(tmp_path / "made") == answers(tmp_path / "stored")
    result = score("--model", out, *data, "--quantize", "none")
    assert result.exit_code == 2 and "nothing undoes" in result.stderr
    told = []
    monkeypatch.setattr("cupyllama.plan.stage_bytes", lambda *a: told.append(a[-1]) or 10**9)
    assert "1.00 GB of weights" in score("--model", out, *data, "--dry-run").stdout
    for asked in (quantize, "none"):
        assert score("--demo", "--dry-run", "--quantize", asked).exit_code == 0
    assert told == [quantize, quantize, None]


@every_kind
def test_answers_of_another_setting_are_not_taken_up(quantize, tmp_path, monkeypatch):
    samples = ("--samples", tmp_path / "s.jsonl")
    monkeypatch.setattr(Journal, "remove", Journal.close)  # as if it had been killed
    assert score("--demo", "--quantize", quantize, *samples).exit_code == 0
    result = score("--demo", *samples, "--resume")
    assert result.exit_code == 2
    assert f"quantize was '{quantize}' and is 'none'" in result.stderr
    assert score("--demo", "--quantize", quantize, *samples, "--resume").exit_code == 0
