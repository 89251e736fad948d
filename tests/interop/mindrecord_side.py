"""MindSpore's half of `mindrecord.py`: runs a list of jobs in a Python that has mindspore, and no Ostro.

    python -P mindrecord_side.py JOBS.json

Beside JOBS.json it leaves JOBS.json.done, with the answer of each job, or {"error": …}. Rows come as .npz files, a
row's values under "column|row"; they go as digests, one a row.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def digest(row: dict[str, Any]) -> str:
    """Return what is the same for rows of the same columns, types, shapes and values."""
    known = hashlib.sha256()
    for name in sorted(row):
        value = np.frombuffer(row[name], np.uint8) if isinstance(row[name], bytes) else np.asarray(row[name])
        if value.dtype.kind in "iuf" and value.shape in ((), (1,)):  # MindSpore's readers differ over single values
            value = value.astype(np.float64).reshape(())
        known.update(f"{name} {value.dtype.str if value.dtype.kind != 'U' else 'U'} {value.shape}".encode())
        known.update(str(value).encode() if value.dtype.kind == "U" else value.tobytes())
    return known.hexdigest()


def write(path: str, rows: str, schema: dict[str, Any], partitions: int, sizes: list[int], at_once: bool) -> None:
    """Write rows with FileWriter, one by one or all in one call."""
    writer = _records().FileWriter(path, partitions, overwrite=True)
    writer.set_header_size(sizes[0])
    writer.set_page_size(sizes[1])
    writer.add_schema(schema, "rows")
    held = [_plain(row, schema) for row in _rows(rows)]
    for part in [held] if at_once else [[row] for row in held]:
        writer.write_raw_data(part)
    writer.commit()


def append(path: str, rows: str, schema: dict[str, Any]) -> None:
    """Write more rows to a file with FileWriter.open_for_append."""
    writer = _records().FileWriter.open_for_append(path)
    writer.write_raw_data([_plain(row, schema) for row in _rows(rows)])
    writer.commit()


def file_reader(path: str | list[str]) -> list[str]:
    """Return the digest of each row that FileReader gives."""
    reader = _records().FileReader(path)
    found = [digest(row) for row in reader.get_next()]
    reader.close()
    return found


def mind_dataset(path: str | list[str], **settings: Any) -> list[str]:
    """Return the digest of each row that MindDataset gives."""
    dataset: Any = importlib.import_module("mindspore.dataset")
    found = dataset.MindDataset(path, **settings)
    return [digest(row) for row in found.create_dict_iterator(num_epochs=1, output_numpy=True)]


def _records() -> Any:
    return importlib.import_module("mindspore.mindrecord")


def _rows(path: str) -> list[dict[str, np.ndarray]]:
    held = np.load(path)
    rows: dict[int, dict[str, np.ndarray]] = {}
    for key in held.files:
        name, row = key.split("|")
        rows.setdefault(int(row), {})[name] = held[key]
    return [rows[i] for i in range(len(rows))]


def _plain(row: dict[str, np.ndarray], schema: dict[str, Any]) -> dict[str, Any]:
    """Return a row as FileWriter takes it: arrays, bytes, and plain values for single ones."""
    as_bytes = {name: value.tobytes() for name, value in row.items() if schema[name]["type"] == "bytes"}
    single = {name: row[name].item() for name in row if "shape" not in schema[name] and name not in as_bytes}
    return row | single | as_bytes


def main() -> None:
    """Run the jobs."""
    path = Path(sys.argv[1])
    answers = []
    for name, settings in json.loads(path.read_text()):
        try:
            answers.append(globals()[name](**settings))
        except Exception as error:  # it is an answer
            answers.append({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
    path.with_name(f"{path.name}.done").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
