"""Records that equal an earlier one, found exactly: 16 bytes a record on disk, sorted in parts that fit into memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ostro.data.records import Message, Record, Text, Tokens

_PART_ROWS = 1 << 22  # sorted at a time: some 300 MB


def digest(record: Record) -> np.ndarray:
    """Return 16 bytes of BLAKE2 of what a record says, as uint64 [2]; where it stands and its spelling do not count."""
    if isinstance(record, Text):
        content = b"text" + record.text.encode("utf-8", "surrogatepass")
    elif isinstance(record, Tokens):
        trained = b"" if record.trained is None else record.trained.tobytes()
        content = b"ids %d " % len(record.ids) + np.ascontiguousarray(record.ids, np.int64).tobytes() + trained
    else:
        content = b"chat" + json.dumps(as_json(record), sort_keys=True).encode()
    return np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), np.uint64)


def as_json(record: Record) -> dict[str, Any]:
    """Return a text or a conversation as a line of JSON Lines that reads back the same."""
    assert not isinstance(record, Tokens), record.where
    if isinstance(record, Text):
        return {"text": record.text}
    content: dict[str, Any] = {"messages": [_message(message) for message in record.messages]}
    return content | ({"tools": list(record.tools)} if record.tools else {})


def _message(message: Message) -> dict[str, Any]:
    content: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.role == "assistant" and not message.trained:
        content["weight"] = 0
    if message.tool_calls:
        content["tool_calls"] = [dict(call) for call in message.tool_calls]
    for name in ("tool_call_id", "name"):
        if getattr(message, name) is not None:
            content[name] = getattr(message, name)
    return content


def repeated(files: Sequence[Path]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield, of digests uint64 [n, 2] in several .npy files, the places of those that equal an earlier one.

    Yields (number of the file, places int64) any number of times for each. One file is open at a time; all equal
    digests are in one part, which is decided by the first of their bits.
    """
    num_rows = sum(len(np.load(path, mmap_mode="r")) for path in files)
    bits = max(0, -(-num_rows // _PART_ROWS) - 1).bit_length()
    for part in range(1 << bits):
        found, arrays, places = [], [], []
        for array, rows in enumerate(map(np.load, files)):
            at = np.flatnonzero(rows[:, 0] >> np.uint64(64 - bits) == part) if bits else np.arange(len(rows))
            found.append(rows[at])
            arrays.append(np.full(len(at), array))
            places.append(at)
        if not found:
            return
        rows, array_of, place_of = np.concatenate(found), np.concatenate(arrays), np.concatenate(places)
        order = np.lexsort((rows[:, 1], rows[:, 0]))  # stable: the first of equals stays the first
        rows = rows[order]
        later = order[1:][(rows[1:] == rows[:-1]).all(axis=1)]
        for array in np.unique(array_of[later]).tolist():
            yield array, np.sort(place_of[later[array_of[later] == array]])


def digests_path(folder: Path, number: int) -> Path:
    """Return where the digests of a task's records lie."""
    return folder / f"digests-{number:05d}.npy"


def repeats_path(folder: Path, number: int) -> Path:
    """Return where it lies which of a task's records are left out, bool [records]."""
    return folder / f"repeats-{number:05d}.npy"
