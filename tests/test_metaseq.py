"""Metaseq's parts: the same numbers as Hugging Face's form, no code run, and what is refused."""

import argparse
import datetime
import enum
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from checkpoint_makers import Call, Global, dumps, open_stage, write_archive
from click.testing import CliRunner
from engine import score_rows
from safetensors.numpy import load_file, save_file
from test_evaluate import random_rows
from tiny_models import TINY_MODELS, tiny_tensors, write_tiny_model

from cupyllama.checkpoint.joined import JoinedTensor
from cupyllama.checkpoint.metaseq_parts import find_parts
from cupyllama.checkpoint.pytorch import training_state
from cupyllama.checkpoint.shard import ShardOptions, shard
from cupyllama.checkpoint.source import StoredTensor, open_checkpoint
from cupyllama.cli import cli
from cupyllama.config import load_config
from cupyllama.errors import ModelError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
tool = importlib.import_module("make_metaseq")

RECORDED = Path(__file__).parent / "data" / "metaseq"  # by torch.save, with omegaconf's own cfg
BPE = Path(__file__).parent / "data" / "opt_bpe"
PATTERN = "reshard-model_part-*.pt"
ROWS = random_rows(np.random.default_rng(5), 12)


def hugging_face(name, directory, dtype="float32"):
    return write_tiny_model(name, directory, dtype=dtype)


def metaseq(name, directory, parts=2, dtype="float32", **options):
    tensors = {key: values.astype(dtype) for key, values in tiny_tensors(name).items()}
    return tool.write_metaseq(directory, TINY_MODELS[name], tensors, parts, **options)


def scores(model, dtype=np.float32):
    return score_rows(open_stage(model, dtype), ROWS).loglikelihoods


def stage_arrays(directory):
    return {k: v for path in sorted(directory.glob("stage-*")) for k, v in load_file(path).items()}


def part(directory, number=0):
    return directory / f"reshard-model_part-{number}.pt"


# --- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_it_is_the_model_of_hugging_faces_form(parts, dtype, tmp_path):
    original = hugging_face("opt", tmp_path / "hf", dtype)
    other = metaseq("opt", tmp_path / "ms", parts, dtype)
    assert load_config(other) == load_config(original)
    assert open_checkpoint(other).form == "metaseq"
    assert open_checkpoint(other).digest() == open_checkpoint(original).digest()
    np.testing.assert_array_equal(scores(other), scores(original))
    for stages in (1, 2, 3):
        made = []
        for source in (original, other / PATTERN):
            output = tmp_path / f"{source.parent.name}-{stages}"
            shard(ShardOptions(source, output, stages, quiet=True, chunk_bytes=5000))
            made.append(stage_arrays(output))
        assert made[0].keys() == made[1].keys()
        for name, values in made[0].items():
            assert values.dtype == made[1][name].dtype
            np.testing.assert_array_equal(made[1][name], values, err_msg=name)
        np.testing.assert_array_equal(scores(output), scores(original))
        assert load_config(output) == load_config(original)


@pytest.mark.parametrize("name, parts", [("opt_350m", 1), ("opt_untied", 1), ("opt_untied", 2)])
def test_projections_norms_behind_and_heads_of_their_own(name, parts, tmp_path):
    original, other = hugging_face(name, tmp_path / "hf"), metaseq(name, tmp_path / "ms", parts)
    assert load_config(other) == load_config(original)
    assert open_checkpoint(other).digest() == open_checkpoint(original).digest()
    np.testing.assert_array_equal(scores(other), scores(original))


def test_what_torch_and_omegaconf_wrote(tmp_path):
    expected = tool.drawn_tensors(tool.DRAWN)
    checkpoint = open_checkpoint(RECORDED)
    assert set(checkpoint.tensors) == set(expected)
    for name, values in expected.items():
        out = np.empty(values.shape, values.dtype)
        checkpoint.read_into(name, out)
        np.testing.assert_array_equal(out, values, err_msg=name)
    save_file(expected, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(tool.DRAWN))
    assert load_config(RECORDED) == load_config(tmp_path)
    _, state = training_state(part(RECORDED))
    assert state["cfg"].name == "omegaconf.dictconfig.DictConfig" and "omegaconf" not in sys.modules


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("parts", [1, 2])
def test_every_range_of_rows_is_right(parts, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("cupyllama.checkpoint.joined._BLOCK_BYTES", 3000)
    checkpoint = open_checkpoint(metaseq("opt", tmp_path, parts, np.dtype(dtype).name))
    for name, values in tiny_tensors("opt").items():
        values = values.astype(dtype)
        for first, last in ((0, len(values)), (0, 1), (13, 50), (31, 97), (127, 128)):
            out = np.empty((last - first, *values.shape[1:]), dtype)
            before = checkpoint.bytes_read
            checkpoint.read_rows(name, first, out)
            np.testing.assert_array_equal(out, values[first:last], err_msg=name)
            if (first, last) == (0, len(values)):
                assert checkpoint.bytes_read - before == values.nbytes
        plain = parts == 1 or "norm" in name or "positions" in name or "out_proj.bias" in name
        kind = StoredTensor if plain or "fc2.bias" in name else JoinedTensor
        assert isinstance(checkpoint.tensors[name], kind), name
        assert sum(origin.nbytes for origin in checkpoint.tensors[name].origins) == values.nbytes


def test_matrices_that_are_stored_transposed(tmp_path):
    """A view of torch's may have any strides; k, v and q are rows of it all the same."""
    torch_like = importlib.import_module("checkpoint_makers")
    directory = metaseq("opt", tmp_path / "ms", 1)
    tensors = tool.part_tensors(tiny_tensors("opt"), 0, 1)
    model = {}
    storages = {}
    for key, (name, values) in enumerate(tensors.items()):
        storages[str(key)] = np.ascontiguousarray(values.T).tobytes()
        strides = tuple(stride // 4 for stride in np.ascontiguousarray(values.T).T.strides)
        model[name] = torch_like.rebuild(
            str(key), "FloatStorage", values.size, 0, values.shape, strides
        )
    cfg = torch_like.Pickled(tool.stand_in_container(tool.settings_of(TINY_MODELS["opt"], 1)))
    write_archive(part(directory), dumps({"model": model, "cfg": cfg}), storages)
    np.testing.assert_array_equal(scores(directory), scores(hugging_face("opt", tmp_path / "hf")))


# --- the settings --------------------------------------------------------------------------------


class Backend(enum.Enum):
    FULLY_SHARDED = "fully_sharded"


class Activation(str, enum.Enum):
    relu = "relu"
    gelu = "gelu"


def objects(heads=4):
    """A Namespace full of what training runs keep: enums, dates, paths, sets, odd keys."""
    odd = {
        "backend": Backend.FULLY_SHARDED,
        "when": datetime.datetime(2022, 5, 3, 1, 2, 3),
        "for": datetime.timedelta(seconds=5),
        "where": PurePosixPath("/a/b"),
        "set": {1, 2},
        "frozen": frozenset("ab"),
        "bytes": b"\xff\x00",
        "number": 1 << 200,
        (1, 2): "a tuple as a key",
        "type": type(None),
        "partial": argparse.Namespace(inner=[1.5, None]),
    }
    model = argparse.Namespace(decoder_attention_heads=heads, activation_fn=Activation.relu)
    return {"model": model, "odd": odd}


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_settings_of_other_objects(protocol, tmp_path):
    expected = load_config(hugging_face("opt", tmp_path / "hf"))
    in_mapping = objects()
    in_object = argparse.Namespace(**objects())
    flat = argparse.Namespace(model=None, **vars(objects()["model"]))
    for number, cfg in enumerate((in_mapping, in_object, flat)):
        directory = metaseq("opt", tmp_path / f"{number}", cfg=pickle.dumps(cfg, protocol))
        assert load_config(directory) == expected


def test_an_activation_that_is_an_enum(tmp_path):
    cfg = objects()
    cfg["model"].activation_fn = Activation.gelu
    for protocol in (2, 4):
        directory = metaseq("opt", tmp_path, cfg=pickle.dumps(cfg, protocol))
        with pytest.raises(ModelError, match="activation_fn = 'gelu'"):
            load_config(directory)


def test_a_head_is_tied_as_the_settings_say_or_else_as_the_bytes_are(tmp_path):
    head, embedding = "decoder.output_projection.weight", "decoder.embed_tokens.weight"
    tensors = tool.part_tensors(tiny_tensors("opt"), 0, 1)
    cases = {
        "one and the same": (tensors, None, True),
        "none": ({k: v for k, v in tensors.items() if k != head}, None, True),
        "a copy": (tensors | {head: tensors[embedding].copy()}, None, False),
        "a copy that is said to be tied": (tensors | {head: tensors[embedding].copy()}, True, True),
        "the same, said to be its own": (tensors, False, False),
    }
    expected = scores(hugging_face("opt", tmp_path / "hf"))
    for stored, said, tied in cases.values():
        cfg = objects()
        if said is not None:
            cfg["model"].share_decoder_input_output_embed = said
        tool.write_part(part(tmp_path), stored, {"cfg": pickle.dumps(cfg, 2)})
        assert load_config(tmp_path).tie_word_embeddings == tied
        assert ("lm_head.weight" in open_checkpoint(tmp_path).tensors) != tied
        np.testing.assert_array_equal(scores(tmp_path), expected)


def test_the_number_of_heads_from_a_config_beside(tmp_path):
    original = hugging_face("opt", tmp_path / "hf")
    unsaid = pickle.dumps({"model": {"decoder_layers": 3}}, 2)
    directory = metaseq("opt", tmp_path / "ms", cfg=unsaid)
    for said, message in (
        (unsaid, "does not say"),
        (pickle.dumps(objects("${x}"), 2), "'\\${x}' for"),
    ):
        metaseq("opt", directory, cfg=said)
        with pytest.raises(
            ModelError, match=f"part-0.pt: its cfg .*{message}.* decoder_attention_heads"
        ) as e:
            load_config(directory)
        assert "Put a config.json beside the parts" in e.value.hint
    metaseq("opt", directory, cfg=unsaid)
    shutil.copy(original / "config.json", directory)
    for model in (directory, directory / PATTERN):
        np.testing.assert_array_equal(scores(model), scores(original))
    metaseq("opt", directory, cfg=pickle.dumps(objects(2), 2))
    with pytest.raises(
        ModelError, match="config.json: has 4 num_attention_heads, but .* has 2 dec"
    ):
        open_checkpoint(directory)


CONTRADICTIONS = {
    "activation": ({"activation_fn": "gelu"}, "activation_fn = 'gelu'"),
    "scaled": ({"no_scale_embedding": False}, "no_scale_embedding = False"),
    "alibi": ({"alibi": True}, "alibi = True"),
    "layers": ({"decoder_layers": 4}, "decoder_layers = 4, but the weights make it 3"),
    "width": ({"decoder_embed_dim": 64}, "decoder_embed_dim = 64, but the weights make it 128"),
    "norm": ({"decoder_normalize_before": False}, "decoder_normalize_before = False, but"),
    "heads": ({"decoder_attention_heads": 5}, "hidden_size 128 is no multiple of 5"),
    "small heads": ({"decoder_attention_heads": 8}, "head_dim is 16"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_settings_that_are_not_those_of_the_weights(case, tmp_path):
    change, message = CONTRADICTIONS[case]
    settings = tool.settings_of(TINY_MODELS["opt"], 2)
    settings["model"].update(change)
    directory = metaseq("opt", tmp_path, cfg=tool.stand_in_container(settings))
    with pytest.raises(ModelError, match=f"part-0.pt: .*{message}"):
        load_config(directory)


# --- what a pickle must not do -------------------------------------------------------------------

RAN = []


def witness(*arguments):
    RAN.append(arguments)


class Runs:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Stateful:
    def __setstate__(self, state):
        witness(state)


@pytest.mark.parametrize(
    "function, argument, name",
    [
        (os.system, "touch {}", r"(posix|nt)\.system"),
        (eval, "open({!r}, 'w')", r"(__builtin__|builtins)\.eval"),
        (exec, "open({!r}, 'w')", r"(__builtin__|builtins)\.exec"),
        (subprocess.check_call, "touch {}", r"(subprocess|commands)\.check_call"),
        (importlib.import_module, "{}", r"importlib\.import_module"),
        (shutil.rmtree, "{}", r"shutil\.rmtree"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_what_would_run_code_is_refused_by_name(function, argument, name, protocol, tmp_path):
    marker = tmp_path / "ran"
    evil = Runs(function, argument.format(str(marker)))
    directory = metaseq("opt", tmp_path, cfg=pickle.dumps({"model": evil}, protocol))
    for read in (load_config, open_checkpoint):
        with pytest.raises(ModelError, match=f"part-0.pt: data.pkl asks to call {name}") as error:
            read(directory)
    assert "nothing in it is ever run" in error.value.hint and not marker.exists()


def test_classes_of_other_packages_are_neither_imported_nor_made(tmp_path):
    stateful = Stateful()
    stateful.x = 1
    strange = Call(
        Global("no_such_package.cfg", "Thing"),
        (1,),
        {"model": Call(Global("torch.hub", "load"), ())},
    )
    for number, extra in enumerate((Runs(witness, 1), stateful, {"a": [stateful]})):
        cfg = objects() | {"extra": extra}
        directory = metaseq("opt", tmp_path / f"{number}", cfg=pickle.dumps(cfg, 2))
        assert load_config(directory).num_attention_heads == 4
    directory = metaseq("opt", tmp_path / "strange", cfg=dumps(strange))
    with pytest.raises(ModelError, match="does not say decoder_attention_heads"):
        load_config(directory)
    assert not RAN and "no_such_package" not in sys.modules


def test_a_small_pickle_of_an_endless_text_is_shown_to_no_one(tmp_path):
    lists = [["x"] * 10]
    for _ in range(40):
        lists.append([lists[-1]] * 10)
    for name in ("decoder_attention_heads", "activation_fn"):
        model = {"decoder_attention_heads": 4} | {name: lists[-1]}
        directory = metaseq("opt", tmp_path / name, cfg=pickle.dumps({"model": model}, 2))
        try:
            load_config(directory)
        except ModelError as error:
            assert len(str(error)) < 300


def test_numbers_that_python_does_not_print(tmp_path):
    directory = metaseq("opt", tmp_path, cfg=pickle.dumps(objects(1 << 60_000), 2))
    refused(directory, "does not say decoder_attention_heads")
    tool.write_metaseq(directory, TINY_MODELS["opt"], tiny_tensors("opt"), 2, updates=1 << 60_000)
    shutil.copy(part(metaseq("opt", tmp_path / "other"), 1), part(directory, 1))
    refused(directory, "after 143,000 updates, and .* after an unsaid number")


# --- what is refused -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return metaseq("opt", tmp_path_factory.mktemp("metaseq") / "m", 4, "float16")


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy of four parts that a test may break."""
    return shutil.copytree(pristine, tmp_path / "m")


def refused(model, message):
    """By whatever opens it first, in an error that a user can act upon."""
    with pytest.raises(ModelError, match=message) as error:
        load_config(model)
        open_checkpoint(model)
    assert error.value.hint
    return error.value


def test_a_part_that_is_missing(folder):
    whole = part(folder, 2).read_bytes()
    part(folder, 2).unlink()
    for model in (folder, folder / PATTERN):
        refused(model, f"{part(folder, 2)}: no such file, though there is {part(folder, 3).name}")
    part(folder, 3).unlink()
    refused(folder, "out_proj.weight is 128 × 32, a part of 4, but there are 2 parts; .*_size 4")
    part(folder, 2).write_bytes(whole)
    refused(folder, "a part of 4, but there are 3 parts")
    refused(part(folder, 1), "a part of 4, but there is 1 part;")
    refused(folder / "reshard-model_part-[12].pt", "reshard-model_part-0.pt: no such file")


def test_parts_of_another_model_or_another_step(folder, tmp_path):
    tensors = tiny_tensors("opt")
    refused_as = {
        "other values": (dict(tensors), "fc2.bias is not what it is in reshard-model_part-0.pt"),
        "fewer layers": (
            {k: v for k, v in tensors.items() if "layers.2." not in k},
            r"part-1.pt: has no decoder.layers.2.*, though .*part-0.pt has it",
        ),
        "more layers": (
            tensors | {k.replace("s.2.", "s.3."): v for k, v in tensors.items() if "s.2." in k},
            r"part-0.pt: has no decoder.layers.3.*, though .*part-1.pt has it",
        ),
        "another width": (
            tensors
            | {k: np.zeros((64, 128), "f4") for k in tensors if k.endswith("fc1.weight")}
            | {k: np.zeros((128, 64), "f4") for k in tensors if k.endswith("fc2.weight")},
            None,
        ),
    }
    refused_as["other values"][0]["model.decoder.layers.1.fc2.bias"] = np.zeros(128, np.float32)
    for name, (others, message) in refused_as.items():
        others = {key: values.astype(np.float16) for key, values in others.items()}
        other = tool.write_metaseq(tmp_path / name, TINY_MODELS["opt"], others, 4)
        shutil.copy(part(other, 1), part(folder, 1))
        refused(folder, message or "decoder_ffn_embed_dim = 256, but the weights make it 208")
    shutil.copy(part(metaseq("opt", tmp_path / "wide", 4), 1), part(folder, 1))
    refused(folder, r"part-1.pt: .* is .* F32, which does not fit .* F16 in reshard-model_part-0")
    shutil.copy(part(metaseq("opt", tmp_path / "two", 2, "float16"), 1), part(folder, 1))
    refused(folder, r"part-1.pt: .*out_proj.weight is \[128, 64\]|weights make it")
    later = metaseq("opt", tmp_path / "later", 4, "float16", updates=143_001)
    shutil.copy(part(later, 1), part(folder, 1))
    refused(folder, "part-1.pt: was saved after 143,001 updates, and .*part-0.pt after 143,000")


def test_patterns_and_directories_that_no_parts_are_of(folder, tmp_path):
    assert find_parts(folder) == [part(folder, number) for number in range(4)]
    error = refused(folder / "consolidated-*.pt", f"no file in {folder} has a name like consol")
    assert "reshard-model_part-0.pt, " in error.hint
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "no .pt file at all" in refused(empty / PATTERN, "no file in").hint
    refused(tmp_path / "nowhere" / PATTERN, "nowhere: No such file or directory")
    with pytest.raises(ModelError, match="has no weights: .* no reshard-model_part-0.pt"):
        open_checkpoint(empty)
    shutil.copy(part(folder), folder / "checkpoint_last-model_part-0.pt")
    error = refused(folder, "has parts of several checkpoints: checkpoint_last-model_part-0.pt and")
    assert f"--model '{folder / PATTERN}'" in error.hint
    refused(folder / "*.pt", "parts of several checkpoints")
    assert load_config(folder / PATTERN).vocab_size == 320
    (folder / "checkpoint_last-model_part-0.pt").rename(folder / "notes.pt")
    refused(folder / "*.pt", "notes.pt: has no number at its end")
    assert load_config(folder).vocab_size == 320


def test_more_than_nine_parts_are_in_the_order_of_their_numbers(tmp_path):
    for number in range(11):
        part(tmp_path, number).touch()
    assert find_parts(tmp_path) == [part(tmp_path, number) for number in range(11)]


def test_a_model_in_one_file(tmp_path):
    expected = scores(hugging_face("opt", tmp_path / "hf"))
    directory = metaseq("opt", tmp_path / "ms", 1)
    part(directory).rename(directory / "reshard.pt")
    np.testing.assert_array_equal(scores(directory), expected)
    (directory / "reshard.pt").rename(directory / "mine.pt")
    np.testing.assert_array_equal(scores(directory / "mine.pt"), expected)
    with pytest.raises(ModelError, match="has no weights"):
        open_checkpoint(directory)


def test_what_fsdp_has_not_consolidated(tmp_path):
    tensors = {"flat_param_0": np.zeros(40, np.float16), "decoder.version": np.zeros(1, "f2")}
    tool.write_part(part(tmp_path), tensors, {"cfg": dumps({})})
    error = refused(tmp_path, "part-0.pt: flat_param_0 is flattened, as FSDP trains it")
    assert "reshard_fsdp.py" in error.hint
    part(tmp_path).rename(tmp_path / "checkpoint_last-model_part-0-shard0.pt")
    error = refused(tmp_path, "-shard0.pt: is a shard of a part, as FSDP saves them")
    assert "reshard_fsdp.py" in error.hint


def test_files_that_are_no_such_checkpoint(folder):
    whole = part(folder, 1).read_bytes()
    for keep in (0, 1000, len(whole) // 2, len(whole) - 1):
        part(folder, 1).write_bytes(whole[:keep])
        refused(folder, "part-1.pt: truncated, or not a file of torch.save")
    write_archive(part(folder, 1), dumps({"epoch": 3, "args": None}), {})
    refused(folder, "part-1.pt: data.pkl has no 'model', but epoch, args")
    write_archive(part(folder, 1), dumps({"model": {"x": 3}}), {})
    refused(folder, "part-1.pt: data.pkl has 'x', which is a int and no tensor")
    write_archive(part(folder, 1), dumps([]), {})
    refused(folder, "part-1.pt: data.pkl is not a mapping")
    tool.write_part(part(folder, 0), {"norm.weight": np.ones(3, np.float16)}, {})
    part(folder, 1).write_bytes(part(folder, 0).read_bytes())
    refused(folder / "reshard-model_part-[01].pt", "part-0.pt: has no matrix decoder.embed_tokens")


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_never_ends_in_another_exception(seed, tmp_path):
    whole, generator = part(RECORDED).read_bytes(), np.random.default_rng(seed)
    end = whole.index(b"data/0")  # the pickle lies before it
    shutil.copy(part(RECORDED, 1), part(tmp_path, 1))
    for _ in range(60):
        damaged = bytearray(whole)
        for place in generator.integers(0, end, 2):
            damaged[place] = generator.integers(0, 256)
        part(tmp_path).write_bytes(damaged)
        try:
            load_config(tmp_path)
            open_checkpoint(tmp_path)
        except ModelError as error:
            assert len(str(error)) < 1000


WRONG_TENSORS = {
    "unknown": ({"decoder.alibi": (4, 8)}, "decoder.alibi is not a tensor of an OPT"),
    "not k, v and q": (
        {"decoder.layers.0.self_attn.qkv_proj.weight": (97, 128)},
        r"qkv_proj.weight is \[97, 128\], not k, v and q",
    ),
    "empty": ({"decoder.layers.0.self_attn.qkv_proj.bias": (0,)}, r"is \[0\], not k, v and q"),
    "both": ({"decoder.layers.0.self_attn.q_proj.bias": (128,)}, "has both .*qkv_proj.bias and"),
    "a vector": ({"decoder.embed_tokens.weight": (320,)}, "has no matrix decoder.embed_tokens"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_wrong_tensors_are_named(case, tmp_path):
    changes, message = WRONG_TENSORS[case]
    tensors = tool.part_tensors(tiny_tensors("opt"), 0, 1)
    tensors |= {name: np.zeros(shape, np.float32) for name, shape in changes.items()}
    tool.write_part(part(tmp_path), tensors, {"cfg": pickle.dumps(objects(), 2)})
    refused(tmp_path, f"part-0.pt: .*{message}")


def test_a_layer_without_one_of_its_tensors(tmp_path):
    tensors = tool.part_tensors(tiny_tensors("opt"), 0, 1)
    del tensors["decoder.layers.1.fc1.bias"]
    tool.write_part(part(tmp_path), tensors, {"cfg": pickle.dumps(objects(), 2)})
    with pytest.raises(ModelError, match="has no tensor model.decoder.layers.1.fc1.bias"):
        shard(ShardOptions(tmp_path, tmp_path / "out", 1, quiet=True))


# --- the command line ----------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


def as_published(root, parts=2, rows=None):
    """The tokenizer beside the directory of the parts, under the names that Metaseq gives it."""
    count = len(json.loads((BPE / "vocab.json").read_text()))
    rows = rows or -(-count // 8) * 8
    config = TINY_MODELS["opt"] | {"vocab_size": rows}
    table = np.random.default_rng(1).standard_normal((rows, 128)).astype(np.float32) / 4
    tensors = tiny_tensors("opt") | {"model.decoder.embed_tokens.weight": table}
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(BPE / name, root / f"gpt2-{name}")
    record = {"query": "The cat sat on", "choices": ["the mat", "a dog"], "gold": 0}
    (root / "q.jsonl").write_text(json.dumps(record) + "\n")
    (root / "hf").mkdir()
    (root / "hf" / "config.json").write_text(json.dumps(config))
    save_file(tensors, root / "hf" / "model.safetensors")
    return tool.write_metaseq(root / "opt", config, tensors, parts)


def test_sharded_and_scored_by_the_command_line(tmp_path):
    model = as_published(tmp_path)
    score = ["score", "--data", tmp_path / "q.jsonl", "--device", "cpu", "--quiet"]
    given = ["--tokenizer", tmp_path / "gpt2-merges.txt"]
    samples = []
    answer = run("shard", "--model", model / PATTERN, "--stages", 3, "--output", tmp_path / "out")
    assert answer.exit_code == 0, answer.output
    assert "no tokenizer found" not in answer.stdout
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"gpt2-vocab.json", "gpt2-merges.txt", "config.json"} <= files
    for source, options in (
        (tmp_path / "hf", given),
        (model, given),
        (model / PATTERN, given),
        (tmp_path / "out", []),
    ):
        output = tmp_path / f"{len(samples)}.jsonl"
        answer = run(*score, "--model", source, "--samples", output, *options)
        assert answer.exit_code == 0, answer.output
        samples.append(output.read_text())
    assert set(samples) == {samples[0]} and "loglikelihoods" in samples[0]
    for name in ("gpt2-vocab.json", "gpt2-merges.txt"):
        shutil.copy(tmp_path / name, model)
    answer = run(*score, "--model", model / PATTERN, "--samples", tmp_path / "x.jsonl")
    assert answer.exit_code == 0 and (tmp_path / "x.jsonl").read_text() == samples[0]


def test_a_vocabulary_of_another_model(tmp_path):
    model = as_published(tmp_path, rows=320)
    for name in ("gpt2-vocab.json", "gpt2-merges.txt"):
        shutil.copy(tmp_path / name, model)
    for source in (model, model / PATTERN):
        answer = run("score", "--model", source, "--data", tmp_path / "q.jsonl", "--device", "cpu")
        assert answer.exit_code == 3, answer.output
        assert "tokens, but the embedding of" in answer.stderr and "320 rows" in answer.stderr


def test_half_a_tokenizer_is_none(tmp_path):
    model = metaseq("opt", tmp_path / "opt")
    shutil.copy(BPE / "vocab.json", tmp_path / "gpt2-vocab.json")
    answer = run("shard", "--model", model, "--stages", 1, "--output", tmp_path / "out")
    assert answer.exit_code == 0 and "no tokenizer found: score needs --tokenizer" in answer.stdout


def test_a_pattern_that_the_shell_has_expanded(folder, tmp_path):
    paths = [part(folder, number) for number in range(4)]
    for command in (["shard", "--stages", 2, "--output", tmp_path / "out"], ["score"]):
        answer = run(*command, "--model", *paths)
        assert answer.exit_code == 2 and "put that in quotes" in answer.stderr, answer.output
        assert paths[1].name in answer.stderr
        answer = run(*command, "--model", paths[0])
        assert answer.exit_code == 3 and "a part of 4, but there is 1 part" in answer.stderr


MEASURED = """
import pathlib, resource, sys
from cupyllama.checkpoint.shard import ShardOptions, shard
small, large, out = map(pathlib.Path, sys.argv[1:])
shard(ShardOptions(small, out / "small", 1, dtype="float32"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shard(ShardOptions(large, out / "large", 2, dtype="float32"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """No part is read whole: the peak grows by less than a tenth of what is written."""
    tensors = {key: values.astype(np.float16) for key, values in tiny_tensors("opt").items()}
    rows, inner = 160_000, 40_000
    config = TINY_MODELS["opt"] | {"vocab_size": rows, "ffn_dim": inner}
    for name, values in tensors.items():
        if "fc1" in name or "fc2.weight" in name or "embed_tokens" in name:
            shape = (
                rows if size == 320 else inner if size == 256 else 128 for size in values.shape
            )
            tensors[name] = np.zeros(tuple(shape), np.float16)
    small, large = metaseq("opt", tmp_path / "small"), tmp_path / "large"
    tool.write_metaseq(large, config, tensors, 2)
    del tensors
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", MEASURED, small, large, tmp_path / "out"]
    answer = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    written = sum(path.stat().st_size for path in (tmp_path / "out" / "large").glob("stage-*"))
    assert written > 250 << 20
    assert int(answer.stdout) * 1024 < written / 10
