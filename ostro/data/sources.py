"""Where documents come from: files, folders and globs of plain text and JSON Lines, gzipped or not."""

from __future__ import annotations

import dataclasses
import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from ostro.errors import DataError, nearest

# What a folder is searched for; each may end in .gz as well.
SUFFIXES = (".txt", ".text", ".md", ".py", ".jsonl", ".json")
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document, the file it came from, and its line there (None where it is the whole file)."""

    text: str
    source: str
    line: int | None


def text(path: Path) -> Iterator[Document]:
    """Yield the whole file as one document, bytes kept as they are but for a UTF-8 byte order mark."""
    with _opened(path) as file:
        data = b"".join(_chunks(file, path))
    content = _utf8(data.removeprefix(_BOM), path)
    if content.strip():
        yield Document(content, str(path), None)


def jsonl(path: Path) -> Iterator[Document]:
    """Yield the `text` of each line's JSON object; blank lines and blank texts are skipped."""
    with _opened(path) as file:
        for number, line in enumerate(_lines(file, path), start=1):
            content = _utf8(line.removeprefix(_BOM) if number == 1 else line, path, number)
            if content.strip() and (found := _text_of(content, path, number)).strip():
                yield Document(found, str(path), number)


# A source is a generator of documents from one file, and a line here.
SOURCES: dict[str, Callable[[Path], Iterator[Document]]] = {
    "text": text,
    "jsonl": jsonl,
}


def read_documents(paths: Iterable[str | Path], kind: str = "auto") -> Iterator[Document]:
    """Yield the documents of files, folders and globs in a fixed order, blank ones left out.

    `kind` is a key of SOURCES, or "auto": each file's own content decides. Raises DataError for whatever is
    not there, not readable, not UTF-8 or not the kind it is said to be, with the file and the line.
    """
    if kind != "auto" and kind not in SOURCES:
        raise DataError(f"data kind {kind!r} is unknown: use auto, {', '.join(SOURCES)}.{nearest(kind, SOURCES)}")
    for path in expand(paths):
        yield from SOURCES[detect(path) if kind == "auto" else kind](path)


def expand(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files that `paths` name: files as given, folders and globs sorted, in the order of `paths`.

    Folders are searched through and through for SUFFIXES; names that start with a dot are passed over. Raises
    DataError for a path that does not exist or holds nothing.
    """
    found: list[Path] = []
    for given in paths:
        path = Path(given)
        try:
            if path.is_dir():
                inside = _within(path)
                if not inside:
                    raise DataError(
                        f"{given} holds no {' '.join(SUFFIXES)} file (.gz allowed): name another folder, or "
                        "the files themselves."
                    )
                found += inside
            elif path.is_file():
                found.append(path)
            elif path.exists():  # it is read more than once, which a pipe cannot
                raise DataError(f"{given} is neither a file nor a folder: write what it gives to a file first.")
            else:
                found += _matching(str(given))
        except (OSError, ValueError) as error:  # ValueError: a null character in the name
            raise DataError(f"{str(given)!r} cannot be looked at: {_reason(error)}.") from None
    if not found:
        raise DataError("no data was named: give at least one file, folder or glob.")
    return found


def detect(path: Path) -> str:
    """Return the kind of a file: `jsonl` by its name or when its first line with content is a JSON object."""
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        return "jsonl"
    with _opened(path) as file:
        first = next((line for line in _lines(file, path) if line.removeprefix(_BOM).strip()), b"")
    try:
        return "jsonl" if isinstance(json.loads(first.removeprefix(_BOM)), dict) else "text"
    except (ValueError, RecursionError):
        return "text"


def _within(folder: Path) -> list[Path]:
    inside = (path for path in folder.rglob("*") if path.name.removesuffix(".gz").endswith(SUFFIXES))
    return sorted(
        path
        for path in inside
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _matching(pattern: str) -> list[Path]:
    if not glob.has_magic(pattern):
        raise DataError(f"{pattern} does not exist: check the path, which is relative to {Path.cwd()}.")
    files = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
    if not files:
        raise DataError(f"{pattern} matches no file: check the pattern, which is relative to {Path.cwd()}.")
    return files


def _opened(path: Path) -> IO[bytes]:
    try:
        return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {_reason(error)}.") from None


def _chunks(file: IO[bytes], path: Path) -> Iterator[bytes]:
    yield from _guarded(iter(lambda: file.read(1 << 20), b""), path)


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    yield from _guarded(iter(file.readline, b""), path)


def _guarded(parts: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """Pass `parts` on; what reading or unzipping them raises becomes a sentence."""
    while True:
        try:
            part = next(parts)
        except StopIteration:
            return
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise DataError(
                f"{path} is not a whole gzip file: fetch it again, or take away .gz if it is plain."
            ) from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {_reason(error)}.") from None
        yield part


def _utf8(data: bytes, path: Path, line: int | None = None) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        number = line if line is not None else data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise DataError(
            f"{path} line {number}: byte {column} of the line (0x{data[error.start]:02x}) is not UTF-8: "
            "convert the file, for instance with iconv -t UTF-8, or leave it out."
        ) from None


def _text_of(line: str, path: Path, number: int) -> str:
    where = f"{path} line {number}"
    try:
        record: Any = json.loads(line.rstrip())
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: this is not JSON ({_reason(error)}): every line must be one object like "
            '{"text": "..."}; for a plain text file say --kind text.'
        ) from None
    if not isinstance(record, dict) or "text" not in record:
        has = f"an object with {', '.join(map(repr, record))}" if isinstance(record, dict) else "no object"
        raise DataError(f'{where}: a document needs the field "text", and this line is {has}: add it.')
    found = record["text"]
    if not isinstance(found, str):
        raise DataError(f'{where}: "text" must be a string, and is {type(found).__name__}: put it in quotes.')
    if not found.isascii():
        try:
            found.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(
                f'{where}: "text" holds half of a surrogate pair (\\ud800 to \\udfff), which is no '
                "character: remove it or write the whole pair."
            ) from None
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.colno}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return getattr(error, "strerror", None) or str(error)
