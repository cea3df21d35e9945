"""OPT as a family: its layers cut anywhere, its checkpoints in every form, and what is refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoint_makers import open_stage, write_pytorch_model, write_torch
from click.testing import CliRunner
from engine import build_stage, score_rows
from safetensors.numpy import load_file, save_file
from test_evaluate import random_rows
from tiny_models import TINY_MODELS, tiny_tensors, write_tiny_model
from tiny_tokenizer import write_tokenizer

from cupyllama.checkpoint.fields import matrix_shapes, stage_fields
from cupyllama.checkpoint.quantization import choose_quantization
from cupyllama.checkpoint.shard import ShardOptions, shard
from cupyllama.checkpoint.source import open_checkpoint
from cupyllama.checkpoint.stages import HEAD_SHARE, head_layers
from cupyllama.cli import cli
from cupyllama.config import load_config
from cupyllama.errors import ModelError
from cupyllama.evaluate import plan
from cupyllama.loading import load_stage
from cupyllama.model.opt import Stage
from cupyllama.ops import reference
from cupyllama.packing import TokenRow
from cupyllama.quantized import Quantized
from cupyllama.sizing import activation_bytes

NAMES = ["opt", "opt_350m", "opt_untied"]
ROWS = random_rows(np.random.default_rng(5), 12)
LAYER = "model.decoder.layers.1."


def part(directory, layers, quantize=None, dtype=np.float32):
    """A stage of some layers."""
    config, checkpoint = load_config(directory), open_checkpoint(directory)
    dtype = np.dtype(dtype)
    weights = load_stage(checkpoint, config, layers, dtype, reference, quantize=quantize)
    return Stage(config, weights, reference, config.max_length)


def scores(directory):
    return score_rows(open_stage(directory), ROWS).loglikelihoods


def through(stages):
    """What the last of several stages makes of the rows, each given what the one before made."""
    found = []
    for batch in plan(ROWS, 200, reference):
        hidden = None
        for stage in stages:
            hidden = stage.forward(batch, hidden)
        found.append(hidden)
    return np.concatenate(found, axis=1)


# --- the layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, "fp8", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_stages_pass_on_one_tensor_and_the_same_bits(name, quantize, tmp_path):
    directory = write_tiny_model(name, tmp_path)
    layers = TINY_MODELS[name]["num_hidden_layers"]
    expected = through([part(directory, range(layers), quantize)])
    for borders in ([1], list(range(1, layers))):
        edges = [0, *borders, layers]
        spans = [range(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        found = through([part(directory, span, quantize) for span in spans])
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_near_float32(name, dtype, tmp_path):
    directory = write_tiny_model(name, tmp_path)
    layers = range(TINY_MODELS[name]["num_hidden_layers"])
    wide, half = (through([part(directory, layers, None, d)])[0] for d in (np.float32, dtype))
    assert 0 < np.abs(wide - half).max() < (0.05 if dtype == np.float16 else 0.4)


@pytest.mark.parametrize("quantize", ["fp8", "int8"])
@pytest.mark.parametrize("name", NAMES)
def test_matrices_of_eight_bits(name, quantize, tmp_path):
    directory = write_tiny_model(name, tmp_path)
    layers = range(TINY_MODELS[name]["num_hidden_layers"])
    stage = part(directory, layers, quantize)
    for layer in stage.weights.layers:
        quantized = {key for key, value in vars(layer).items() if isinstance(value, Quantized)}
        assert quantized == {"qkv_proj", "out_proj", "fc1", "fc2"}
    wide, found = through([part(directory, layers)])[0], through([stage])[0]
    least, most = (0.01, 0.2) if quantize == "fp8" else (0.0005, 0.03)
    assert least < np.abs(wide - found).mean() < most  # of log-probabilities around -5


def test_the_last_position_has_the_last_row_of_the_table(tmp_path):
    directory = write_tiny_model("opt_untied", tmp_path)
    longest = TINY_MODELS["opt_untied"]["max_position_embeddings"]
    tokens = np.random.default_rng(0).integers(4, 320, longest + 1).tolist()
    # the last token of a row is not fed
    rows = [TokenRow(tokens[: longest + extra], longest - 10, 0) for extra in (0, 1)]
    before = [score_rows(build_stage(directory), [row]).loglikelihoods[0] for row in rows]
    path = directory / "model.safetensors"
    tensors = load_file(path)
    table = tensors["model.decoder.embed_positions.weight"]
    table[-1] += np.arange(table.shape[1])
    table[:2] = np.nan  # rows that no position has
    save_file(tensors, path)
    after = [score_rows(build_stage(directory), [row]).loglikelihoods[0] for row in rows]
    assert after[0] == before[0] and abs(after[1] - before[1]) > 0.01
    with pytest.raises(AssertionError):
        Stage(load_config(directory), build_stage(directory).weights, reference, longest + 1)


# --- checkpoints ---------------------------------------------------------------------------------


def older(tensors):
    """As the first uploads had them, with what they had besides."""
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    renamed["decoder.version"] = np.array([3.0], np.float32)
    renamed["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    return renamed


@pytest.mark.parametrize("form", ["safetensors", "pytorch"])
@pytest.mark.parametrize("name", ["opt", "opt_350m"])
def test_older_names_make_the_same_model(name, form, tmp_path):
    expected = scores(write_tiny_model(name, tmp_path / "hf"))
    directory = tmp_path / "old"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TINY_MODELS[name]))
    tensors = older(tiny_tensors(name))
    if form == "pytorch":
        write_torch(directory / "pytorch_model.bin", tensors)
    else:
        save_file(tensors, directory / "model.safetensors")
    np.testing.assert_array_equal(scores(directory), expected)
    shard(ShardOptions(directory, tmp_path / "out", 2, quiet=True))
    np.testing.assert_array_equal(scores(tmp_path / "out"), expected)
    if form == "safetensors":
        tensors["model.decoder.embed_tokens.weight"] = tensors["decoder.embed_tokens.weight"]
        save_file(tensors, directory / "model.safetensors")
        with pytest.raises(ModelError, match="embed_tokens.weight is there under an older name"):
            scores(directory)


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_and_sharded_and_sharded_again(shards, tmp_path):
    expected = scores(write_tiny_model("opt_350m", tmp_path / "hf"))
    source = write_pytorch_model("opt_350m", tmp_path / "pt", shards=shards)
    np.testing.assert_array_equal(scores(source), expected)
    shard(ShardOptions(source, tmp_path / "three", 3, quiet=True, chunk_bytes=2000))
    shard(ShardOptions(tmp_path / "three", tmp_path / "two", 2, quiet=True))
    for output in ("three", "two"):
        np.testing.assert_array_equal(scores(tmp_path / output), expected)
        assert load_config(tmp_path / output) == load_config(source)


@pytest.mark.parametrize("quantize", ["fp8", "int8"])
@pytest.mark.parametrize("name", ["opt", "opt_untied"])
def test_sharded_in_eight_bits(name, quantize, tmp_path):
    directory = write_tiny_model(name, tmp_path / "m", dtype="float16")
    config, layers = load_config(directory), range(TINY_MODELS[name]["num_hidden_layers"])
    assert choose_quantization(quantize, directory, config) == quantize
    expected = through([part(directory, layers, quantize)])
    shard(ShardOptions(directory, tmp_path / "out", 2, quantize=quantize, quiet=True))
    np.testing.assert_array_equal(through([part(tmp_path / "out", layers, quantize)]), expected)


def test_sizes_that_have_no_eight_bits(tmp_path):
    directory = write_tiny_model("opt_350m", tmp_path)
    with pytest.raises(ModelError, match="qkv_proj is 306 × 102, and fp8 needs multiples of 16"):
        choose_quantization("fp8", directory, load_config(directory))
    assert choose_quantization("int8", directory, load_config(directory)) == "int8"


WRONG_TENSORS = {
    "missing": (
        "opt",
        lambda t: t.pop(LAYER + "fc1.bias"),
        f"has no tensor {LAYER}fc1.bias",
    ),
    "no last norm": (
        "opt",
        lambda t: t.pop("model.decoder.final_layer_norm.bias"),
        "has no tensor model.decoder.final_layer_norm.bias",
    ),
    "no projection": (
        "opt_350m",
        lambda t: t.pop("model.decoder.project_out.weight"),
        "has no tensor model.decoder.project_out.weight",
    ),
    "no head": ("opt_untied", lambda t: t.pop("lm_head.weight"), "has no tensor lm_head.weight"),
    "a norm too many": (
        "opt_350m",
        lambda t: t.update({"model.decoder.final_layer_norm.weight": np.ones(102, np.float32)}),
        "model.decoder.final_layer_norm.weight is not a tensor of this model",
    ),
    "a projection too many": (
        "opt",
        lambda t: t.update({"model.decoder.project_in.weight": np.ones((128, 128), np.float32)}),
        "model.decoder.project_in.weight is not a tensor of this model",
    ),
    "positions without the offset": (
        "opt",
        lambda t: t.update({"model.decoder.embed_positions.weight": np.ones((512, 128), "f4")}),
        r"embed_positions.weight is \[512, 128\], but config.json makes it \[514, 128\]",
    ),
    "transposed": (
        "opt",
        lambda t: t.update({LAYER + "fc2.weight": np.ones((256, 128), np.float32)}),
        rf"{LAYER}fc2.weight is \[256, 128\], but config.json makes it \[128, 256\]",
    ),
    "LLaMA's": (
        "opt",
        lambda t: t.update({"model.norm.weight": np.ones(128, np.float32)}),
        "model.norm.weight is not a tensor of this model",
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors_are_named(case, tmp_path):
    name, change, message = WRONG_TENSORS[case]
    path = write_tiny_model(name, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ModelError, match=message) as error:
        scores(tmp_path)
    assert str(tmp_path) in str(error.value) and error.value.exit_code == 3


# --- sizes ---------------------------------------------------------------------------------------


def test_sizes_by_hand(tmp_path):
    config = load_config(write_tiny_model("opt_350m", tmp_path))
    # hidden 102, ffn 149, embedding 43, vocabulary 331
    shapes = {"qkv_proj": (306, 102), "out_proj": (102, 102), "fc1": (149, 102), "fc2": (102, 149)}
    assert matrix_shapes(config) == shapes
    layer = 306 * 102 + 102 * 102 + 2 * 149 * 102
    assert head_layers(config) == HEAD_SHARE * (331 * 43 + 43 * 102) / layer
    # hidden and normed, q k v, where fc1's fit later, and attention's
    token = 2 * 102 + 306 + 102
    assert activation_bytes(config, 100, "float16", 10) == 100 * token * 2 + 10 * 4 * 331
    ends = {
        field.name: field.shape for layer, field in stage_fields(config, range(3)) if layer is None
    }
    tables = {"embed_tokens": (331, 43), "embed_positions": (514, 102)}
    assert ends == tables | {"project_in": (102, 43), "project_out": (43, 102)}
    last = [field.name for layer, field in stage_fields(config, range(2, 3)) if layer is None]
    assert last == ["project_out", "embed_tokens"]


# --- the command line ----------------------------------------------------------------------------

LONG = " ".join(["The lady lifts it over her head and reads the paper."] * 8)
QUESTIONS = [
    {"query": "She pours the", "choices": ["tea.", "roof.", "snow."], "gold": 0},
    {"query": "The man on the roof", "choices": ["is removing shingles.", "jumps."], "gold": 0},
    {"query": LONG, "choices": ["A boy gets onto the mat.", "Two women."], "gold": 1},
]


def score(model, *arguments):
    data = model.parent / "q.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    fixed = ["score", "--model", model, "--data", data, "--device", "cpu", "--quiet"]
    return CliRunner().invoke(cli, list(map(str, [*fixed, *arguments])))


@pytest.mark.parametrize("name", ["opt", "opt_untied"])
def test_score_from_end_to_end(name, tmp_path):
    model = write_tiny_model(name, tmp_path / "model", dtype="float16")
    write_tokenizer(model)
    output = tmp_path / "r.json"
    result = score(model, "--samples", tmp_path / "s", "--output", output)
    assert result.exit_code == 0, result.output
    report = json.loads(output.read_text())
    raw = TINY_MODELS[name]
    fields = {key: raw[key] for key in ("ffn_dim", "word_embed_proj_dim", "hidden_size")}
    assert {"family": "opt", **fields}.items() <= report["config"]["model_config"].items()
    # a row keeps its last tokens, as many as there are positions
    truncated = report["cupyllama"]["truncated_rows"]
    assert truncated == (2 if raw["max_position_embeddings"] == 64 else 0)
    for quantize in ("none", "fp8"):
        out = tmp_path / quantize
        shard(ShardOptions(model, out, 2, quantize=quantize, quiet=True))
        same = ["--quantize", quantize] if quantize == "fp8" else []
        assert score(model, *same, "--samples", tmp_path / "a").exit_code == 0
        assert score(out, "--samples", tmp_path / "b").exit_code == 0
        assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()
        assert ((tmp_path / "a").read_text() == (tmp_path / "s").read_text()) == (not same)
    planned = score(model, "--dry-run")
    assert planned.exit_code == 0 and "rank 0: layers 0 to" in planned.stdout
    predicted = CliRunner().invoke(cli, ["bench", "pipeline", str(output)])
    assert predicted.exit_code == 0, predicted.output
