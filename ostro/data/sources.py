"""Where records come from: files, folders and globs, each file's kind found by its content, cut into units of work."""

from __future__ import annotations

import collections
import dataclasses
import glob
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from ostro.data import json_files, tables, text_files
from ostro.data.records import Record, Unit
from ostro.data.shards import cache_dir
from ostro.data.text_files import LARGEST, Item, exact, head, is_blank, too_long, unreadable
from ostro.errors import DataError, nearest

# What a folder is searched for; each but the last three may end in .gz or .zst as well.
SUFFIXES = (".txt", ".text", ".md", ".py", ".tokens", ".raw", ".jsonl", ".ndjson", ".json")
SUFFIXES += (".parquet", ".mindrecord", ".idx")
UNIT_BYTES, _LEAST_BYTES, _FEWEST = 64 << 20, 4 << 20, 64
_HEADS = 1 << 12  # in which a WikiText file has a heading
_JSON = (".jsonl", ".ndjson", ".json")
_NAMED_JSON = tuple(suffix + packed for suffix in _JSON for packed in ("", *text_files.PACKED))
_PARTITION = re.compile(r"\.mindrecord\d*$", re.ASCII)
_WEIGHT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# How other files begin, which would be read as text or fail as such.
_OTHERS = {
    b"PK\x03\x04": "a ZIP archive: unpack it",
    b"BZh": "packed with bzip2: unpack it, or pack it with gzip",
    b"\xfd7zXZ": "packed with xz: unpack it, or pack it with gzip",
    b"%PDF": "a PDF: extract its text",
    b"\x93NUMPY": "a NumPy array: name the text it was made from",
    b"SQLite format 3": "an SQLite database: name the file it belongs to",
    b"ARROW1": "an Arrow file: write it as Parquet",
    b"\xff\xfe": "UTF-16: convert it, for instance with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16: convert it, for instance with iconv -f UTF-16 -t UTF-8",
}
_MAGICS = tuple(_OTHERS)
_LENGTH_AND_JSON = re.compile(rb'.{8}\{"', re.DOTALL)
DOCUMENTS = {"file": "text", "line": "lines", "blank": "blocks"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A kind of source: what `--kind` calls it, what it is, and the generator of a unit's records.

    A generator yields a DataError in the place of a record that is bad, None for one with nothing to learn, and raises
    where nothing more can be read.
    """

    name: str
    what: str
    read: Callable[[Unit], Iterator[Item]]


def _read_mindrecord(unit: Unit) -> Iterator[Item]:
    from ostro.data.mindrecord import read_mindrecord

    return read_mindrecord(unit.path, alone=True)  # its partitions are units of their own


def _read_megatron(unit: Unit) -> Iterator[Item]:
    from ostro.data.megatron import read_megatron

    return read_megatron(unit.path)


# A source is a generator, and a line here. Those of JSON read its lines and its arrays, and Parquet's rows as well.
SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source("text", "a document a file", text_files.read_whole),
        Source("lines", "text, a document a line", text_files.read_lines),
        Source("blocks", "text, documents separated by blank lines", text_files.read_blocks),
        Source("wikitext", "WikiText's token files, a document an article", text_files.read_articles),
        Source("jsonl", 'JSON records with "text"', json_files.read_texts),
        Source("alpaca", 'JSON records with "instruction" and "output", perhaps "input"', json_files.read_alpaca),
        Source("sharegpt", 'JSON records with "conversations"', json_files.read_sharegpt),
        Source("messages", 'JSON records with OpenAI\'s "messages"', json_files.read_messages),
        Source("prompt", 'JSON records with "prompt" and "completion"', json_files.read_prompts),
        Source("parquet", "Parquet, its columns named as the fields above", tables.read_parquet),
        Source("mindrecord", "MindSpore's records of input_ids", _read_mindrecord),
        Source("megatron", "Megatron's .bin and .idx", _read_megatron),
    )
}
_RECORDS = ("jsonl", "alpaca", "sharegpt", "messages", "prompt")


@dataclasses.dataclass(frozen=True)
class Found:
    """The files that were named, in order, and how many of each other suffix the folders hold besides."""

    files: list[Path]
    skipped: dict[str, int]


def units(
    paths: Iterable[str | Path], kind: str = "auto", *, documents: str = "file", unit_bytes: int | None = None
) -> list[Unit]:
    """Return the pieces of work that files, folders and globs make, in a fixed order.

    `kind` is a key of SOURCES, or "auto": each file's content decides. `documents` says what one is in a text file:
    the `file`, a `line`, or what `blank` lines separate. Files of records are cut where one begins, about every
    `unit_bytes` (None: `unit_bytes_of` all of them); heads and the surroundings of cuts are all that is read. Raises
    DataError for what is not there, not readable or no source.
    """
    return units_of(expand(paths), kind, documents=documents, unit_bytes=unit_bytes)


def units_of(
    files: Sequence[Path], kind: str = "auto", *, documents: str = "file", unit_bytes: int | None = None
) -> list[Unit]:
    """Return what `units` does of files that were found before."""
    if kind != "auto" and kind not in SOURCES:
        raise DataError(f"data kind {kind!r} is unknown: use auto, {', '.join(SOURCES)}.{nearest(kind, SOURCES)}")
    if documents not in DOCUMENTS:
        raise DataError(
            f"documents {documents!r} is unknown: use {', '.join(DOCUMENTS)}.{nearest(documents, DOCUMENTS)}"
        )
    found: list[Unit] = []
    sets: set[str] = set()  # files that are read as part of a set: each of them may have been named
    sizes = [_size(path) for path in files]
    unit_bytes = unit_bytes or unit_bytes_of(sum(sizes))
    for path, size in zip(files, sizes, strict=True):
        its = detect(path) if kind == "auto" else kind
        if its in ("mindrecord", "megatron"):
            names = [name for name in _set_of(path, its) if name not in sets]
            sets.update(names)
            found += [Unit(name, its) for name in names]
        else:
            found += _spans(str(path), DOCUMENTS[documents] if its == "text" else its, size, unit_bytes)
    return found


def files_of(unit: Unit) -> list[str]:
    """Return the files that decide a unit's records: its own, and of Megatron's the index."""
    return [unit.path, str(Path(unit.path).with_suffix(".idx"))] if unit.kind == "megatron" else [unit.path]


def unit_bytes_of(num_bytes: int) -> int:
    """Return how many bytes one piece of work has: few where there are few, so that no process waits long for others.

    It is UNIT_BYTES at most, so that a large corpus has a file for each, and no more.
    """
    return min(UNIT_BYTES, max(_LEAST_BYTES, num_bytes // _FEWEST))


def read(unit: Unit) -> Iterator[Record]:
    """Yield the records of a unit, whose memory is bounded by the longest of them; blank ones are left out.

    Raises DataError, with the file and the line or record, at the first that is bad.
    """
    for item in attempts(unit):
        if isinstance(item, DataError):
            raise item
        yield item


def attempts(unit: Unit) -> Iterator[Record | DataError]:
    """Yield the records of a unit, and in the place of a bad one the DataError that `read` would raise.

    Where nothing more can be read of the file, the DataError is the last that comes.
    """
    try:
        if unit.kind in _RECORDS and _starts_with(unit.path, b"PAR1"):
            items = tables.read_parquet(unit, unit.kind)
        else:
            items = SOURCES[unit.kind].read(unit)
        for item in items:
            if isinstance(item, DataError):
                yield DataError(exact(str(item)))
            elif item is not None:
                yield item
    except DataError as error:
        yield DataError(exact(str(error)))


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files that `paths` name, as `find` does."""
    return find(paths).files


def find(paths: Iterable[str | Path]) -> Found:
    """Return the files that `paths` name: files as given, folders and globs sorted, in the order of `paths`.

    Folders are searched through and through for SUFFIXES; names that start with a dot are passed over. A Megatron
    data set may be named without .bin and .idx; hf://OWNER/NAME is fetched once into the cache. Raises DataError for a
    path that does not exist or holds nothing.
    """
    found: list[Path] = []
    skipped: collections.Counter[str] = collections.Counter()
    for given in paths:
        if tables.is_hub_id(str(given)):
            found.append(tables.read_hub(str(given), cache_dir() / "datasets"))
            continue
        path = Path(given)
        try:
            if path.is_dir():
                found += _within(path, skipped)
            elif path.is_file():
                found.append(path)
            elif path.exists():  # it is read more than once, which a pipe cannot
                raise DataError(f"{given} is neither a file nor a folder: write what it gives to a file first.")
            elif path.with_name(path.name + ".idx").is_file():
                found.append(path.with_name(path.name + ".idx"))
            else:
                found += _matching(str(given))
        except (OSError, ValueError) as error:  # ValueError: a null character, or no name at all
            raise DataError(
                f"{str(given)!r} cannot be looked at: {getattr(error, 'strerror', None) or error}."
            ) from None
    if not found:
        raise DataError("no data was named: give at least one file, folder or glob.")
    return Found(found, dict(sorted(skipped.items())))


def detect(path: str | Path) -> str:
    """Return the key of SOURCES that a file's content fits; a name that ends in .json or .jsonl is never text.

    Raises DataError for a file that cannot be read, or is known to be none of them.
    """
    name = str(path)
    if name.endswith((".idx", ".bin")):
        from ostro.data.megatron import is_megatron

        if is_megatron(path):
            return "megatron"
    start = head(name)
    if start.startswith(b"PAR1"):
        return "parquet"
    if _LENGTH_AND_JSON.match(start):  # what may be a MindRecord is looked at more closely
        from ostro.data.mindrecord import is_mindrecord

        if is_mindrecord(path):
            return "mindrecord"
    if start.startswith(_MAGICS):
        what = next(what for magic, what in _OTHERS.items() if start.startswith(magic))
        raise DataError(f"{path} is {what}.")
    named = name.endswith(_NAMED_JSON)
    if named or _first(start) in (b"{", b"["):
        return _kind_of_json(Path(path), named)
    if start.find(b"\n = ", 0, _HEADS) < 0 and not start.startswith((b" = ", b"= ")):  # most need no closer look
        return "text"
    from ostro.data.wikitext import looks_like_wikitext

    return "wikitext" if looks_like_wikitext(start[: start.rfind(b"\n") + 1].decode(errors="replace")) else "text"


def parse_weight(text: str) -> tuple[str, float | None]:
    """Return the path and the weight of PATH@WEIGHT, None where no weight is said.

    A file that has such a name is meant as it stands. Raises DataError for a weight that is not above 0.
    """
    path, mark, number = text.rpartition("@")
    if not mark or not _WEIGHT.fullmatch(number) or os.path.exists(text):
        return text, None
    weight = float(number)
    if not path or not 0 < weight < math.inf:
        raise DataError(f"{text!r} is no source with a weight: write PATH@WEIGHT, the weight a number above 0.")
    return path, weight


def _first(start: bytes) -> bytes:
    """Return the first byte that is not blank."""
    few = start[:64].lstrip()
    return (few or start.lstrip())[:1]


def _kind_of_json(path: Path, named: bool) -> str:
    by_line, first = json_files.opening(str(path))
    if first is None or not (named or isinstance(first, dict)):
        return "jsonl" if named else "text"
    kind = json_files.kind_of_fields(first) if isinstance(first, dict) else None
    if kind is None and not named and not by_line:
        return "text"
    if kind is None:
        has = f"has {json_files.fields(first)}" if isinstance(first, dict) else "is no object"
        raise DataError(
            f"{path} {'line' if by_line else 'record'} 1: it {has}, and is no text or conversation: name the fields as "
            "the kinds have them (text; messages; conversations; prompt and completion; instruction and output), or "
            "say --kind text."
        )
    return kind


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(str(path), error) from None


def _spans(path: str, kind: str, size: int, unit_bytes: int) -> list[Unit]:
    """Return a file's units: spans that begin where its records do, or the whole where they cannot be found."""
    try:
        cuts = _cuts(path, kind, size, unit_bytes) if size > unit_bytes else []
    except OSError as error:
        raise unreadable(path, error) from None
    edges = [0, *cuts, size]
    return [Unit(path, kind, start, stop) for start, stop in itertools.pairwise(edges)] if cuts else [Unit(path, kind)]


def _cuts(path: str, kind: str, size: int, unit_bytes: int) -> list[int]:
    if kind == "text":
        return []
    with open(path, "rb") as file:
        start = file.read(4)
        if start == b"PAR1":
            return tables.parquet_cuts(path, unit_bytes)
        if text_files.packing(path, start) or (kind in _RECORDS and not json_files.opening(path)[0]):
            return []
        cuts, target = [], unit_bytes
        while target < size:
            file.seek(target - 1)
            at = _next_start(file, kind, path)
            if at >= size:
                break
            cuts.append(at)
            target = (at // unit_bytes + 1) * unit_bytes
        return cuts


def _next_start(file: IO[bytes], kind: str, path: str) -> int:
    """Return where the next record begins behind the byte at which `file` stands; the end where none does.

    A record of JSON or a line begins with any line, a block behind a blank one, an article with a title between blank
    lines: what a reader takes for the beginning wherever it stands.
    """
    _line(file, path)  # the rest of a line, which says little about the whole
    if kind not in ("blocks", "wikitext"):
        return file.tell()
    after_blank = False
    while True:
        start = file.tell()
        line = _line(file, path)
        if not line or (kind == "blocks" and is_blank(line)):
            return file.tell()
        if kind == "wikitext" and after_blank and _is_title(line) and is_blank(_line(file, path)):
            return start
        after_blank = is_blank(line)


def _is_title(line: bytes) -> bool:
    from ostro.data.wikitext import looks_like_wikitext

    text = line.decode(errors="replace")
    return looks_like_wikitext(text) and text.split()[1] != "="  # a heading, and not one of a section


def _line(file: IO[bytes], path: str) -> bytes:
    start = file.tell()
    line = file.readline(LARGEST + 1)
    if len(line) > LARGEST:
        raise too_long(f"{path} byte {start}", "the line")
    return line


def _set_of(path: Path, kind: str) -> list[str]:
    """Return the files to read for a set of files that belong together, of which `path` is one."""
    if kind == "megatron":
        return [str(path.with_suffix(".bin") if path.suffix == ".idx" else path)]
    from ostro.data.mindrecord import partition_files

    return list(map(str, partition_files(path)))


def _starts_with(path: str, magic: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(magic)) == magic
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None


def _unpacked_name(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in text_files.PACKED if name.endswith(suffix)), name)


def _is_source(path: Path) -> bool:
    if path.suffix == ".idx":  # other programs have such files, too
        return path.with_suffix(".bin").is_file()
    return _unpacked_name(path.name).endswith(SUFFIXES) or _PARTITION.search(path.name) is not None


def _within(folder: Path, skipped: collections.Counter[str]) -> list[Path]:
    found = []
    for path in _files_in(folder):
        if _is_source(path):
            found.append(path)
        else:
            skipped[path.suffix or "no suffix"] += 1
    if not found:
        others = f", only {', '.join(f'{count} {suffix}' for suffix, count in skipped.items())}" if skipped else ""
        raise DataError(
            f"{folder} holds no {' '.join(SUFFIXES)} file (.gz and .zst allowed){others}: name another folder, or the "
            "files themselves."
        )
    return found


def _files_in(folder: Path) -> Iterator[Path]:
    """Yield all files but hidden ones, sorted by the parts of their paths; links to folders are not followed."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files_in(folder / entry.name)
        elif entry.is_file():
            yield folder / entry.name


def _matching(pattern: str) -> list[Path]:
    if parse_weight(pattern)[1] is not None:
        raise DataError(
            f"{pattern} says a weight, which counts where data is trained on: prepare each source by itself, and train "
            "with data.path=[DIR@0.3, OTHER@0.7]."
        )
    if not glob.has_magic(pattern):
        raise DataError(f"{pattern} does not exist: check the path, which is relative to {Path.cwd()}.")
    files = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not files:
        raise DataError(f"{pattern} matches no file: check the pattern, which is relative to {Path.cwd()}.")
    return files
