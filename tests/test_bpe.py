"""GPT-2's byte-level BPE, as OPT comes with it: ids, what goes before a text, and wrong files.

The ids are Hugging Face's, recorded by tools/record_opt_tokenizer.py.
"""

import json
import random
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from awkward_texts import awkward_texts

from cupyllama.errors import ModelError
from cupyllama.tokenizer import check_vocabulary, load_tokenizer

RECORDED = Path(__file__).parent / "data" / "opt_bpe"
SIZE = 3263  # 4 special tokens, 256 bytes, 3,000 merges, 3 tokens that no merge makes
SETTINGS = "tokenizer_config.json"


def write_pair(folder, prefix="", settings=True):
    """vocab.json and merges.txt in `folder`, with OPT's settings or without."""
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(RECORDED / name, folder / f"{prefix}{name}")
    if settings:
        shutil.copyfile(RECORDED / SETTINGS, folder / SETTINGS)
    return folder / f"{prefix}vocab.json"


def write_tokenizer_json(folder, **changes):
    """The tokenizer.json that Transformers wrote of the same files, but for `changes`."""
    content = json.loads((RECORDED / "tokenizer_frame.json").read_text()) | changes
    lines = (RECORDED / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    content["model"]["vocab"] = json.loads((RECORDED / "vocab.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = [line.split(" ") for line in lines]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


def metaseqs_names(folder):
    return write_pair(folder, "gpt2-", settings=False)


@pytest.mark.parametrize("write", [write_pair, metaseqs_names, write_tokenizer_json])
def test_ids_are_those_of_hugging_faces_tokenizers(write, tmp_path):
    path = write(tmp_path)
    recorded = np.load(RECORDED / "ids.npz")
    texts = awkward_texts(len(recorded["lengths"]), int(recorded["seed"]))
    assert zlib.crc32("\0".join(texts).encode()) == recorded["texts_crc32"]
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.path, tokenizer.size) == (path, SIZE)
    assert (tokenizer.bos_token_id, tokenizer.adds_bos) == (2, True)
    ends = np.cumsum(recorded["lengths"], dtype=np.int64)[:-1]
    for text, expected, ids in zip(
        texts, np.split(recorded["ids"], ends), tokenizer.encode(texts), strict=True
    ):
        assert [tokenizer.bos_token_id, *ids] == expected.tolist(), repr(text)


def test_the_recorded_ids_are_of_many_kinds():
    recorded = np.load(RECORDED / "ids.npz")
    assert len(recorded["lengths"]) == 2000
    seen = np.unique(recorded["ids"])
    assert len(seen) > 1500 and {1, 2} <= set(seen.tolist())  # <pad> and </s> inside texts


@pytest.mark.parametrize("prefix", ["", "gpt2-"])
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_either_file_may_be_given(prefix, name, tmp_path):
    path = write_pair(tmp_path, prefix)
    tokenizer = load_tokenizer(tmp_path / "elsewhere", tmp_path / f"{prefix}{name}")
    assert tokenizer.path == path
    assert tokenizer.encode(["</s>"]) == [[2]]


def test_tokenizer_json_goes_before_the_two_files(tmp_path):
    write_pair(tmp_path)
    assert load_tokenizer(tmp_path).path == tmp_path / "vocab.json"
    assert load_tokenizer(tmp_path).path != write_tokenizer_json(tmp_path)
    assert load_tokenizer(tmp_path).path == tmp_path / "tokenizer.json"


def test_lines_of_windows_and_no_first_line(tmp_path):
    write_pair(tmp_path)
    texts = awkward_texts(50, 1)
    expected = load_tokenizer(tmp_path).encode(texts)
    merges = (tmp_path / "merges.txt").read_bytes()
    (tmp_path / "merges.txt").write_bytes(merges.replace(b"\n", b"\r\n"))
    assert load_tokenizer(tmp_path).encode(texts) == expected
    (tmp_path / "merges.txt").write_bytes(merges.split(b"\n", 1)[1])
    assert load_tokenizer(tmp_path).encode(texts) == expected


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
BOS, START = {"bos_token": "<s>"}, {"bos_token": {"content": "</s>"}}


@pytest.mark.parametrize(
    ("settings", "bos", "adds"),
    [
        (None, 2, True),
        ({}, 2, True),
        (START, 2, True),  # what transformers 5 saves: no add_bos_token
        (BOS, 2, True),
        (BOS | {"add_bos_token": True}, 0, True),
        ({"add_bos_token": True}, 2, True),
        ({"add_bos_token": False}, 2, False),
        (START | {"add_bos_token": False}, 2, False),
    ],
)
@pytest.mark.parametrize("config", [None, {"model_type": "opt", "bos_token_id": 2}])
@pytest.mark.parametrize("kind", ["pair", "tokenizer.json"])
def test_what_goes_before_a_text_of_opt(kind, config, settings, bos, adds, tmp_path):
    if kind == "pair":
        write_pair(tmp_path, settings=False)
    else:  # saved by HF tokenizers, not Transformers: nothing is put in front
        write_tokenizer_json(tmp_path, post_processor=BYTE_LEVEL)
    for name, content in (("config.json", config), (SETTINGS, settings)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.adds_bos) == (bos, adds)


def test_another_familys_vocabulary_of_the_same_first_tokens(tmp_path):
    """The model's config.json decides, wherever the tokenizer lies."""
    files, model = tmp_path / "files", tmp_path / "model"
    files.mkdir()
    model.mkdir()
    write_tokenizer_json(files, post_processor=BYTE_LEVEL)
    (model / "config.json").write_text('{"model_type": "llama"}')
    assert load_tokenizer(files).adds_bos
    tokenizer = load_tokenizer(model, files)
    assert (tokenizer.bos_token_id, tokenizer.adds_bos) == (None, False)


def test_the_settings_name_the_tokens_that_a_text_is_searched_for(tmp_path):
    write_pair(tmp_path, settings=False)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(["</s><pad>"]) == [[2, 1]] and len(tokenizer.encode(["<s>"])[0]) > 1
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<s>"}}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(["</s><s>"]) == [[2, 0]] and len(tokenizer.encode(["<pad>"])[0]) > 1


def test_a_space_before_a_text(tmp_path):
    write_pair(tmp_path, settings=False)
    expected = load_tokenizer(tmp_path).encode([" the man"])
    (tmp_path / SETTINGS).write_text('{"add_prefix_space": true}')
    assert load_tokenizer(tmp_path).encode(["the man"]) == expected
    (tmp_path / SETTINGS).write_text('{"add_prefix_space": 1}')
    with pytest.raises(ModelError, match=f"{SETTINGS}: add_prefix_space is 1"):
        load_tokenizer(tmp_path)


def test_rows_padded_as_metaseq_pads_them(tmp_path):
    write_pair(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for rows in (SIZE, 3264):
        check_vocabulary(tokenizer, rows, tmp_path)
    for rows in (3256, SIZE - 1, 3265, 3272):
        with pytest.raises(ModelError, match=f"has {SIZE} tokens, but .* has {rows} rows"):
            check_vocabulary(tokenizer, rows, tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"[PAD]": 3264}')
    check_vocabulary(load_tokenizer(tmp_path), 3272, tmp_path)  # no multiple of 16


def test_merges_cut_anywhere_are_refused(tmp_path):
    write_pair(tmp_path)
    merges = (tmp_path / "merges.txt").read_bytes()
    lines = [place for place, byte in enumerate(merges) if byte == ord("\n")]
    places = random.Random(3).sample(range(len(merges) - 1), 60)
    for place in [0, lines[0], len(merges) - 2, *places, *lines[-40:-1]]:
        (tmp_path / "merges.txt").write_bytes(merges[:place])
        with pytest.raises(ModelError, match=r"merges\.txt(: |, line )") as error:
            load_tokenizer(tmp_path)
        assert "Is the download complete?" in error.value.hint
    (tmp_path / "merges.txt").write_bytes(merges[:-1])  # the last line's end is no loss
    assert load_tokenizer(tmp_path).size == SIZE


def test_the_token_that_no_merge_makes_is_named(tmp_path):
    write_pair(tmp_path)
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    lost = lines.pop(-2).replace(" ", "")
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    message = f"2,999 merges, and none makes 1 of the 3,263 tokens of vocab.json, '{lost}'"
    with pytest.raises(ModelError, match=message) as error:
        load_tokenizer(tmp_path)
    way_out = error.value.hint.partition("added_tokens.json beside it: ")[2].rstrip(".")
    assert json.loads(way_out).keys() == {lost}
    (tmp_path / "added_tokens.json").write_text(way_out)
    assert load_tokenizer(tmp_path).size == SIZE


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "is no pair of tokens: ''"),
        ("th", "is no pair of tokens: 'th'"),
        ("t ", "is no pair of tokens: 't '"),
        (" h", "is no pair of tokens: ' h'"),
        ("t h e", "is no pair of tokens: 't h e'"),
        ("t  h", "is no pair of tokens: 't  h'"),
        ("x" * 500, f"is no pair of tokens: '{'x' * 60}'$"),
        ("~ Q", "merges '~' and 'Q', and the vocabulary has no '~Q'"),
        ("~Q q", "merges '~Q' and 'q', and the vocabulary has no '~Q'"),
        ("q ~Q", "merges 'q' and '~Q', and the vocabulary has no '~Q'"),
    ],
)
def test_wrong_lines_of_the_merges_are_named(line, message, tmp_path):
    write_pair(tmp_path)
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    lines.insert(6, line)
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ModelError, match=f"merges.txt, line 7: {message}") as error:
        load_tokenizer(tmp_path)
    assert error.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: list(ids), "not a JSON object"),
        (lambda ids: ids | {"the": "5"}, "the id of 'the' is '5'"),
        (lambda ids: ids | {"the": True}, "the id of 'the' is True"),
        (lambda ids: ids | {"the": 5.0}, "the id of 'the' is 5.0"),
        (lambda ids: ids | {"the": None}, "the id of 'the' is None"),
        (lambda ids: ids | {"the": -1}, "the id of 'the' is -1"),
        (lambda ids: ids | {"the": 7}, "'.*' and 'the' have one id, 7"),
        (lambda ids: ids | {"the": 10**30}, r"has no token of id \d+, and ids up to 10{30}"),
        (lambda ids: ids | {"<new>": SIZE + 1}, f"has no token of id {SIZE}, and"),
        (lambda ids: numbered(token for token in ids if token != "Ċ"), "has no token 'Ċ', which"),
        (lambda ids: {}, "has no token .*, which stands for a byte"),
    ],
)
def test_wrong_vocabularies_are_named(change, message, tmp_path):
    path = write_pair(tmp_path)
    ids = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(ids)))
    with pytest.raises(ModelError, match=f"vocab.json: {message}") as error:
        load_tokenizer(tmp_path)
    assert error.value.hint


def numbered(tokens):
    return {token: token_id for token_id, token in enumerate(tokens)}


def test_a_vocabulary_of_another_model_is_refused(tmp_path):
    path = write_pair(tmp_path)
    ids = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(ids | {"Ġelsewhere": SIZE}))
    with pytest.raises(ModelError, match="none makes 1 of the 3,264 tokens .* 'Ġelsewhere'"):
        load_tokenizer(tmp_path)
    path.write_text(json.dumps(numbered(token for token in ids if token != "Ġthe")))
    with pytest.raises(ModelError, match=r"merges.txt, line \d+: .* has no 'Ġthe'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("prefix", ["", "gpt2-"])
@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")])
def test_one_of_the_two_files_is_missing(names, prefix, tmp_path):
    write_pair(tmp_path, prefix)
    here, gone = (f"{prefix}{name}" for name in names)
    (tmp_path / gone).unlink()
    for path in (None, tmp_path / here, tmp_path / gone):
        with pytest.raises(ModelError, match=f"{gone}: is not there, and {here} is of no") as error:
            load_tokenizer(tmp_path, path)
        assert error.value.hint
    (tmp_path / here).unlink()
    with pytest.raises(ModelError, match=f"{prefix}vocab.json: No such file"):
        load_tokenizer(tmp_path, tmp_path / here)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_files_that_are_something_else(name, tmp_path):
    write_pair(tmp_path)
    for content, message in [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a git-lfs pointer"),
        ((tmp_path / name).read_bytes()[:5000], "not valid JSON|, line |has|not UTF-8"),
        (b"\xff\xfe\x00", "not valid JSON|not UTF-8"),
        (b"", "not valid JSON|line 1: is no pair"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=f"{name}.*({message})") as error:
            load_tokenizer(tmp_path)
        assert error.value.hint


def test_another_class_of_tokenizer_is_refused(tmp_path):
    """Qwen2Tokenizer has files of the same names, and cuts words by another pattern."""
    write_pair(tmp_path)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    for name in ("GPT2Tokenizer", "GPT2TokenizerFast", None):
        (tmp_path / SETTINGS).write_text(json.dumps(settings | {"tokenizer_class": name}))
        assert load_tokenizer(tmp_path).size == SIZE
    (tmp_path / SETTINGS).write_text(json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.raises(ModelError, match="tokenizer_class is 'Qwen2Tokenizer'") as error:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in error.value.hint


def test_without_the_package_tokenizers(tmp_path, monkeypatch):
    write_pair(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModelError, match="vocab.json: the package tokenizers is needed") as error:
        load_tokenizer(tmp_path)
    assert error.value.hint == "pip install 'cupyllama[tokenizers]'"
