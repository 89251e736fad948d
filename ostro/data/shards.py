"""Token shards on disk: `.npy` files one can map into memory, and a JSON manifest that says what they are."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ostro.data.sources import Document, expand, read_documents
from ostro.data.tokenizer import Tokenizer
from ostro.errors import DataError, Error, OutOfMemory

FORMAT = "ostro-tokens-1"
SHARD_TOKENS = 2**28
_BATCH_CHARS, _BATCH_DOCUMENTS = 1 << 22, 4096
_MANIFEST = "manifest.json"

Report = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of token shards holds; `files` and `sources` are lists of dicts, as in manifest.json.

    `files`: name, num_tokens. `sources`: path, num_bytes, sha256. `num_bytes` counts the UTF-8 bytes of all
    texts.
    """

    format: str
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    bos_token_id: int
    eos_token_id: int
    unk_token_id: int | None
    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    files: list[dict[str, Any]]
    sources: list[dict[str, Any]]


class Shards:
    """Prepared data, mapped into memory: one stream of tokens, and where its documents end."""

    def __init__(self, path: Path, manifest: Manifest, files: Sequence[np.ndarray], documents: np.ndarray):
        self.path = path
        self.manifest = manifest
        self.num_tokens = manifest.num_tokens
        self._files = [file.view(np.ndarray) for file in files]  # slices of a memmap proper cost ten times more
        self._starts = [0, *itertools.accumulate(len(file) for file in files)]
        self._ends = documents.view(np.ndarray)[:, 0]

    @property
    def document_ends(self) -> np.ndarray:
        """The end of each document in the stream, as int64 [num_documents], still on disk."""
        return self._ends

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of the stream in their own dtype; a view where they lie in one file."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        at = min(bisect.bisect_right(self._starts, start), len(self._files)) - 1
        parts = []
        while start < stop or not parts:
            base, end = self._starts[at], min(stop, self._starts[at + 1])
            parts.append(self._files[at][start - base : end - base])
            start, at = end, at + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def prepare(
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    tokenizer: Tokenizer,
    kind: str = "auto",
    report: Report | None = None,
) -> Manifest:
    """Turn documents into token shards in the new folder `out`; each document becomes BOS, its ids, EOS.

    Memory is bounded by the longest document. `report` is called with the tokens and text bytes done so far.
    The folder is written beside `out` and renamed, so it is whole or not there. Raises DataError for sources
    that cannot be used, nothing to prepare, or an `out` that is taken; OutOfMemory where the disk is full.
    """
    out = Path(out)
    files = expand(paths)
    _refuse_taken(out)
    with _disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        try:
            manifest = _write(files, folder, tokenizer, kind, report)
            _make_readable(folder)
            os.replace(folder, out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return manifest


def is_prepared(path: str | Path) -> bool:
    """Whether `path` is a folder that `prepare` wrote, damaged or not: a manifest beside arrays."""
    path = Path(path)
    try:
        return (path / _MANIFEST).is_file() and any(path.glob("*.npy"))
    except (OSError, ValueError):
        return False


def cache_dir() -> Path:
    """Return where Ostro keeps what can be made again: `ostro` under XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ostro"


def prepared(
    paths: Sequence[str | Path],
    cache: str | Path,
    *,
    tokenizer: Tokenizer,
    kind: str = "auto",
    report: Report | None = None,
) -> Path:
    """Return a folder of token shards for `paths`, prepared at most once for the same files and tokenizer.

    A single path that is prepared already is returned as it is. Files count as the same by path, size and
    time of change.
    """
    if len(paths) == 1 and is_prepared(paths[0]):
        return Path(paths[0])
    for path in paths:
        if is_prepared(path):
            raise DataError(f"{path} is prepared already and cannot be mixed with raw files: name it alone.")
    with _disk_errors(Path(cache)):
        stats = [(str(path.resolve()), path.stat()) for path in expand(paths)]
    seen = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    specials = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    key = hashlib.sha256(json.dumps([FORMAT, tokenizer.sha256, specials, kind, seen]).encode()).hexdigest()
    folder = Path(cache) / key[:16]
    if not is_prepared(folder):
        try:
            prepare(paths, folder, tokenizer=tokenizer, kind=kind, report=report)
        except DataError:
            if not is_prepared(folder):  # another process may have been faster
                raise
    return folder


def open_shards(path: str | Path) -> Shards:
    """Map the token shards in `path`.

    Raises DataError where files are missing, cut off or contradict the manifest.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    files = [_mapped(path / str(file["name"])) for file in manifest.files]
    for file, tokens in zip(manifest.files, files, strict=True):
        _agree(path, f"the shape of {file['name']}", [file["num_tokens"]], list(tokens.shape))
        _agree(path, f"the dtype of {file['name']}", manifest.dtype, str(tokens.dtype))
    _agree(path, "num_tokens", manifest.num_tokens, sum(len(tokens) for tokens in files))
    documents = _mapped(path / "documents.npy")
    _agree(path, "the shape of documents.npy", [manifest.num_documents, 2], list(documents.shape))
    _agree(path, "the dtype of documents.npy", "int64", str(documents.dtype))
    ends = documents[:, 0]
    _agree(path, "the end of the last document", manifest.num_tokens, int(ends[-1]))
    if ends[0] < 1 or not np.all(ends[1:] > ends[:-1]):
        raise DataError(f"{path}/documents.npy is damaged, its ends do not rise: prepare the data again.")
    return Shards(path, manifest, files, documents)


class _ArrayFile:
    """Writes an `.npy` file row by row, without knowing its length before the end."""

    def __init__(self, path: Path, dtype: np.dtype, columns: tuple[int, ...] = ()) -> None:
        self._file = path.open("wb")
        self._dtype, self._columns = dtype, columns
        self.num_rows = 0
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).data)
        self.num_rows += len(rows)

    def close(self) -> None:
        """Write the true length into the header: numpy leaves room in it for this."""
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def __enter__(self) -> _ArrayFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with contextlib.suppress(OSError):  # the disk may be full: the first error tells
                self._file.close()

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.num_rows, *self._columns),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


def _write(files: list[Path], folder: Path, tokenizer: Tokenizer, kind: str, report: Report | None) -> Manifest:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    written: list[dict[str, Any]] = []
    num_tokens = num_documents = num_bytes = 0

    def rows() -> Iterator[np.ndarray]:
        nonlocal num_tokens, num_documents, num_bytes
        with _ArrayFile(folder / "documents.npy", np.dtype(np.int64), (2,)) as ends:
            for batch in _batches(read_documents(files, kind)):
                for ids, size in _encoded(batch, tokenizer):
                    num_tokens += len(ids)
                    num_bytes += size
                    ends.append(np.array([[num_tokens, size]]))
                    yield ids
                num_documents = ends.num_rows
                if report:
                    report(num_tokens, num_bytes)

    _fill(rows(), folder, dtype, written)
    if not num_documents:
        names = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        raise DataError(f"{names}: there is no text in it, so there is nothing to prepare: name other files.")
    manifest = Manifest(
        format=FORMAT,
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        unk_token_id=tokenizer.unk_token_id,
        dtype=str(dtype),
        num_tokens=num_tokens,
        num_documents=num_documents,
        num_bytes=num_bytes,
        files=written,
        sources=[_source(path) for path in files],
    )
    (folder / _MANIFEST).write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n", "utf-8")
    return manifest


def _fill(rows: Iterator[np.ndarray], folder: Path, dtype: np.dtype, written: list[dict[str, Any]]) -> None:
    """Write rows one after another, into a new file whenever one is full; note each in `written`."""
    rest: np.ndarray | None = next(rows, None)
    while rest is not None:
        name = f"tokens-{len(written):05d}.npy"
        with _ArrayFile(folder / name, dtype) as file:
            while rest is not None and file.num_rows < SHARD_TOKENS:
                room = SHARD_TOKENS - file.num_rows
                file.append(rest[:room])
                rest = rest[room:] if len(rest) > room else next(rows, None)
            written.append({"name": name, "num_tokens": file.num_rows})


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document.text)
        if num_chars >= _BATCH_CHARS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _encoded(batch: list[Document], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int]]:
    """Yield BOS, ids, EOS of each document, and the UTF-8 bytes of its text."""
    bos, eos = (np.array([at], np.uint32) for at in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    for document, ids in zip(batch, tokenizer.encode_arrays([item.text for item in batch]), strict=True):
        text = document.text
        yield np.concatenate([bos, ids, eos]), len(text) if text.isascii() else len(text.encode())


def _source(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"path": str(path), "num_bytes": file.tell(), "sha256": digest}


def _make_readable(folder: Path) -> None:
    """Give a temporary folder, which is the owner's alone, the rights a new folder has."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)


def _refuse_taken(out: Path) -> None:
    if is_prepared(out):
        raise DataError(f"{out} already holds prepared data: choose another folder, or remove this one.")
    with _disk_errors(out):
        if (out.exists() or out.is_symlink()) and not (out.is_dir() and not any(out.iterdir())):
            raise DataError(f"{out} exists and is not an empty folder: choose a new one for the data.")


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Turn what the operating system says of writing to `out` into a sentence."""
    try:
        yield
    except Error:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutOfMemory(
                f"the disk is full, and nothing of {out} was kept: make room (4 to 6 bytes for each 10 bytes "
                "of text) or choose a folder on another disk."
            ) from None
        raise DataError(
            f"{out} cannot be prepared ({error.strerror or error}: {error.filename or out}): change the "
            "permissions or choose another folder."
        ) from None


def _read_manifest(path: Path) -> Manifest:
    try:
        data = json.loads((path / _MANIFEST).read_bytes())
    except OSError:
        raise DataError(
            f"{path} is not prepared data, it has no readable {_MANIFEST}: run ostro prepare, or name another folder."
        ) from None
    except (ValueError, RecursionError):
        data = None
    fields = [field.name for field in dataclasses.fields(Manifest)]
    given = data.get("format") if isinstance(data, dict) else None
    if given is not None and given != FORMAT:
        raise DataError(f"{path} is in the format {given!r}, and this Ostro reads {FORMAT!r}: prepare it again.")
    if not isinstance(data, dict) or sorted(data) != sorted(fields) or not _is_typed(data):
        raise DataError(f"{path / _MANIFEST} is damaged or not Ostro's: prepare the data again.")
    return Manifest(**data)


def _is_typed(data: dict[str, Any]) -> bool:
    counts = ("num_tokens", "num_documents", "num_bytes", "vocab_size", "bos_token_id", "eos_token_id")
    files, sources = data["files"], data["sources"]
    return (
        all(type(data[name]) is int and data[name] >= 0 for name in counts)
        and data["num_documents"] > 0
        and isinstance(files, list)
        and len(files) > 0
        and all(isinstance(file, dict) and {"name", "num_tokens"} <= file.keys() for file in files)
        and isinstance(sources, list)
        and all(isinstance(data[name], str) for name in ("tokenizer", "tokenizer_sha256", "dtype"))
    )


def _mapped(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} is missing, though the manifest names it: prepare the data again.") from None
    except (OSError, ValueError, EOFError, SyntaxError):
        array = None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path} is cut off or no .npy file: prepare the data again.")
    return array


def _agree(path: Path, what: str, said: Any, found: Any) -> None:
    if said != found:
        raise DataError(
            f"{path}: the manifest says {said} for {what}, and the files have {found}: prepare the data again."
        )
