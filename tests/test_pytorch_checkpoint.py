"""PyTorch's files: read without torch, and without running or believing what they say."""

import json
import os
import pickle
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest
from checkpoint_makers import (
    ORDERED_DICT,
    Call,
    Global,
    Persistent,
    View,
    dumps,
    open_stage,
    rebuild,
    write_archive,
    write_pytorch_model,
    write_torch,
)
from engine import question_rows, score_rows
from tiny_models import tiny_tensors, write_tiny_model

from cupyllama.checkpoint.pytorch import file_tensors
from cupyllama.checkpoint.source import Checkpoint, StoredTensor, open_checkpoint
from cupyllama.errors import ModelError

QUESTIONS = [{"context": [1, 5, 9, 7], "endings": [[4, 8], [100, 3, 5]]}]


def read(tensors, name, dtype=np.float32):
    checkpoint = Checkpoint(tensors[name].path.parent, "pytorch", tensors)
    out = np.empty(tensors[name].shape, dtype)
    checkpoint.read_into(name, out)
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_views_and_shared_storages(dtype, tmp_path):
    storage = np.arange(120).astype(dtype)
    tensors = {
        "whole": storage,
        "inside": View(storage, 7, (3, 4), (4, 1)),
        "columns": View(storage, 2, (5, 3), (10, 1)),
        "transposed": View(storage, 1, (6, 4), (1, 9)),
        "cube": View(storage, 0, (4, 5, 6), (1, 24, 4)),
        "one_row": View(storage, 3, (1, 6), (99, 1)),
        "scalar": View(storage, 5, (), ()),
        "empty": View(storage, 0, (0, 3), (3, 1)),
    }
    write_torch(tmp_path / "x.bin", tensors)
    found = file_tensors(tmp_path / "x.bin")
    assert list(found) == list(tensors)
    values = storage.astype(np.float32)
    for name, view in tensors.items():
        if name == "whole":
            view = View(storage, 0, (120,), (1,))
        strides = tuple(4 * stride for stride in view.strides)
        expected = np.lib.stride_tricks.as_strided(values[view.offset :], view.shape, strides)
        np.testing.assert_array_equal(read(found, name), expected, err_msg=name)
    plain = {name for name, tensor in found.items() if isinstance(tensor, StoredTensor)}
    assert plain == {"whole", "inside", "one_row", "scalar", "empty"}
    checkpoint = Checkpoint(tmp_path, "pytorch", found)
    rows = np.empty((2, 4), np.float32)
    checkpoint.read_rows("transposed", 3, rows)
    np.testing.assert_array_equal(rows, read(found, "transposed")[3:5])
    assert checkpoint.locate("transposed") is None
    assert checkpoint.locate("inside").offset == checkpoint.locate("whole").offset + 7 * 2 ** (
        np.dtype(dtype).itemsize // 2
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_a_pytorch_model_scores_as_its_safetensors_form(shards, tmp_path):
    original = write_tiny_model("gqa", tmp_path / "a", dtype="float16")
    other = write_pytorch_model("gqa", tmp_path / "b", np.float16, shards)
    assert open_checkpoint(other).form == "pytorch"
    assert open_checkpoint(other).digest() == open_checkpoint(original).digest()
    rows = question_rows(QUESTIONS)
    expected = score_rows(open_stage(original), rows).loglikelihoods
    np.testing.assert_array_equal(score_rows(open_stage(other), rows).loglikelihoods, expected)


def test_parameters_and_metadata_of_a_state_dict(tmp_path):
    tensor = rebuild("0", "FloatStorage", 4, 0, (2, 2), (2, 1))
    hooks = Call(ORDERED_DICT, ())
    parameter = Call(Global("torch._utils", "_rebuild_parameter"), (tensor, True, hooks))
    data = np.arange(4, dtype=np.float32)
    # an OrderedDict, filled, then given its attribute _metadata
    state = dumps({"_metadata": Call(ORDERED_DICT, ())})[2:-1]
    pickled = dumps(Call(ORDERED_DICT, ()))[:-1] + b"(" + dumps("w")[2:-1]
    pickled += dumps(parameter)[2:-1] + b"u" + state + b"b."
    write_archive(tmp_path / "x.bin", pickled, {"0": data.tobytes()})
    np.testing.assert_array_equal(read(file_tensors(tmp_path / "x.bin"), "w"), data.reshape(2, 2))


class Runs:
    """Would leave a file behind if it were loaded by an unpickler that calls."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


RAN = []


def witness(*arguments):
    RAN.append(arguments)


class Stateful:
    def __setstate__(self, state):
        RAN.append(state)


def evil_pickles(marker):
    touch = f"open({str(marker)!r}, 'w')"
    stateful = Stateful()
    stateful.x = 1
    return {
        "os.system": (pickle.dumps(Runs(os.system, f"touch {marker}")), "system"),
        "eval": (pickle.dumps(Runs(eval, touch)), r"builtins\.eval"),
        "exec": (pickle.dumps(Runs(exec, touch), protocol=4), r"builtins\.exec"),
        "any function": (pickle.dumps({"w": Runs(witness, 1)}), "witness"),
        "any class": (pickle.dumps({"w": stateful}), "Stateful|copyreg"),
        "class of protocol 4": (pickle.dumps({"w": stateful}, protocol=4), "Stateful"),
        "instance": (b"(S'touch'\nios\nsystem\n.", "STRING is refused|os.system"),
        "object": (b"(cos\nsystem\nX\x01\x00\x00\x00xo.", "OBJ is refused"),
        "alias": (dumps(Call(Global("torch._utils", "os.system"), ("x",))), "os.system"),
        "reduced text": (dumps(Call("text", ("x",))), "asks to call a str"),
        "storage called": (dumps(Call(Global("torch", "FloatStorage"), (9,))), "FloatStorage"),
        "state of a tensor": (
            dumps(rebuild("0", "FloatStorage", 1, 0, (1,), (1,)))[:-1] + b"}b.",
            "asks to change a _View",
        ),
        "state of a name": (b"\x80\x02cos\nsystem\n}b.", "asks to change a Global"),
        "persistent": (dumps(Persistent(("module", "os", "0", "cpu", 1))), "persistent id"),
        "extension": (b"\x80\x02\x82\x01.", "EXT1 is refused"),
        "huge memo": (b"\x80\x02Nr\xff\xff\xff\x7fr\xff\xff\xff\x7e.", "not a mapping"),
        "huge bytes": (b"\x80\x05\x96" + b"\xff" * 6 + b"\0\0.", "malformed|refused"),
        "keys that take for ever to hash": (
            b"\x80\x02}N" + b"q\x00h\x00\x86" * 70 + b"Ns.",
            "has a tuple as a key",
        ),
        "no end": (b"\x80\x02N", "malformed"),
        "empty": (b"", "malformed"),
        "empty stack": (b"\x80\x02.", "malformed"),
        "not a pickle": (b"hello", "malformed|refused"),
    }


@pytest.mark.parametrize("case", evil_pickles("x"))
def test_a_pickle_runs_nothing_and_is_refused_by_name(case, tmp_path):
    marker = tmp_path / "ran"
    pickled, message = evil_pickles(marker)[case]
    write_archive(tmp_path / "x.bin", pickled, {"0": b"\0" * 4})
    with pytest.raises(ModelError, match=message) as error:
        file_tensors(tmp_path / "x.bin")
    assert "x.bin: data.pkl" in str(error.value) and len(str(error.value)) < 500
    assert not marker.exists() and not RAN


def lying(offset=0, shape=(4, 4), strides=(4, 1), elements=16, kind="FloatStorage", key="0"):
    return dumps({"w": rebuild(key, kind, elements, offset, shape, strides)})


LIES = {
    "storage shorter than said": (lying(elements=17), "17 elements of 4 bytes, but it has 64"),
    "storage longer than said": (lying(elements=15), "15 elements of 4 bytes, but it has 64"),
    "another width": (lying(kind="HalfStorage"), "16 elements of 2 bytes, but it has 64"),
    "shape beyond": (lying(shape=(5, 4)), r"shape \(5, 4\).*storage of 16 elements"),
    "offset beyond": (lying(offset=1), "offset 1 in a storage of 16"),
    "strides beyond": (lying(strides=(5, 1)), r"strides \(5, 1\)"),
    "negative offset": (lying(offset=-1), "impossible offset"),
    "negative stride": (lying(strides=(-4, 1), offset=12), "impossible offset, shape or strides"),
    "negative size": (lying(shape=(-4, -4)), "impossible offset, shape or strides"),
    "huge size": (lying(shape=(1 << 61, 1 << 61)), "storage of 16 elements"),
    "size beyond 64 bits": (lying(shape=(1 << 70, 1)), "impossible"),
    "expanded": (lying(shape=(1 << 40, 4), strides=(0, 1)), "storage of 16 elements"),
    "a size that is text": (lying(shape=("4", 4)), "impossible"),
    "too few strides": (lying(strides=(1,)), "but strides"),
    "many dimensions": (lying(shape=(1,) * 100, strides=(1,) * 100), "impossible"),
    "no such storage": (lying(key="7"), "wants data/7"),
    "outside": (lying(key="../data.pkl"), "wants data/../data.pkl"),
    "unknown type": (lying(kind="QInt8Storage"), "torch.QInt8Storage, which is not known"),
    "no tensor": (dumps({"w": 3}), "'w', which is a int and no tensor"),
    "no name": (dumps({3: 3}), "is a int and no tensor"),
    "a list": (dumps([1]), "not a mapping of names"),
}


@pytest.mark.parametrize("case", LIES)
def test_lies_about_sizes_are_refused(case, tmp_path):
    pickled, message = LIES[case]
    write_archive(tmp_path / "x.bin", pickled, {"0": b"\0" * 64})
    with pytest.raises(ModelError, match=message) as error:
        file_tensors(tmp_path / "x.bin")
    assert "x.bin" in str(error.value)


def test_zip_bombs_and_lying_directories_are_refused(tmp_path):
    path = tmp_path / "x.bin"
    bomb = {"0": b"\0" * (64 << 20)}
    write_archive(path, lying(elements=16 << 20), bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ModelError, match="x.bin: archive/data.* is compressed"):
        file_tensors(path)
    write_archive(path, lying(), {"0": b"\0" * 64})
    whole = path.read_bytes()
    record = whole.index(b"archive/data/0", whole.index(b"PK\1\2")) - 46
    for place, value, message in (
        (20, (1 << 30).to_bytes(4, "little") * 2, "beyond the end of the file"),
        (42, (8).to_bytes(4, "little"), "not where the directory says|not a file of torch"),
        (42, (0).to_bytes(4, "little"), "overlaps another entry"),
        (8, (1).to_bytes(2, "little"), "encrypted"),
    ):
        changed = bytearray(whole)
        changed[record + place : record + place + len(value)] = value
        path.write_bytes(changed)
        with pytest.raises(ModelError, match=message):
            file_tensors(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_odd_archives_are_refused(tmp_path):
    path = tmp_path / "x.bin"
    cases = {
        "has two entries": [("a/data.pkl", b"x"), ("a/data.pkl", b"y")],
        "has 0 entries data.pkl": [("a/model.pkl", b"x")],
        "has 2 entries data.pkl": [("a/data.pkl", b"x"), ("b/data.pkl", b"y")],
        "byte order big": [("a/data.pkl", b"x"), ("a/byteorder", b"big")],
    }
    for message, entries in cases.items():
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries:
                archive.writestr(name, data)
        with pytest.raises(ModelError, match=message):
            file_tensors(path)


def test_old_and_truncated_files_say_so(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + b"rest")
    with pytest.raises(ModelError, match="old format") as error:
        file_tensors(path)
    assert "torch.save" in error.value.hint
    write_torch(path, {"w": np.ones(1000, np.float32)})
    whole = path.read_bytes()
    for keep in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(ModelError, match="x.bin: truncated, or not a file of torch.save"):
            file_tensors(path)
    with pytest.raises(ModelError, match="No such file"):
        file_tensors(tmp_path / "y.bin")


@pytest.mark.parametrize("seed", range(5))
def test_random_damage_never_ends_in_another_exception(seed, tmp_path):
    path = tmp_path / "x.bin"
    write_torch(path, {"w": np.ones((5, 4), np.float32), "v": np.ones(3, np.float16)})
    whole, generator = path.read_bytes(), np.random.default_rng(seed)
    for _ in range(100):
        damaged = bytearray(whole)
        for place in generator.integers(0, len(whole), 3):
            damaged[place] = generator.integers(0, 256)
        path.write_bytes(damaged)
        try:
            tensors = file_tensors(path)
            assert all(t.nbytes <= len(whole) for t in tensors.values())
        except ModelError:
            pass


def test_indexes_that_lie_are_named(tmp_path):
    directory = write_pytorch_model("gqa", tmp_path / "m", shards=2)
    index = directory / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    first, second = sorted(set(content["weight_map"].values()))
    shutil.move(directory / second, tmp_path / "aside")
    with pytest.raises(ModelError, match=f"{second}: no such file, though {index.name} names it"):
        open_checkpoint(directory)
    shutil.copy(directory / first, directory / second)
    with pytest.raises(ModelError, match=f"{second}: has no .*though {index.name} says so"):
        open_checkpoint(directory)
    for value in ("../x.bin", 3):
        index.write_text(json.dumps({"weight_map": {"w": value}}))
        with pytest.raises(ModelError, match="not an index of PyTorch files"):
            open_checkpoint(directory)


def test_the_bytes_read_are_counted(tmp_path):
    directory = write_pytorch_model("odd", tmp_path)
    checkpoint = open_checkpoint(directory)
    for name, values in tiny_tensors("odd").items():
        out = np.empty(values.shape, np.float32)
        checkpoint.read_into(name, out)
        np.testing.assert_array_equal(out, values)
    assert checkpoint.bytes_read == sum(v.nbytes for v in tiny_tensors("odd").values())
