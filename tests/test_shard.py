"""Sharding: the same bits in another layout, whole or not at all."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from itertools import combinations
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from checkpoint_makers import open_stage, write_meta_model, write_pytorch_model
from click.testing import CliRunner
from engine import question_rows, score_rows
from safetensors.numpy import load_file, save_file
from tiny_models import TINY_MODELS, tiny_tensors, write_tiny_model
from tiny_tokenizer import write_tokenizer

from cupyllama.checkpoint import shard as sharding
from cupyllama.checkpoint.fields import stage_bytes, stage_fields
from cupyllama.checkpoint.shard import ShardOptions, shard
from cupyllama.checkpoint.sharded import array_name
from cupyllama.checkpoint.source import open_checkpoint
from cupyllama.checkpoint.stages import head_layers, split_layers
from cupyllama.cli import cli
from cupyllama.config import load_config
from cupyllama.errors import ModelError, OutputError, UsageError
from cupyllama.loading import load_stage
from cupyllama.ops import reference

ROWS = question_rows(
    [
        {"context": [1, 5, 9, 7, 30, 31], "endings": [[4, 8], [100, 3, 5], [9]]},
        {"context": [1, 5, 9, 8], "endings": [[200, 8], [100, 3, 5]]},
    ]
)


def run(model, output, stages, **options):
    return shard(ShardOptions(model, output, stages, quiet=True, **options))


def scores(directory, dtype=np.float32):
    return score_rows(open_stage(directory, dtype), ROWS).loglikelihoods


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --- the split -----------------------------------------------------------------------------------


def config_of(layers, vocab, hidden=64, parameters=10_000):
    return SimpleNamespace(
        num_hidden_layers=layers, head_parameters=vocab * hidden, layer_parameters=parameters
    )


def slowest_of(counts, head):
    return max([*counts[:-1], counts[-1] + head])


@pytest.mark.parametrize("vocab", [1, 100, 300, 1000, 4000])
def test_no_split_has_a_faster_slowest_stage(vocab):
    for layers in range(1, 9):
        for stages in range(1, layers + 1):
            config = config_of(layers, vocab)
            spans = split_layers(config, stages)
            assert [layer for span in spans for layer in span] == list(range(layers))
            found = [len(span) for span in spans]
            assert min(found) >= 1
            borders = combinations(range(1, layers), stages - 1)
            edges = ([0, *border, layers] for border in borders)
            slowest = [slowest_of(np.diff(edge).tolist(), head_layers(config)) for edge in edges]
            assert slowest_of(found, head_layers(config)) == min(slowest)


def test_llama_30b_on_four():
    config = SimpleNamespace(
        num_hidden_layers=60,
        head_parameters=32000 * 6656,
        layer_parameters=4 * 6656**2 + 3 * 6656 * 17920,
    )
    assert list(map(len, split_layers(config, 4))) == [15, 15, 15, 15]
    assert list(map(len, split_layers(config, 7))) == [9, 9, 9, 9, 8, 8, 8]
    assert list(map(len, split_layers(config, 4, [16, 16, 16, 12]))) == [16, 16, 16, 12]


@pytest.mark.parametrize(
    "stages, counts, message",
    [
        (0, None, "0 stages"),
        (9, None, "9 stages cannot share the model's 8 layers"),
        (2, [4, 5], "4,5 does not share 8 layers among 2 stages"),
        (2, [8], "does not share"),
        (2, [8, 0], "does not share"),
    ],
)
def test_splits_that_cannot_be(stages, counts, message):
    with pytest.raises(UsageError, match=message):
        split_layers(config_of(8, 100), stages, counts)


# --- the same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["llama1", "gqa", "tied", "attention_bias", "odd", "opt", "opt_350m", "opt_untied"],
)
def test_every_split_scores_as_the_original(name, tmp_path):
    original = write_tiny_model(name, tmp_path / "m", shards=2)
    expected, config = scores(original), load_config(original)
    for stages in range(1, config.num_hidden_layers + 1):
        output = tmp_path / f"{stages}"
        run(original, output, stages, chunk_bytes=5000)
        checkpoint = open_checkpoint(output)
        assert checkpoint.form == "sharded"
        assert checkpoint.digest() == open_checkpoint(original).digest()
        assert load_config(output) == config
        np.testing.assert_array_equal(scores(output), expected)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_conversion_is_that_of_loading(stored, wanted, tmp_path):
    original = write_tiny_model("gqa", tmp_path / "m", dtype=stored)
    output = tmp_path / "out"
    run(original, output, 2, dtype=wanted, chunk_bytes=3000)
    dtype = np.dtype(ml_dtypes.bfloat16 if wanted == "bfloat16" else wanted)
    assert load_config(output).dtype == wanted
    assert {tensor.dtype for tensor in open_checkpoint(output).tensors.values()} == {
        {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[wanted]
    }
    np.testing.assert_array_equal(scores(output, dtype), scores(original, dtype))


def test_auto_loses_nothing_where_dtypes_differ(tmp_path):
    original = write_tiny_model("gqa", tmp_path / "m", dtype="float16")
    tensors = load_file(original / "model.safetensors")
    for name in list(tensors):
        if "norm" in name or "k_proj" in name:
            tensors[name] = tiny_tensors("gqa")[name]
    save_file(tensors, original / "model.safetensors")
    run(original, tmp_path / "out", 2)
    stored = {n: tensor.dtype for n, tensor in open_checkpoint(tmp_path / "out").tensors.items()}
    assert stored["model.norm.weight"] == stored["model.layers.0.self_attn.q_proj.weight"] == "F32"
    assert stored["model.layers.0.mlp.up_proj.weight"] == "F16"
    np.testing.assert_array_equal(scores(tmp_path / "out"), scores(original))


def meta_model(directory, parts=2):
    config = {"num_key_value_heads": 4} | TINY_MODELS["llama1"]
    return write_meta_model(
        config, tiny_tensors("llama1"), directory, parts, ffn_dim_multiplier=0.75
    )


def test_pytorch_and_meta_and_sharded_sources(tmp_path):
    expected = scores(write_tiny_model("llama1", tmp_path / "hf"))
    (tmp_path / "LLaMA").mkdir()
    sources = {
        "pytorch": write_pytorch_model("llama1", tmp_path / "pt", shards=2),
        "meta": meta_model(tmp_path / "LLaMA" / "7B"),
    }
    write_tokenizer(tmp_path / "LLaMA")
    for form, source in sources.items():
        run(source, tmp_path / form, 3, chunk_bytes=2000)
        assert json.loads((tmp_path / form / "manifest.json").read_text())["source"]["form"] == form
        np.testing.assert_array_equal(scores(tmp_path / form), expected)
        run(tmp_path / form, tmp_path / f"{form}-again", 2)
        np.testing.assert_array_equal(scores(tmp_path / f"{form}-again"), expected)
        assert load_config(tmp_path / form) == load_config(source)
    assert (tmp_path / "meta" / "tokenizer.model").is_file()
    assert (tmp_path / "meta-again" / "tokenizer.model").is_file()


def test_any_stage_reads_its_own_bytes_and_no_others(tmp_path):
    original = write_tiny_model("llama1", tmp_path / "m")
    run(original, tmp_path / "out", 2)
    config = load_config(original)
    for first, last in [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]:
        checkpoint, span = open_checkpoint(tmp_path / "out"), range(first, last)
        load_stage(checkpoint, config, span, np.dtype(np.float32), reference)
        assert checkpoint.bytes_read == stage_bytes(config, span, np.float32)


# --- the files -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shard")
    write_tokenizer(write_tiny_model("llama1", folder / "model"))
    (folder / "model" / "tokenizer_config.json").write_text("{}")
    run(folder / "model", folder / "out", 2)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy of a model and of what it was sharded to, that a test may break."""
    return shutil.copytree(pristine, tmp_path / "work")


def test_the_layout_and_the_manifest(pristine):
    output, model = pristine / "out", pristine / "model"
    manifest = json.loads((output / "manifest.json").read_text())
    config = load_config(output)
    small = ["config.json", "tokenizer.model", "tokenizer_config.json"]
    stages = [f"stage-0{stage}-of-02.safetensors" for stage in range(2)]
    assert names_in(output) == sorted([*small, *stages, "manifest.json"])
    assert sorted(manifest["files"]) == small
    assert names_in(pristine) == ["model", "out"]
    assert manifest["source"]["name"] == "model"
    assert manifest["source"]["digest"] == open_checkpoint(model).digest()
    source = (model / "model.safetensors").read_bytes()
    entries = {entry["file"]: entry for entry in manifest["stages"]} | manifest["files"]
    for name, entry in entries.items():
        content = (output / name).read_bytes()
        assert entry["bytes"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    for entry in manifest["stages"]:
        content = (output / entry["file"]).read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        assert begin % 4096 == 0
        fields = list(stage_fields(config, range(*entry["layers"])))
        names = [array_name(layer, field.name) for layer, field in fields]
        assert list(json.loads(content[8:begin])) == ["__metadata__", *names]
        arrays = load_file(output / entry["file"])
        assert {name: arrays[name].shape for name in names} == {
            name: field.shape for name, (_, field) in zip(names, fields, strict=True)
        }
        for name, pieces in entry["pieces"].items():
            made_of = b"".join(source[offset : offset + size] for _, _, offset, size in pieces)
            assert {file for _, file, _, _ in pieces} == {"model.safetensors"}
            assert arrays[name].tobytes() == made_of


def test_broken_stage_files_are_named(folder):
    output = folder / "out"
    first, second = (output / f"stage-0{stage}-of-02.safetensors" for stage in range(2))
    whole = second.read_bytes()
    second.unlink()
    with pytest.raises(ModelError, match=f"{second}: No such file") as error:
        open_checkpoint(output)
    assert error.value.exit_code == 3 and error.value.hint
    for broken, message in (
        (whole[:-1], "has .* bytes, but manifest.json says"),
        (b"", "has 0 bytes"),
    ):
        second.write_bytes(broken)
        with pytest.raises(ModelError, match=f"{second}: {message}"):
            open_checkpoint(output)
    second.write_bytes(b"\xff" + whole[1:])
    with pytest.raises(ModelError, match=f"{second}: truncated or corrupt"):
        open_checkpoint(output)
    other = write_tiny_model("llama1", folder / "other", dtype="float32")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors")
    run(other, folder / "other-out", 2)
    stranger = folder / "other-out" / second.name
    assert stranger.stat().st_size == len(whole)
    shutil.copy(stranger, second)
    with pytest.raises(ModelError, match=f"{second}: belongs to another model"):
        open_checkpoint(output)


def test_stage_files_that_changed_places_are_named(folder):
    run(folder / "model", folder / "three", 3)
    first, second = (folder / "three" / f"stage-0{stage}-of-03.safetensors" for stage in (0, 1))
    manifest = json.loads((folder / "three" / "manifest.json").read_text())
    manifest["stages"][0]["bytes"] = second.stat().st_size
    (folder / "three" / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(second, first)
    with pytest.raises(ModelError, match=f"{first}: belongs to another"):
        open_checkpoint(folder / "three")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(version=2), "is of version 2"),
        (lambda m: m.pop("stages"), "not a manifest"),
        (lambda m: m["stages"].pop(), "not a manifest"),
        (lambda m: m["stages"][1].update(layers=[0, 3]), "not a manifest"),
        (lambda m: m["stages"][0].update(file="../model/model.safetensors"), "not a manifest"),
        (lambda m: m["stages"][0].update(bytes="many"), "not a manifest"),
        (lambda m: m.update(id=3), "not a manifest"),
    ],
)
def test_broken_manifests_are_named(change, message, folder):
    path = folder / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=f"{path}: {message}"):
        open_checkpoint(folder / "out")


def test_a_config_of_another_model_is_refused(folder):
    for name in ("gqa", "odd"):
        (folder / "out" / "config.json").write_text(json.dumps(TINY_MODELS[name]))
        with pytest.raises(ModelError, match="config.json"):
            open_checkpoint(folder / "out")
    (folder / "out" / "manifest.json").write_text("{")
    with pytest.raises(ModelError, match="manifest.json: not a manifest"):
        open_checkpoint(folder / "out")


# --- whole or not at all -------------------------------------------------------------------------


def test_what_is_there_is_not_overwritten(folder):
    model, output = folder / "model", folder / "out"
    before = {path: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(UsageError, match=f"{output}: exists") as error:
        run(model, output, 3)
    assert "--force" in error.value.hint
    with pytest.raises(UsageError, match="is the model itself"):
        run(model, model, 2, force=True)
    mine = folder / "mine"
    mine.mkdir()
    (mine / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="is no sharded checkpoint"):
        run(model, mine, 2, force=True)
    with pytest.raises(OutputError, match="no does not exist"):
        run(model, folder / "no" / "out", 2)
    (folder / "new.partial").mkdir()
    (folder / "new.partial" / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match="new.partial: exists and was not written by shard"):
        run(model, folder / "new", 2, force=True)
    assert before == {path: path.read_bytes() for path in output.iterdir()}
    assert names_in(folder) == ["mine", "model", "new.partial", "out"]


def test_force_replaces_once_the_new_one_is_whole(folder, monkeypatch):
    model, output = folder / "model", folder / "out"
    before = {path: path.read_bytes() for path in output.iterdir()}

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "write_small", fail)
        with pytest.raises(KeyboardInterrupt):
            run(model, output, 3, force=True)
    assert before == {path: path.read_bytes() for path in output.iterdir()}
    done = run(model, output, 3, force=True)
    assert done.files_kept == 3
    assert len(list(output.glob("stage-*"))) == 3 and names_in(folder) == ["model", "out"]
    np.testing.assert_array_equal(scores(output), scores(model))


def interrupt(folder, monkeypatch, after=1):
    """Have the run fail in the stage file behind `after` finished ones."""
    written = sharding.write_stage

    def write(path, checkpoint, arrays, metadata, on_bytes, chunk_bytes):
        def on_some(count):
            if path.name.startswith(f"stage-0{after}"):
                raise RuntimeError("interrupted")

        return written(path, checkpoint, arrays, metadata, on_some, chunk_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(sharding, "write_stage", write)
        with pytest.raises(RuntimeError, match="interrupted"):
            run(folder / "model", folder / "new", 3, chunk_bytes=1000)


def test_an_interrupted_run_leaves_nothing_that_looks_whole_and_is_taken_up(folder, monkeypatch):
    interrupt(folder, monkeypatch)
    partial = folder / "new.partial"
    assert not (folder / "new").exists()
    with pytest.raises(ModelError):
        open_checkpoint(partial)
    first = partial / "stage-00-of-03.safetensors"
    kept = first.stat().st_ino
    done = run(folder / "model", folder / "new", 3)
    assert done.files_kept == 1 and "1 files kept" in done.as_text()
    assert (folder / "new" / first.name).stat().st_ino == kept
    assert names_in(folder) == ["model", "new", "out"]
    run(folder / "model", folder / "unbroken", 3)
    for path in (folder / "unbroken").iterdir():
        assert (folder / "new" / path.name).read_bytes() == path.read_bytes()
    np.testing.assert_array_equal(scores(folder / "new"), scores(folder / "model"))


def test_a_finished_file_that_was_damaged_is_written_again(folder, monkeypatch):
    interrupt(folder, monkeypatch)
    first = folder / "new.partial" / "stage-00-of-03.safetensors"
    first.write_bytes(first.read_bytes()[:-1])
    assert run(folder / "model", folder / "new", 3).files_kept == 0
    np.testing.assert_array_equal(scores(folder / "new"), scores(folder / "model"))


def test_other_settings_do_not_take_up_a_run(folder, monkeypatch):
    interrupt(folder, monkeypatch)
    for options, differing in (
        ({"stages": 2}, "layers"),
        ({"dtype": "float16"}, "dtype, config_sha256"),
        ({"model": folder / "out"}, "source"),
    ):
        options = {"model": folder / "model", "stages": 3} | options
        with pytest.raises(UsageError, match=f"interrupted run that differs in {differing}"):
            run(options.pop("model"), folder / "new", **options)
    assert run(folder / "model", folder / "new", 2, force=True).files_kept == 0
    np.testing.assert_array_equal(scores(folder / "new"), scores(folder / "model"))


def command(folder, *arguments, stages=3):
    fixed = ["--model", folder / "model", "--output", folder / "new", "--stages", stages]
    return list(map(str, ["shard", *fixed, "--quiet", *arguments]))


KILLED = """
import sys
from cupyllama.checkpoint import shard
from cupyllama.cli import cli
written = shard.write_stage
def write(path, *rest):
    if path.name.startswith("stage-01"):
        rest = (*rest[:3], lambda count: (print("half-way", flush=True), sys.stdin.read()), 1000)
    return written(path, *rest)
shard.write_stage = write
cli()
"""


def test_a_killed_run_is_taken_up(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *command(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"half-way\n"
    busy = CliRunner().invoke(cli, command(folder))
    assert busy.exit_code == 2 and "another process is writing it" in busy.stderr
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "new").exists()
    assert (folder / "new.partial" / "stage-01-of-03.safetensors.writing").exists()
    again = CliRunner().invoke(cli, command(folder))
    assert again.exit_code == 0, again.output
    assert "1 files kept from an earlier run" in again.stdout
    assert "stage-01-of-03.safetensors.writing" not in names_in(folder / "new")
    np.testing.assert_array_equal(scores(folder / "new"), scores(folder / "model"))


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
runpy.run_module("cupyllama", run_name="__main__")
"""


def test_a_full_disk(folder):
    """A small file system of its own needs root, so the limit on file sizes stands in for it."""
    answer = subprocess.run(
        [sys.executable, "-c", LIMITED, *command(folder)], capture_output=True, text=True
    )
    assert answer.returncode == 1, answer.stderr
    assert "stage-00-of-03.safetensors: cannot be written: File too large" in answer.stderr
    assert "Traceback" not in answer.stderr and not (folder / "new").exists()
    assert CliRunner().invoke(cli, command(folder)).exit_code == 0


def test_free_space_is_looked_at_first(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    need = sum(path.stat().st_size for path in (folder / "out").glob("stage-*")) / 1e9
    with pytest.raises(OutputError, match=f"needs {need:.2f} GB, and .* has 0.00 GB free"):
        run(folder / "model", folder / "new", 3)
    assert not list((folder / "new.partial").glob("stage-*"))


def test_the_command_line(folder):
    invoke = CliRunner().invoke
    answer = invoke(cli, command(folder, "--layers-per-stage", "2,1", stages=2))
    assert answer.exit_code == 0, answer.output
    assert f"{folder / 'new'}: 2 stage files" in answer.stdout and "GB/s" in answer.stdout
    stages = json.loads((folder / "new" / "manifest.json").read_text())["stages"]
    assert [stage["layers"] for stage in stages] == [[0, 2], [2, 3]]
    for arguments, part in (
        (["--tensor-parallel", "3"], "3 ranks cannot share 4 attention heads evenly"),
        (["--layers-per-stage", "2,2,2"], "does not share 3 layers among 3 stages"),
        (["--layers-per-stage", "2,x"], "is no list of positive numbers"),
        (["--dtype", "int8"], "int8"),
        (["--force", "--stages", "4"], "4 stages cannot share"),
    ):
        answer = invoke(cli, command(folder, *arguments))
        assert answer.exit_code == 2 and part in answer.stderr, answer.output
    answer = invoke(cli, command(folder, "--model", folder / "nowhere"))
    assert answer.exit_code == 3 and "nowhere: no such directory" in answer.stderr


MEASURED = """
import pathlib, resource, sys
from cupyllama.checkpoint.shard import ShardOptions, shard
small, large, out = map(pathlib.Path, sys.argv[1:])
shard(ShardOptions(small, out / "small", 1, dtype="float32"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shard(ShardOptions(large, out / "large", 2, dtype="float32"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("form", ["safetensors", "meta"])
def test_memory_does_not_grow_with_the_model(form, tmp_path):
    """Ten times the bytes, one tensor of them half: the peak grows by less than a tenth of it."""
    tensors = tiny_tensors("llama1")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.zeros((160_000, 128), np.float16)
    config = {"num_key_value_heads": 4} | TINY_MODELS["llama1"]
    small = write_tiny_model("llama1", tmp_path / "small")
    large = tmp_path / "large"
    if form == "meta":
        small = meta_model(tmp_path / "small-meta")
        write_meta_model(config, tensors, large, 2, ffn_dim_multiplier=0.75)
    else:
        large.mkdir()
        (large / "config.json").write_text(json.dumps(config | {"vocab_size": 160_000}))
        save_file(tensors, large / "model.safetensors")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", MEASURED, small, large, tmp_path / "out"]
    answer = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    written = sum(path.stat().st_size for path in (tmp_path / "out" / "large").glob("stage-*"))
    assert written > 150 << 20
    assert int(answer.stdout) * 1024 < written / 10
