"""The entries of a zip file as torch.save writes it: where the bytes of each lie in the file."""

import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cupyllama.checkpoint.source import INCOMPLETE
from cupyllama.errors import ModelError

# How torch.save began a file before version 1.6: a pickle of this number.
_OLD_FORMAT = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_ENCRYPTED = 1


@dataclass(frozen=True)
class Entry:
    """Stored bytes inside the file."""

    offset: int
    nbytes: int


def torch_entries(path: Path) -> dict[str, Entry]:
    """Where every entry lies, by its name below the archive's one folder: data.pkl, data/0, …

    Raises:
        ModelError: the file is unreadable, truncated, not a zip, or not one that torch writes.
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(_OLD_FORMAT)) == _OLD_FORMAT:
                raise ModelError(
                    f"{path}: saved in PyTorch's old format, from before version 1.6",
                    "Where torch is installed: torch.save(torch.load(file, weights_only=True), "
                    "file) brings it up to date.",
                )
            with zipfile.ZipFile(file) as archive:
                listed = archive.infolist()
            size = file.seek(0, 2)
            entries = {}
            for info in listed:
                if info.filename in entries:
                    raise _broken(path, f"has two entries {info.filename}")
                entries[info.filename] = _entry(file, size, path, info)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise ModelError(
            f"{path}: truncated, or not a file of torch.save: {error}", INCOMPLETE
        ) from error
    _check_apart(path, entries)
    return _below_folder(path, entries)


def _entry(file, size: int, path: Path, info: zipfile.ZipInfo) -> Entry:
    """Follow the central directory to the entry itself, trusting neither."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise _broken(path, f"{info.filename} is compressed, which torch.save never does")
    if info.flag_bits & _ENCRYPTED:
        raise _broken(path, f"{info.filename} is encrypted")
    file.seek(info.header_offset)
    header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if header[0] != b"PK\3\4":
        raise _broken(path, f"{info.filename} is not where the directory says")
    offset = info.header_offset + _LOCAL_HEADER.size + header[-2] + header[-1]
    if offset + info.file_size > size:
        raise _broken(path, f"{info.filename} is said to reach beyond the end of the file")
    return Entry(offset, info.file_size)


def _check_apart(path: Path, entries: dict[str, Entry]) -> None:
    """Entries that overlap would make a small file a large one."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.nbytes and entry.offset < end:
            raise _broken(path, f"{name} overlaps another entry")
        end = max(end, entry.offset + entry.nbytes)


def _below_folder(path: Path, entries: dict[str, Entry]) -> dict[str, Entry]:
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise _broken(path, f"has {len(pickles)} entries data.pkl, not one")
    folder = pickles[0].removesuffix("data.pkl")
    return {
        name.removeprefix(folder): entry
        for name, entry in entries.items()
        if name.startswith(folder)
    }


def _broken(path: Path, what: str) -> ModelError:
    return ModelError(
        f"{path}: {what}", "Only files as torch.save writes them are read. Is it what it should be?"
    )
