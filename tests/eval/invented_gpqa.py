"""A table like GPQA's whose problems are invented, in an encrypted archive like its authors', and a search for its texts."""

from __future__ import annotations

import csv
import io
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

PASSWORD = b"deserted-untie-orchid"
COLUMNS = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3", "Record ID")
SUBSETS = {"extended": range(9), "main": range(7), "diamond": (5, 1, 3)}
PIECE = 20
"""Characters of an item that must not be found anywhere"""


def record(number: int) -> dict[str, str]:
    """A problem; its texts have no 20 characters in common with those of others but for the words around the number."""
    return {
        "Question": f"\nHow many turnips did the {number}th margrave of Zarnavia owe\nto her {number + 2} bakers at harvest?\n",
        "Correct Answer": f"the {number + 40} red turnips of Upper Oom  [title]and a cabbage",
        "Incorrect Answer 1": f"a barrow of {number + 50} spotted turnips from Lower Oom",
        "Incorrect Answer 2": f"none, for bakers of the {number + 60}th guild ate no roots",
        "Incorrect Answer 3": f"{number + 70} turnips, and the recipe for a purple soup",
        "Record ID": f"recZ{number:04d}",
    }


def table(numbers: Iterable[int]) -> str:
    """A CSV table of these problems, with one column more than is needed."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ("Explanation", *COLUMNS))
    writer.writeheader()
    for number in numbers:
        writer.writerow({"Explanation": f"as the chronicle of year {number} relates", **record(number)})
    return text.getvalue()


def write_archive(path: Path, tables: dict[str, str] | None = None, *, password: bytes = PASSWORD) -> Path:
    """The archive, with the members `dataset/gpqa_<subset>.csv`; zipfile reads such ones and cannot write them."""
    if tables is None:
        tables = {subset: table(numbers) for subset, numbers in SUBSETS.items()}
    files, directory = b"", b""
    for subset, text in tables.items():
        name, content = f"dataset/gpqa_{subset}.csv".encode(), text.encode()
        crc = zlib.crc32(content)
        body = _encrypted(bytes(11) + struct.pack("<I", crc)[3:] + content, password)
        common = struct.pack("<HHHHHIIIHH", 20, 1, 0, 0, 0, crc, len(body), len(content), len(name), 0)
        directory += (
            b"PK\x01\x02" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, len(files)) + name
        )
        files += b"PK\x03\x04" + common + name + body
    end = struct.pack("<HHHHIIH", 0, 0, len(tables), len(tables), len(directory), len(files), 0)
    path.write_bytes(files + directory + b"PK\x05\x06" + end)
    return path


def _encrypted(plain: bytes, password: bytes) -> bytes:
    """The traditional encryption of PKWARE's APPNOTE.TXT, section 6.1."""
    keys = [0x12345678, 0x23456789, 0x34567890]

    def update(byte: int) -> None:
        keys[0] = _crc_of_byte(keys[0], byte)
        keys[1] = ((keys[1] + (keys[0] & 0xFF)) * 134775813 + 1) & 0xFFFFFFFF
        keys[2] = _crc_of_byte(keys[2], keys[1] >> 24)

    for byte in password:
        update(byte)
    out = bytearray()
    for byte in plain:
        mask = (keys[2] | 2) & 0xFFFF
        out.append(byte ^ (((mask * (mask ^ 1)) >> 8) & 0xFF))
        update(byte)
    return bytes(out)


def _crc_of_byte(crc: int, byte: int) -> int:
    """A step of CRC-32 without the complements at both ends."""
    return zlib.crc32(bytes([byte]), crc ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


# ---- the search ------------------------------------------------------------------------------------------------------


def pieces(texts: Iterable[str]) -> set[str]:
    """All runs of 20 characters in the texts, with white space as one space."""
    found = set[str]()
    for text in texts:
        flat = _flat(text)
        found.update(flat[start : start + PIECE] for start in range(len(flat) - PIECE + 1))
    return found


def holds_a_piece(content: str | bytes, of: set[str]) -> bool:
    """Whether a file or an output holds one of the pieces, plain or as JSON escapes it."""
    text = content.decode("utf-8", errors="replace") if isinstance(content, bytes) else content
    flat = _flat(text.replace("\\n", "\n").replace('\\"', '"'))
    return any(flat[start : start + PIECE] in of for start in range(len(flat) - PIECE + 1))


def files_with_a_piece(folder: Path, of: set[str], *, but: Sequence[Path] = ()) -> list[str]:
    """Names of the files below a folder that hold one of the pieces."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in but]
    return [str(path.relative_to(folder)) for path in files if holds_a_piece(path.read_bytes(), of)]


def _flat(text: str) -> str:
    return " ".join(text.split())
