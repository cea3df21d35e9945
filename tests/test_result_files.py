"""Result files: links and devices stay as they are, and a broken write leaves nothing behind."""

import errno
import json
import os
import resource
import signal
import stat
import threading
from pathlib import Path

import pytest

from cupyllama import files
from cupyllama.errors import OutputError
from cupyllama.files import check_writable, is_special, write_json, write_json_lines, write_whole


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "results.json").write_text("old")
    link = tmp_path / "latest.json"
    link.symlink_to(there / "results.json")
    check_writable(link)
    write_json(link, {"a": 1})
    assert link.is_symlink() and json.loads((there / "results.json").read_text()) == {"a": 1}
    assert os.listdir(there) == ["results.json"]
    dangling = tmp_path / "next.json"
    dangling.symlink_to(there / "new.json")
    check_writable(dangling)
    write_json(dangling, {"b": 2})
    assert dangling.is_symlink() and json.loads((there / "new.json").read_text()) == {"b": 2}


def test_a_link_is_checked_where_it_leads(tmp_path):
    link = tmp_path / "results.json"
    link.symlink_to(tmp_path / "nowhere" / "results.json")
    with pytest.raises(OutputError, match="No such file or directory"):
        check_writable(link)
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    for refuse in (check_writable, lambda path: write_json(path, {})):
        with pytest.raises(OutputError, match="circle: cannot be written") as error:
            refuse(circle)
        assert error.value.hint


def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_writable(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_json_lines(pipe, [{"a": 1}, {"b": 2}])
    reader.join(10)
    assert read == ['{"a": 1}\n{"b": 2}\n']
    assert stat.S_ISFIFO(os.stat(pipe).st_mode) and os.listdir(tmp_path) == ["pipe"]


@pytest.fixture
def open_file(tmp_path):
    """A file that this process has open, as a shell's `3>> out` leaves it; its number."""
    path = tmp_path / "out"
    path.write_text("there before\n")
    number = os.open(path, os.O_WRONLY | os.O_APPEND)
    yield path, number
    os.close(number)


@pytest.mark.parametrize("form", ["/dev/fd/{}", "/proc/self/fd/{}", "/dev/../dev/fd/{}"])
def test_an_open_file_goes_on_where_it_is(form, open_file):
    path, number = open_file
    name = Path(form.format(number))
    assert is_special(name) and not is_special(path)
    before = os.stat(path).st_ino
    check_writable(name)
    write_json_lines(name, [{"a": 1}])
    os.write(number, b"between\n")
    write_json_lines(name, [{"b": "é"}])
    assert path.read_text() == 'there before\n{"a": 1}\nbetween\n{"b": "\\u00e9"}\n'
    assert os.stat(path).st_ino == before and os.listdir(path.parent) == ["out"]


def test_a_link_to_an_open_file(open_file):
    path, number = open_file
    link = path.with_name("link")
    link.symlink_to(f"/dev/fd/{number}")
    assert is_special(link)
    write_json_lines(link, [{"a": 1}])
    assert link.is_symlink() and path.read_text() == 'there before\n{"a": 1}\n'
    circle = path.with_name("circle")
    circle.symlink_to(circle)
    assert files._descriptor(circle) is None


def test_an_open_file_that_takes_nothing_is_found_before_the_run(open_file):
    path, _ = open_file
    reading = os.open(path, os.O_RDONLY)
    name = Path(f"/dev/fd/{reading}")
    with pytest.raises(OutputError, match="cannot be written: Bad file descriptor"):
        check_writable(name)
    os.close(reading)
    with pytest.raises(OutputError, match="cannot be written: Bad file descriptor"):
        check_writable(name)
    with pytest.raises(OutputError, match="cannot be written: Bad file descriptor"):
        write_json_lines(name, [{"a": 1}])
    assert path.read_text() == "there before\n"


def test_nobody_reads_what_an_open_file_leads_to(tmp_path):
    reading, writing = os.pipe()
    check_writable(Path(f"/dev/fd/{writing}"))
    os.close(reading)
    with pytest.raises(BrokenPipeError):  # which ends a command without a word
        write_json_lines(Path(f"/dev/fd/{writing}"), [{"a": 1}])
    os.close(writing)


def test_a_full_disk_is_found_before_the_run(tmp_path):
    """It has room for a file of no bytes; the limit on file sizes stands in for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        (tmp_path / "empty").touch()
        with pytest.raises(OutputError, match="r.json: cannot be written: File too large") as error:
            check_writable(tmp_path / "r.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "space left" in error.value.hint and os.listdir(tmp_path) == ["empty"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes device nodes")
def test_a_device_is_written_to(tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        open(device, "w").close()
    except OSError:
        pytest.skip("no device nodes here")
    check_writable(device)
    write_json(device, {"a": 1})
    assert stat.S_ISCHR(os.stat(device).st_mode) and os.listdir(tmp_path) == ["null"]


def test_a_special_file_that_refuses_is_found_before_the_run(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="pipe: cannot be written: Permission denied"):
        check_writable(pipe)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_interrupted_write_leaves_the_old_content_and_nothing_else(tmp_path, interruption):
    path = tmp_path / "results.json"
    path.write_text("old")

    def chunks():
        yield "new, " * 100_000  # more than a buffer: some of it is on the disk
        assert path.read_text() == "old"
        raise interruption

    with pytest.raises(interruption):
        write_whole(path, chunks())
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


def test_what_is_read_meanwhile_is_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    """Up to the renaming the old content is there, and then all of the new."""
    path = tmp_path / "results.json"
    path.write_text("old")
    seen = []
    replace = os.replace

    def watched(source, target):
        seen.append((path.read_text(), Path(source).read_text()))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", watched)
    write_json(path, {"a": 1})
    assert seen == [("old", '{\n  "a": 1\n}\n')]


def test_a_name_that_is_not_utf8_can_be_said(tmp_path):
    path = tmp_path / "results.json"
    name = os.fsdecode(b"caf\xe9.jsonl")
    write_json(path, {"data": name, "other": "é"})
    assert json.loads(path.read_bytes()) == {"data": name, "other": "é"}


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOSPC, "space left"), (errno.EACCES, "another place")]
)
def test_the_hint_fits_the_reason(tmp_path, monkeypatch, number, hint):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OutputError, match="results.json: cannot be written") as error:
        write_json(tmp_path / "results.json", {})
    assert hint in error.value.hint and os.listdir(tmp_path) == []
