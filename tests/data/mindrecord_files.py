"""MindRecord files for tests: small ones, and their headers to look at and to change."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ostro.data.mindrecord import MindRecordWriter

SMALL: dict[str, Any] = {"header_size": 1 << 14, "page_size": 1 << 15}

Row = dict[str, np.ndarray]


def write(path: Path, rows: Iterable[Any], columns: Any = ("input_ids",), **more: Any) -> Path:
    with MindRecordWriter(path, columns, "rows", **SMALL | more) as writer:
        for row in rows:
            writer.append(row if isinstance(row, dict) else {"input_ids": row})
    return path


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def set_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a header in place, at whatever length it then has."""
    header = header_of(path)
    change(header)
    text = json.dumps(header).encode()
    data = path.read_bytes()
    path.write_bytes((struct.pack("<Q", len(text)) + text).ljust(1 << 14, b"\0") + data[1 << 14 :])


def assert_same(found: Row, expected: Row) -> None:
    assert list(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
