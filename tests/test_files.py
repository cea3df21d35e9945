"""Questions from files: the three forms, and what is said of broken ones."""

import bz2
import codecs
import gzip
import hashlib
import json
import lzma
import sys
import types

import pytest

from cupyllama.errors import DataError
from cupyllama.tasks.files import first_questions, load_task
from cupyllama.tasks.question import Question

RECORD = {"activity_label": "Tea", "ctx_a": "She pours.", "ctx_b": "she", "label": 1}
HELLASWAG = RECORD | {"endings": ["drinks.", "eats."], "ctx": "She pours. she"}
GENERIC = {"query": "2 + 2 =", "choices": ["4", "5", "6"], "gold": 0}
SIX_LINES = "Tea: She pours. she\n1\ndrinks.\neats.\nsings.\nsleeps.\n"


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_hellaswag_records(tmp_path):
    task = load_task(write(tmp_path / "val.jsonl", HELLASWAG), "lm-eval")
    assert task.name == "hellaswag"
    assert task.questions == [Question("Tea: She pours. She", ("drinks.", "eats."), 1)]


def test_generic_records_take_their_name_from_the_file(tmp_path):
    path = write(tmp_path / "sums.jsonl", GENERIC, GENERIC | {"gold": 2})
    task = load_task(path, "lm-eval")
    assert task.name == "sums"
    assert task.questions[1] == Question("2 + 2 =", ("4", "5", "6"), 2)
    assert load_task(path, "lm-eval", "arithmetic").name == "arithmetic"


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".bin"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress])
def test_six_lines_plain_and_compressed_whatever_the_name(tmp_path, suffix, compress):
    path = tmp_path / f"val.txt{suffix}"
    path.write_bytes(compress((SIX_LINES * 2).encode()))
    task = load_task(path, "lm-eval")
    choices = ("drinks.", "eats.", "sings.", "sleeps.")
    assert task.name == "hellaswag"
    assert task.questions == [Question("Tea: She pours. she", choices, 1)] * 2
    assert task.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [question.place for question in task.questions] == [
        f"{path}, line 2",
        f"{path}, line 8",
    ]


@pytest.mark.parametrize("content", [SIX_LINES, json.dumps(GENERIC) + "\n"])
def test_a_byte_order_mark_is_no_text(tmp_path, content):
    path = tmp_path / "val"
    path.write_bytes(content.encode())
    plain = load_task(path, "lm-eval")
    for compress in (bytes, gzip.compress):
        path.write_bytes(compress(codecs.BOM_UTF8 + content.encode()))
        assert load_task(path, "lm-eval").questions == plain.questions


def test_windows_line_ends_and_blank_lines(tmp_path):
    path = tmp_path / "val.jsonl"
    path.write_bytes(b"\r\n" + json.dumps(GENERIC).encode() + b"\r\n\r\n")
    assert len(load_task(path, "lm-eval").questions) == 1
    path.write_bytes(b"\r\n" + json.dumps(HELLASWAG).encode() + b"\r\n\r\n")
    assert load_task(path, "lm-eval").name == "hellaswag"
    six = tmp_path / "val.txt"
    six.write_bytes(SIX_LINES.replace("\n", "\r\n").encode() + b"\r\n")
    assert load_task(six, "lm-eval").questions[0].choices[3] == "sleeps."


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path):
    path = tmp_path / "val.jsonl"
    text = json.dumps(GENERIC | {"query": "a\u2028b"}, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    assert load_task(path, "lm-eval").questions[0].context == "a\u2028b"


def without(key):
    return {name: value for name, value in GENERIC.items() if name != key}


BROKEN = {
    "not json": (b'{"query": "a"\n', r"line 1: not JSON"),
    "second line": (json.dumps(GENERIC).encode() + b"\n{]\n", r"line 2: not JSON"),
    "no gold": (json.dumps(without("gold")).encode(), r"line 1: has no field 'gold'"),
    "no choices": (json.dumps(without("choices")).encode(), r"line 1: has no field 'choices'"),
    "empty list": (json.dumps(GENERIC | {"choices": []}).encode(), r"line 1: has no choices"),
    "empty choice": (
        json.dumps(GENERIC | {"choices": ["a", ""]}).encode(),
        r"line 1: choice 1 is empty",
    ),
    "gold too large": (json.dumps(GENERIC | {"gold": 3}).encode(), r"line 1: label 3 is out of"),
    "gold negative": (json.dumps(GENERIC | {"gold": -1}).encode(), r"line 1: label -1 is out of"),
    "gold a text": (json.dumps(GENERIC | {"gold": "0"}).encode(), r"line 1: gold is '0', not a"),
    "choices numbers": (json.dumps(GENERIC | {"choices": [1]}).encode(), r"line 1: choices is not"),
    "an array": (b'[{"query": 1}]', r"line 1: not a JSON object"),
    "test split": (
        json.dumps(HELLASWAG | {"label": ""}).encode(),
        r"line 1: label is '', not a number \(the test split has no labels\)",
    ),
    "no label": (
        json.dumps({k: v for k, v in HELLASWAG.items() if k != "label"}).encode(),
        r"line 1: has no field 'label'",
    ),
    "no ctx_a, though ctx": (
        json.dumps({k: v for k, v in HELLASWAG.items() if k != "ctx_a"}).encode(),
        r"line 1: has no field 'ctx_a'",
    ),
    "cleaned away": (
        json.dumps(HELLASWAG | {"endings": ["drinks.", "[header]"]}).encode(),
        r"line 1: ending 1, '\[header\]', is empty after cleaning",
    ),
    "an empty ending": (
        json.dumps(HELLASWAG | {"endings": ["", "a"]}).encode(),
        r"line 1: choice 0 is empty",
    ),
    "half a character in a choice": (
        json.dumps(GENERIC).encode() + b'\n{"query": "a", "choices": ["b", "c\\ud800"], "gold": 0}',
        r"line 2: 'c.*' has '\\ud800', which is half a character",
    ),
    "half a character in the context": (
        b'{"query": "\\udc00", "choices": ["b"], "gold": 0}',
        r"line 1: .* has '\\udc00', which is half a character",
    ),
    "nested": (json.dumps(GENERIC).encode() + b"\n" + b"[" * 100000, r"line 2: not JSON"),
    "a label of many digits": (
        json.dumps(HELLASWAG | {"label": "9" * 5000}).encode(),
        r"line 1: label is '9+\.\.\.9+', not a number",
    ),
    "a comma-separated file": (
        b"ctx,ending0,ending1,label\n" * 5,
        r"not JSON, and 5 lines, which is no multiple of 6",
    ),
    "a comma-separated file of six lines": (
        b"ctx,ending0,ending1,label\n" * 6,
        r"line 2: label is 'ctx,ending0,ending1,label', not a number",
    ),
    "bytes": (bytes(range(256)), "is no text"),
    "parquet": (b"PAR1\x15\x04", "is a Parquet file, which is not read"),
    "xz": (lzma.compress(SIX_LINES.encode()), "is xz-compressed, which is not read"),
    "zip": (b"PK\x03\x04\x14", "is a zip archive, which is not read"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04", "is zstd-compressed, which is not read"),
    "cut gzip": (gzip.compress(SIX_LINES.encode() * 100)[:-10], "not a whole gzip file"),
    "broken gzip": (
        gzip.compress(SIX_LINES.encode())[:10] + b"\xff" * 40,
        "not a whole gzip file",
    ),
    "utf-16": ("\ufeff{}".encode("utf-16-le"), "line 1: not UTF-8 at byte 0"),
    "latin-1": (
        json.dumps(GENERIC).encode() + b'\n{"query": "caf\xe9"}',
        r"line 2: not UTF-8 at byte 14",
    ),
    "six lines cut short": (SIX_LINES.encode() + b"Tea\n1\n", r"8 lines, which is no multiple"),
    "six lines, no index": (
        (SIX_LINES + SIX_LINES.replace("\n1\n", "\none\n")).encode(),
        r"line 8: label is 'one', not a number",
    ),
    "six lines, index 4": (
        SIX_LINES.replace("\n1\n", "\n4\n").encode(),
        r"line 2: label 4 is out of range for 4 choices",
    ),
    "nothing": (b" \n", r"holds no questions"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_with_the_line(case, tmp_path):
    content, message = BROKEN[case]
    path = tmp_path / "broken.data"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        load_task(path, "lm-eval")
    assert str(path) in str(error.value)
    assert error.value.exit_code == 4
    assert error.value.hint
    assert len(str(error.value)) < len(str(path)) + 200 and "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["a comma-separated file", "bytes", "nothing", "parquet"])
def test_what_is_in_no_known_form_hears_which_there_are(case, tmp_path):
    path = tmp_path / "questions.csv"
    path.write_bytes(BROKEN[case][0])
    with pytest.raises(DataError) as error:
        load_task(path, "lm-eval")
    for form in ("one JSON object a line", "query, choices, gold", "six lines", "gzip or bzip2"):
        assert form in error.value.hint


def test_hellaswag_without_ctx_a(tmp_path):
    """As lm-eval, which has no use for ctx; the FasterTransformer fork takes nothing else."""
    record = {k: v for k, v in HELLASWAG.items() if k not in ("ctx_a", "ctx_b")}
    path = write(tmp_path / "val.jsonl", record)
    with pytest.raises(DataError, match="line 1: has no field 'ctx_a'") as error:
        load_task(path, "lm-eval")
    assert "ctx alone does for --convention fastertransformer" in error.value.hint
    assert load_task(path, "fastertransformer").questions[0].context == "Tea:She pours. she"
    write(path, HELLASWAG | {"ctx": None})
    with pytest.raises(DataError, match="line 1: ctx is not a text"):
        load_task(path, "fastertransformer")


def test_missing_file_directory_and_cut_archive(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        load_task(tmp_path / "nowhere.jsonl", "lm-eval")
    with pytest.raises(DataError, match="is a directory"):
        load_task(tmp_path, "lm-eval")
    cut = tmp_path / "cut.txt.bz2"
    cut.write_bytes(bz2.compress(SIX_LINES.encode() * 100)[:-10])
    with pytest.raises(DataError, match="not a whole bzip2 file"):
        load_task(cut, "lm-eval")


def test_hugging_face_dataset(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return [HELLASWAG | {"label": "0"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    task = load_task(None, "lm-eval")
    assert asked == [(("Rowan/hellaswag",), {"split": "validation"})]
    assert task.questions == [Question("Tea: She pours. She", ("drinks.", "eats."), 0)]


def test_offline_says_what_to_do(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("Couldn't reach 'Rowan/hellaswag' on the Hub\nmore")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match="could not be loaded: ConnectionError: Couldn't") as error:
        load_task(None, "lm-eval")
    assert "--data" in error.value.hint
    with pytest.raises(DataError, match="task 'mmlu' is not known"):
        load_task(None, "lm-eval", "mmlu")


def test_limit_counts_or_is_a_fraction_rounded_up():
    questions = [Question(str(i), ("a",), 0) for i in range(10)]
    assert len(first_questions(questions, None)) == 10
    assert first_questions(questions, 3) == questions[:3]
    assert len(first_questions(questions, 0.31)) == 4
    assert len(first_questions(questions, 99)) == 10
