"""Damage sources of every kind, structure and bytes, and read them: a DataError that names the file, or a sound read.

    python benchmarks/fuzz_sources.py            # 2,000 mutations a source
    python benchmarks/fuzz_sources.py --quick    # 100
    python benchmarks/fuzz_sources.py --source messages --index 4711    # one again, with its traceback

The damage and the slow readers that text and JSON are held against are those of tests/data/test_sources_fuzz.py. Every
file is read with its kind said and with its kind left open. Parquet, MindRecord and Megatron have no second reader of
damaged files: there "read" says that what came were records, and nothing about their values. Failures are other
exceptions, other records than the slow reader's, an error that is no sentence about the file, a process that dies,
5 seconds without an answer, and memory: 64 MiB for a single mutation, 512 MiB of address space for a process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from ostro.data import text_files
from ostro.data.records import Record, Text, Tokens
from ostro.data.sources import SOURCES, attempts, units
from ostro.errors import DataError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "data"))
import test_sources_fuzz as damage  # pyright: ignore[reportMissingImports]

OUTCOMES = ("refused", "read", "failures")
REFUSED, READ, FAILED = OUTCOMES
SECONDS, BATCH = 5.0, 250
GROWTH_BYTES, HEADROOM_BYTES = 64 << 20, 512 << 20
TEXTS = ("text", "lines", "blocks", "wikitext")
BINARIES = ("parquet", "mindrecord", "megatron")
TEXT = (damage.WIKI * 2 + "\n\n\u00a0\nGrüße\r\n\r\n").encode()
_CHUNKS = (1, 5, 64, 1 << 18)
_PACKED = 0.15  # the share of texts and JSON that is packed, and damaged after it


class Slow(BaseException):
    """No answer in time; no reader may catch it."""


def one(source: str, random: Random, folder: Path) -> str:
    """Damage a file of `source`, read it, and return the outcome; what is wrong is raised."""
    if source in BINARIES:
        return _binary(source, random, folder)
    if random.random() < _PACKED:
        return _packed(source, random, folder)
    text_files._CHUNK = random.choice(_CHUNKS)
    if source in TEXTS:
        return _text(source, random, folder / "a.txt")
    layout = random.choice(("lines", "array", "spread"))
    path = folder / ("a.jsonl" if layout == "lines" else "a.json")
    data = _json(source, layout, random)
    (damage.check_lines if layout == "lines" else damage.check_array)(source, data, path)
    damage.check_detection(path)
    return _outcome(_items(path, source))


def _json(source: str, layout: str, random: Random) -> bytes:
    """Return JSON with a record that is changed, bytes that are, or both."""
    within = random.random() < 0.6
    lines = [json.dumps(record, ensure_ascii=False) for record in damage.RECORDS[source]]
    data = damage.laid_out(damage.mutate_record(damage.RECORDS[source], random) if within else lines, layout)
    return damage.mutate_bytes(data, random) if not within or random.random() < 0.3 else data


def _text(source: str, random: Random, path: Path) -> str:
    data = damage.mutate_bytes(TEXT, random)
    path.write_bytes(data)
    items = _items(path, source, random.choice((1, 30, 1000)))
    _check(items, path)
    errors = [item for item in items if isinstance(item, DataError)]
    found = [item.text for item in items if isinstance(item, Text)]
    try:
        wanted = damage.texts_slowly(source, data, path)
    except UnicodeDecodeError:
        assert errors, "bytes that are no UTF-8 were read"
    else:
        assert not errors, errors
        assert found == wanted
    damage.check_readable(path)
    return _outcome(items)


def _packed(source: str, random: Random, folder: Path) -> str:
    """Read a packed file that was damaged: what it gives without an error must be what it held."""
    suffix, (pack, _) = random.choice(list(damage.packers().items()))
    if source in TEXTS:
        plain, path = TEXT, folder / "a.txt"
    else:
        lines = [json.dumps(record) for record in damage.RECORDS[source]]
        plain, path = damage.laid_out(lines, "lines"), folder / "a.jsonl"
    path.write_bytes(plain)
    wanted = [damage.shown(item)[1] for item in _items(path, source)]
    path = Path(f"{path}{suffix}")
    path.write_bytes(damage.mutate_bytes(pack(plain), random))
    text_files._PACKED_CHUNK = random.choice((1, 7, 64, 1 << 14))
    items = _items(path, source)
    _check(items, path)
    _check(_items(path, "auto"), path)
    # Doubled, it may hold its content twice; emptied, nothing: both are whole packed files.
    if not any(isinstance(item, DataError) for item in items):
        found = [damage.shown(item)[1] for item in items]
        assert found in ([], wanted) or found[: len(wanted) - 1] == wanted[:-1], "other records than it held"
    return _outcome(items)


def _binary(source: str, random: Random, folder: Path) -> str:
    with tempfile.TemporaryDirectory(dir=folder) as inside:  # its writers refuse what is there already
        return _binary_in(source, random, Path(inside))


def _binary_in(source: str, random: Random, folder: Path) -> str:
    path = random.choice(damage.binary(source, folder))
    data = path.read_bytes()
    if random.random() < 0.5:  # where its structure stands: the first 300 bytes, or the last
        at = random.randrange(min(300, len(data)))
        at = at if random.random() < 0.5 else len(data) - 1 - at
        data = data[:at] + bytes([random.randrange(256)]) + data[at + 1 :]
    else:
        data = damage.mutate_bytes(data, random)
    path.write_bytes(data)
    unit_bytes = random.choice((1, 500, 1 << 26))
    items = _items(path, source, unit_bytes)
    for found in (items, _items(path, "auto", unit_bytes)):
        _check(found, folder)
        for item in found:
            assert not isinstance(item, Tokens) or (item.ids.ndim == 1 and item.ids.dtype.kind in "iu"), item
    return _outcome(items)


def _items(path: Path, kind: str, unit_bytes: int = 1 << 26) -> list[Record | DataError]:
    try:
        return [item for unit in units([path], kind, unit_bytes=unit_bytes) for item in attempts(unit)]
    except DataError as error:
        return [error]


def _check(items: list[Record | DataError], place: Path) -> None:
    for item in items:
        if isinstance(item, DataError):
            message = str(item)
            assert str(place) in message, f"it does not name the file: {message[:300]}"
            assert message.isprintable(), f"{message[:300]!r}"
            assert len(message) < 1000, f"{len(message)} characters"
            assert message.endswith((".", "?")), f"no sentence: {message[:300]}"


def _outcome(items: list[Record | DataError]) -> str:
    return REFUSED if any(isinstance(item, DataError) for item in items) else READ


# Many of them, in processes of their own


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)


def tried(source: str, seed: int, index: int, folder: Path) -> dict[str, Any]:
    """Return the outcome of one mutation, and what there is to say of a failure."""
    before = _peak_bytes()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        outcome, said = one(source, Random(f"{seed}/{source}/{index}"), folder), ""
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {str(error)[:300]} ({Path(place.filename).name}:{place.lineno})"
        outcome = FAILED
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if (grown := _peak_bytes() - before) > GROWTH_BYTES:
        outcome, said = FAILED, f"it took {grown >> 20} MiB {said}"
    return {"index": index, "outcome": outcome, "said": said}


def _child(source: str, seed: int, indexes: range, folder: Path, writing: int) -> None:
    def stop(*_: object) -> None:
        raise Slow(f"no answer in {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    warm = folder / "warm"  # what is imported late is not counted as a mutation's
    warm.mkdir()
    for at in range(20):
        tried(source, -1, at, warm)
    if sys.platform == "linux":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + HEADROOM_BYTES, resource.RLIM_INFINITY))
    for index in indexes:
        os.write(writing, (json.dumps(tried(source, seed, index, folder)) + "\n").encode())


def _forked(source: str, seed: int, indexes: range) -> Iterator[dict[str, Any]]:
    """Yield the results of a process of its own; the rest is missing if it died."""
    with tempfile.TemporaryDirectory(prefix="ostro-fuzz-") as folder:
        reading, writing = os.pipe()
        process = os.fork()
        if not process:
            os.close(reading)
            try:
                _child(source, seed, indexes, Path(folder), writing)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as lines:
            # A process that no signal stops, in a loop of C's, is ended from here.
            while select.select([lines], [], [], 4 * SECONDS + 20)[0] and (line := lines.readline()):
                yield json.loads(line)
        try:
            os.kill(process, signal.SIGKILL)
        finally:
            os.waitpid(process, 0)


def fuzz(source: str, seed: int, count: int) -> list[dict[str, Any]]:
    """Return the results of `count` mutations; one over which a process dies is a failure."""
    results: list[dict[str, Any]] = []
    while len(results) < count:
        rest = range(len(results), min(len(results) + BATCH, count))
        found = list(_forked(source, seed, rest))
        results += found
        if len(found) < len(rest):
            results.append({"index": rest[len(found)], "outcome": FAILED, "said": "the process died"})
    return results


def main() -> int:
    """Print one table; 1 if there was a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=2_000, help="a source")
    parser.add_argument("--quick", action="store_true", help="100 mutations a source")
    parser.add_argument("--source", choices=SOURCES, action="append", help="only this one; may be given again")
    parser.add_argument("--index", type=int, help="try this one mutation and show what happens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows and the failures here too")
    options = parser.parse_args()
    names = options.source or list(SOURCES)
    if options.index is not None:
        with tempfile.TemporaryDirectory(prefix="ostro-fuzz-") as folder:
            print(one(names[0], Random(f"{options.seed}/{names[0]}/{options.index}"), Path(folder)))
        return 0
    start = time.perf_counter()
    rows, failures = [], []
    print(f"| {' | '.join(('source', 'mutations', *OUTCOMES))} |\n|---|{'---:|' * 4}", flush=True)
    for name in names:
        results = fuzz(name, options.seed, 100 if options.quick else options.mutations)
        counts = {outcome: sum(result["outcome"] == outcome for result in results) for outcome in OUTCOMES}
        rows.append({"source": name, "mutations": len(results), **counts})
        found = [{"source": name, **result} for result in results if result["outcome"] == FAILED]
        failures += found
        print(f"| {name} | {' | '.join(f'{value:,}' for value in list(rows[-1].values())[1:])} |", flush=True)
        for failure in found[:20]:
            print(*failure.values(), file=sys.stderr, flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "failures": failures}, indent=1))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
