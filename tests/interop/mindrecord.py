"""The real MindSpore beside Ostro over MindRecord: what either writes, the other must read, row for row.

Not collected by pytest, as it needs a Python of its own with mindspore 2.10 and numpy below 2 (`make interop` makes
one):

    python tests/interop/mindrecord.py --mindspore-python PATH_OF_THAT_PYTHON [--json FILE]

Rows are compared by columns, types, shapes and bits; the files that both write also by their header and the used bytes
of each page. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from mindrecord_side import digest  # what it imports of mindspore is only needed there

from ostro.data.mindrecord import MindRecordFile, MindRecordWriter
from ostro.errors import Error

Row = dict[str, np.ndarray]
SMALL, DEFAULT = (1 << 14, 1 << 15), (1 << 24, 1 << 25)  # header area and page
OUT, IN, SAME = "Ostro → MindSpore", "MindSpore → Ostro", "bytes of both"
EXTREMES = [edge + d for bits in (7, 15, 31) for edge in (2**bits, -(2**bits)) for d in (-1, 0, 1)]
SINGLE = {
    "count": {"type": "int32"},
    "large": {"type": "int64"},
    "loss": {"type": "float32"},
    "exact": {"type": "float64"},
    "name": {"type": "string"},
    "data": {"type": "bytes"},
    "grid": {"type": "float32", "shape": [2, 2]},
    "ids": {"type": "int64", "shape": [-1, 2]},
}


@dataclasses.dataclass
class Case:
    """One line of the table: jobs for MindSpore, and what is compared when they are done ("" or what differs)."""

    what: str
    direction: str
    jobs: list[tuple[str, dict[str, Any]]]
    compare: Callable[[list[Any]], str]


def main() -> int:
    """Print the table; return the exit code."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mindspore-python", required=True, help="a Python that has mindspore and numpy below 2")
    options.add_argument("--json", type=Path, help="write the table here as well")
    given = options.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = [*_written(folder), *_appended(folder), *_read(folder), *_same(folder)]
        answers = iter(_ask(given.mindspore_python, folder, [job for case in cases for job in case.jobs]))
        rows = [_line(case, [next(answers) for _ in case.jobs]) for case in cases]
    print("| case | direction | result |\n|---|---|---|")
    for row in rows:
        print(f"| {row['case']} | {row['direction']} | {row['result']} |")
    failed = sum(row["result"] != "equal" for row in rows)
    print(f"\n{len(rows) - failed} of {len(rows)} equal, {time.perf_counter() - start:.0f} s")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return int(failed > 0)


def _line(case: Case, answers: list[Any]) -> dict[str, str]:
    errors = [answer["error"] for answer in answers if isinstance(answer, dict)]
    result = f"MindSpore: {errors[0]}" if errors else ""
    if not result:
        try:
            result = case.compare(answers)
        except (Error, OSError) as error:
            result = f"{type(error).__name__}: {error}"
    return {"case": case.what, "direction": case.direction, "result": result or "equal"}


def _ask(python: str, folder: Path, jobs: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Run the jobs in the other Python, and return the answer of each."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    side = Path(__file__).resolve().with_name("mindrecord_side.py")
    # -P, and a working folder without modules: a file named mindspore.py lies beside that script.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment = outside | {"OMP_NUM_THREADS": "1", "GLOG_v": "3"}
    done = subprocess.run(
        [python, "-P", str(side), str(path)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    answer = path.with_name(f"{path.name}.done")
    if done.returncode or not answer.exists():
        sys.exit(f"{python} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(answer.read_text())


# Ostro writes


def _written(folder: Path) -> Iterable[Case]:
    """What Ostro writes, through both of MindSpore's readers: columns × partitions × pages."""
    for columns in (["input_ids"], ["input_ids", "labels"]):
        for partitions in (1, 3, 11):
            for num_rows, length, sizes in ((3000, 4097, DEFAULT), (5000, 3, SMALL)):
                if partitions == 11 and sizes == DEFAULT:
                    continue
                stem = folder / f"out{len(columns)}-{partitions}-{num_rows}.mindrecord"
                # 3,000 rows of two columns fill a page of 32 MiB; rows of one column have wider numbers for that
                rows = list(_rows(num_rows, length, columns, 1 << 20 if len(columns) == 1 else 32000))
                with MindRecordWriter(stem, columns, "rows", partitions=partitions, header_size=sizes[0],
                                      page_size=sizes[1]) as writer:  # fmt: skip
                    for row in rows:
                        writer.append(row)
                paths = sorted(path for path in folder.glob(stem.name + "*") if path.suffix != ".db")
                blobs = sum(page["page_type"] == "BLOB_DATA" for page in _header(paths[0])[1]["page"])
                what = (
                    f"{num_rows} rows of {length}, {len(columns)} columns, {partitions} files, {blobs} pages in the 1st"
                )
                yield _through_readers(what, paths, [digest(row) for row in rows])


def _through_readers(what: str, paths: list[Path], expected: list[str]) -> Case:
    first, each = str(paths[0]), [str(path) for path in paths]
    jobs: list[tuple[str, dict[str, Any]]] = [
        ("file_reader", {"path": first}),
        ("file_reader", {"path": each}),
        ("mind_dataset", {"path": first, "shuffle": False}),
        ("mind_dataset", {"path": first, "shuffle": True}),
        *(("mind_dataset", {"path": each, "shuffle": False, "num_shards": 2, "shard_id": i}) for i in range(2)),
    ]

    def compare(answers: list[list[str]]) -> str:
        *orders, half, other = answers
        for found, (name, settings) in zip(orders, jobs, strict=False):
            is_ordered = name == "mind_dataset" and settings["shuffle"] is False and len(paths) == 1
            if (found if is_ordered else sorted(found)) != (expected if is_ordered else sorted(expected)):
                return f"{name} {settings} gives other rows"
        # of an odd number MindSpore gives one row twice, so that both shards are as long
        if set(half) | set(other) != set(expected) or len(half) != len(other):
            return "two shards of MindDataset are not all rows"
        return ""

    return Case(what, OUT, jobs, compare)


def _appended(folder: Path) -> Iterable[Case]:
    """A file of Ostro's to which MindSpore appends, and that Ostro reads then."""
    rows = list(_rows(3000, 3, ["input_ids"], 32000))
    path = folder / "append.mindrecord"
    with MindRecordWriter(path, ["input_ids"], "rows", header_size=SMALL[0], page_size=SMALL[1]) as writer:
        for row in rows[:2000]:
            writer.append(row)
    schema = _schema(["input_ids"])
    job = ("append", {"path": str(path), "rows": _stored(folder / "append.npz", rows[2000:]), "schema": schema})
    yield Case("2000 rows, 1000 more by MindSpore", f"{OUT} → Ostro", [job], lambda _: _differs(path, rows))


# MindSpore writes


def _read(folder: Path) -> Iterable[Case]:
    """What MindSpore writes, with its .db and without: partitions, ways of writing, all types."""
    for partitions in (1, 3, 11):
        for at_once in (False, True):
            rows = list(_rows(4000, 5, ["input_ids", "labels"], 1 << 17))
            what = f"4000 rows, {partitions} files, {'at once' if at_once else 'one by one'}"
            yield _read_case(folder, what, rows, _schema(["input_ids", "labels"]), partitions, at_once)
    singles = [
        {
            "count": np.array(-(2**31) + i, np.int32),
            "large": np.array(EXTREMES[i % len(EXTREMES)] * 2**31, np.int64),
            "loss": np.array(1 / (i + 1), np.float32),
            "exact": np.array(1 / (i + 3)),
            "name": np.array("é" * i),
            "data": np.arange(i % 7, dtype=np.uint8),
            "grid": np.arange(4, dtype=np.float32).reshape(2, 2) * i,
            "ids": np.array(EXTREMES, np.int64).reshape(-1, 2) * (i + 1),
        }
        for i in range(300)
    ]
    yield _read_case(folder, "every type, 300 rows", singles, SINGLE, 1, True)
    names = ["count", "large", "name"]
    few = [{name: row[name] for name in names} for row in singles]
    yield _read_case(folder, "no arrays, 300 rows", few, {name: SINGLE[name] for name in names}, 2, True)


def _read_case(folder: Path, what: str, rows: list[Row], schema: dict[str, Any], num: int, at_once: bool) -> Case:
    stem = folder / f"in-{what.replace(' ', '-').replace(',', '')}.mindrecord"
    settings = {"path": str(stem), "rows": _stored(stem.with_suffix(".npz"), rows), "schema": schema}
    job = ("write", settings | {"partitions": num, "sizes": SMALL, "at_once": at_once})

    def compare(_: list[Any]) -> str:
        path = stem if num == 1 else stem.with_name(f"{stem.name}{0:0{len(str(num - 1))}d}")
        with_index = _differs(path, rows, is_ordered=num == 1)
        for index in folder.glob(f"{stem.name}*.db"):
            index.unlink()
        return with_index or _differs(path, rows, is_ordered=num == 1)

    return Case(what, IN, [job], compare)


def _differs(path: Path, rows: list[Row], *, is_ordered: bool = True) -> str:
    found, expected = [digest(row) for row in MindRecordFile(path).rows()], [digest(row) for row in rows]
    if not is_ordered:  # MindSpore deals rows out to its files by chance
        found, expected = sorted(found), sorted(expected)
    return "" if found == expected else f"{len(found)} rows, and not the {len(expected)} that were written"


# Both write


def _same(folder: Path) -> Iterable[Case]:
    for what, columns, num_rows, length, sizes in (
        ("3000 rows of 4097", ["input_ids", "labels"], 3000, 4097, DEFAULT),
        ("9000 rows of 1 (raw pages fill up in a row group)", ["input_ids"], 9000, 1, SMALL),
        ("4000 rows of 11 (and between row groups)", ["input_ids"], 4000, 11, SMALL),
        ("5000 rows of 3, two columns", ["input_ids", "labels"], 5000, 3, SMALL),
    ):
        rows = list(_rows(num_rows, length, columns, 100 if length == 11 else 32000))
        path = folder / f"same-{num_rows}-{length}.mindrecord"
        ours = folder / "ours" / path.name
        with MindRecordWriter(ours, columns, "rows", header_size=sizes[0], page_size=sizes[1]) as writer:
            for row in rows:
                writer.append(row)
        settings = {"path": str(path), "rows": _stored(path.with_suffix(".npz"), rows), "schema": _schema(columns)}
        job = ("write", settings | {"partitions": 1, "sizes": sizes, "at_once": False})
        yield Case(what, SAME, [job], lambda _, ours=ours, path=path: _differ(ours, path))


def _differ(ours: Path, theirs: Path) -> str:
    text, header = _header(ours)
    if text != _header(theirs)[0]:
        return f"the headers differ: {text[:300]!r} {_header(theirs)[0][:300]!r}"
    if ours.stat().st_size != theirs.stat().st_size:
        return "the files are not as long"
    for page in header["page"]:
        start = header["header_size"] + page["page_id"] * header["page_size"]
        with ours.open("rb") as one, theirs.open("rb") as other:
            one.seek(start)
            other.seek(start)
            if one.read(page["page_size"]) != other.read(page["page_size"]):
                return f"page {page['page_id']} differs"
    return ""


def _header(path: Path) -> tuple[bytes, dict[str, Any]]:
    with path.open("rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
    return text, json.loads(text)


# Rows


def _rows(num_rows: int, length: int, columns: list[str], most: int) -> Iterable[Row]:
    random = np.random.default_rng(num_rows)
    for _ in range(num_rows):
        yield {name: random.integers(-100, most, length, dtype=np.int32) for name in columns}


def _schema(columns: list[str]) -> dict[str, Any]:
    return {name: {"type": "int32", "shape": [-1]} for name in columns}


def _stored(path: Path, rows: list[Row]) -> str:
    np.savez(path, **{f"{name}|{i}": value for i, row in enumerate(rows) for name, value in row.items()})
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
