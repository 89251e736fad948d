"""From sources to token shards: work is cut into tasks by size alone, tasks are done by processes, each once.

Every task writes one shard under its number and a note that it is done, so a run that was killed goes on with the tasks
that are left, and any number of processes or machines make the same files. The last one to end puts them together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from ostro.data import chat, sources
from ostro.data.arrays import ArrayFile
from ostro.data.records import Chat, Record, Text, Tokens, Unit
from ostro.data.shards import FORMAT, Manifest, is_prepared, read_manifest, write_manifest
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.errors import DataError, Error, OutOfMemory

Report = Callable[[int, int], None]

TASK_BYTES = 64 << 20  # of sources, the work of one process at a time and about one shard
_SMALL_BYTES = 8 << 20  # what is done before another process has started
_BATCH_CHARS, _BATCH_RECORDS = 1 << 22, 4096
_CHECKED_CHARS = 1 << 18  # of each task, encoded once more by the package tokenizers


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides, besides the sources, which tokens come out.

    `template` names how conversations are rendered (None: they are refused); `documents` is what a document of a text
    file is: the `file`, a `line`, or what `blank` lines separate.
    """

    kind: str = "auto"
    documents: str = "file"
    template: str | None = None


def prepare(
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    tokenizer: Tokenizer,
    settings: Settings = Settings(),
    workers: int | None = None,
    share: tuple[int, int] = (0, 1),
    report: Report | None = None,
) -> Manifest | None:
    """Turn sources into token shards in the new folder `out`.

    A text becomes BOS, its ids, EOS. `workers` None is one process a core; `share` (i, n) does every nth task from the
    ith on, for a cluster's own scheduler: whoever finishes last returns the manifest, the others None. `report` is
    called with the tokens and text bytes done so far. The folder appears whole; until then `.NAME.partial` beside it
    holds what is done, and the same call goes on from there. Raises DataError for sources that cannot be used, nothing
    to prepare, an `out` that is taken, or a partial folder of other sources or settings; OutOfMemory for a full disk.
    """
    out = Path(out)
    refuse_taken(out)
    with disk_errors(out):
        tasks = grouped(sources.units([str(path) for path in paths], settings.kind, documents=settings.documents))
        partial = out.parent / f".{out.name}.partial"
        plan = _plan(tasks, tokenizer, settings)
        _begin(partial, plan, tokenizer)
        todo = [number for number in range(len(tasks)) if number % share[1] == share[0] and not _note(partial, number)]
        done = [0, 0]
        for note in _work(partial, [(number, tasks[number]) for number in todo], settings, workers):
            done = [done[0] + note["num_tokens"], done[1] + note["num_bytes"]]
            if report:
                report(*done)
        notes = [_note(partial, number) for number in range(len(tasks))]
        if not all(notes):
            return read_manifest(out) if is_prepared(out) else None
        try:
            return _finished(partial, out, [note for note in notes if note], tasks, tokenizer, settings)
        except OSError:
            if not is_prepared(out):
                raise
            return read_manifest(out)  # another share ended at the same moment and was faster


def prepared(paths: Sequence[str | Path], cache: Path, *, tokenizer: Tokenizer, settings: Settings) -> Path:
    """Return a folder of token shards for `paths`, prepared at most once for the same files, tokenizer and settings.

    A single path that is prepared already is returned as it is. Files count as the same by path, size and time of
    change.
    """
    if len(paths) == 1 and is_prepared(paths[0]):
        return Path(paths[0])
    for path in paths:
        if is_prepared(path):
            raise DataError(f"{path} is prepared already and cannot be mixed with raw files: name it alone.")
    with disk_errors(cache):
        absolute = [os.path.abspath(path) for path in paths]
        tasks = grouped(sources.units(absolute, settings.kind, documents=settings.documents))
        folder = cache / _plan(tasks, tokenizer, settings)["key"][:16]
    if not is_prepared(folder):
        try:
            prepare(absolute, folder, tokenizer=tokenizer, settings=settings)
        except DataError:
            if not is_prepared(folder):  # another process may have been faster
                raise
    return folder


def grouped(units: Sequence[Unit]) -> list[list[Unit]]:
    """Return the units in tasks of about TASK_BYTES, in their order."""
    tasks: list[list[Unit]] = []
    filled = 0
    for unit in units:
        size = (unit.stop if unit.stop is not None else os.path.getsize(unit.path)) - unit.start
        if not tasks or filled + size > TASK_BYTES:
            tasks.append([])
            filled = 0
        tasks[-1].append(unit)
        filled += size
    return tasks


def do_task(
    folder: Path, number: int, units: Sequence[Unit], tokenizer: Tokenizer, settings: Settings
) -> dict[str, Any]:
    """Write one shard and the note that it is done; return the note."""
    names = {word: folder / f"{word}-{number:05d}.npy" for word in ("tokens", "trained", "ends")}
    beside = {word: _beside(path) for word, path in names.items()}
    try:
        note = _written(beside, units, tokenizer, settings)
        for word, path in beside.items():
            if word != "trained" or note["num_trained"] < note["num_tokens"]:
                path.replace(names[word])
    finally:  # a full disk is not filled further
        for path in beside.values():
            path.unlink(missing_ok=True)
    _write_whole(folder / f"task-{number:05d}.json", note)
    return note


def _written(
    beside: dict[str, Path], units: Sequence[Unit], tokenizer: Tokenizer, settings: Settings
) -> dict[str, Any]:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    num_trained = num_bytes = 0
    records = (record for unit in units for record in sources.read(unit))
    check = _Check(tokenizer)
    with (
        ArrayFile(beside["tokens"], dtype) as tokens,
        ArrayFile(beside["trained"], np.dtype(bool)) as trained,
        ArrayFile(beside["ends"], np.dtype(np.int64), (2,)) as ends,
    ):
        for batch in _batches(records):
            rows = encoded(batch, check.tokenizer_for(batch), settings.template)
            end = tokens.num_rows + np.cumsum([len(ids) for ids, _, _ in rows])
            ends.append(np.stack([end, [size for _, _, size in rows]], axis=1))
            tokens.append(np.concatenate([ids for ids, _, _ in rows]))
            learned = np.concatenate([np.ones(len(ids), bool) if mask is None else mask for ids, mask, _ in rows])
            trained.append(learned)
            num_trained += int(learned.sum())
            num_bytes += sum(size for _, _, size in rows)
    return {
        "num_tokens": tokens.num_rows,
        "num_documents": ends.num_rows,
        "num_bytes": num_bytes,
        "num_trained": num_trained,
        "encoder": check.word,
    }


def encoded(
    batch: Sequence[Record], tokenizer: Tokenizer, template: str | None
) -> list[tuple[np.ndarray, np.ndarray | None, int]]:
    """Return ids, which of them are learned (None: all) and the text's bytes of each record."""
    rows: list[tuple[np.ndarray, np.ndarray | None, int] | None] = [None] * len(batch)
    texts = [(at, record) for at, record in enumerate(batch) if isinstance(record, Text)]
    bos, eos = (np.array([at], np.uint32) for at in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    for (at, record), ids in zip(texts, tokenizer.encode_arrays([text.text for _, text in texts]), strict=True):
        rows[at] = np.concatenate([bos, ids, eos]), None, _size(record.text)
    chats = [(at, record) for at, record in enumerate(batch) if isinstance(record, Chat)]
    if chats:
        named = chat.load_template(template or "auto", tokenizer)
        rendered = chat.render_batch([record for _, record in chats], named, tokenizer)
        for (at, record), one in zip(chats, rendered, strict=True):
            rows[at] = one.ids, one.trained, sum(_size(message.content) for message in record.messages)
    for at, record in enumerate(batch):
        if isinstance(record, Tokens):
            require_known(record, tokenizer)
            rows[at] = record.ids, record.trained, 0
    return [row for row in rows if row is not None]


def require_known(record: Tokens, tokenizer: Tokenizer) -> None:
    """Raise DataError for tokens that are none of the tokenizer's."""
    least, most = int(record.ids.min(initial=0)), int(record.ids.max(initial=0))
    if least < 0 or most >= tokenizer.vocab_size:
        raise DataError(
            f"{record.where}: its tokens go from {least} to {most}, and tokenizer {tokenizer.name} has 0 to "
            f"{tokenizer.vocab_size - 1}: name the tokenizer that made them."
        )


class _Check:
    """Which encoder a task uses: the fast one while it gives the same ids for the task's own first texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._left = tokenizer, _CHECKED_CHARS
        self.word = "gigatoken" if tokenizer.is_fast else "tokenizers"

    def tokenizer_for(self, batch: Sequence[Record]) -> Tokenizer:
        """Return the tokenizer for a batch, having looked at some of it."""
        if self.word == "gigatoken" and self._left > 0:
            texts = [text[: self._left] for record in batch for text in _texts(record)][:64]
            self._left -= sum(map(len, texts))
            if not self._tokenizer.agrees(texts):
                self.word = "tokenizers"
        return self._tokenizer if self.word == "gigatoken" or not self._tokenizer.is_fast else self._tokenizer.slow()


def _texts(record: Record) -> Iterator[str]:
    if isinstance(record, Text):
        yield record.text
    elif isinstance(record, Chat):
        yield from (message.content for message in record.messages)


def _work(
    folder: Path, todo: Sequence[tuple[int, Sequence[Unit]]], settings: Settings, workers: int | None
) -> Iterator[dict[str, Any]]:
    """Do tasks, in this process or in several, and yield their notes as they are done."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or cores, len(todo))
    size = sum((unit.stop or os.path.getsize(unit.path)) - unit.start for _, units in todo for unit in units)
    if count <= 1 or (workers is None and size < _SMALL_BYTES):
        tokenizer = _of(folder)
        for number, units in todo:
            yield do_task(folder, number, units, tokenizer, settings)
        return
    import multiprocessing

    # Not fork: whoever calls may have threads, and the tokenizer's own pool does not survive one. Not Pool, which waits
    # for ever for what a killed process had begun.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, _start, (folder, settings))
    try:
        for ended in as_completed([pool.submit(_do, task) for task in todo]):
            yield ended.result()
    except BrokenProcessPool:
        raise OutOfMemory(
            "a process that prepared data was ended from outside, as a system short of memory does: give the same "
            "command again, which goes on from there, with fewer --workers (from Python, call prepare under "
            'if __name__ == "__main__":).'
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}


def _start(folder: Path, settings: Settings) -> None:
    _worker.update(folder=folder, settings=settings, tokenizer=_of(folder))


def _do(task: tuple[int, Sequence[Unit]]) -> dict[str, Any]:
    number, units = task
    return do_task(_worker["folder"], number, units, _worker["tokenizer"], _worker["settings"])


def _of(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder / "tokenizer")
    tokenizer.name = (_read_json(folder / "plan.json") or {}).get("tokenizer", tokenizer.name)  # what errors call it
    tokenizer.hurry()
    return tokenizer


def _plan(tasks: Sequence[Sequence[Unit]], tokenizer: Tokenizer, settings: Settings) -> dict[str, Any]:
    """Return what a partial folder must be of to be gone on with."""
    seen = [
        [*dataclasses.astuple(unit), os.path.getsize(unit.path), os.stat(unit.path).st_mtime_ns]
        for units in tasks
        for unit in units
    ]
    spec = hashlib.sha256(tokenizer.spec).hexdigest()  # its rules as well, where `sha256` is of its pieces
    made_of = [FORMAT, TASK_BYTES, tokenizer.sha256, spec, tokenizer.bos_token_id, tokenizer.eos_token_id, seen]
    text = json.dumps([made_of, _settled(settings, tokenizer)])
    key = hashlib.sha256(text.encode()).hexdigest()
    return {"key": key, "num_tasks": len(tasks), "tokenizer": tokenizer.name}


def _settled(settings: Settings, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings as the manifest has them, the template's SHA-256 with them."""
    try:
        print_ = chat.fingerprint(chat.load_template(settings.template or "auto", tokenizer), tokenizer)
    except DataError:
        if settings.template not in (None, "auto"):
            raise
        print_ = None  # a tokenizer's own template that cannot be used, which texts do not need
    return {**dataclasses.asdict(settings), "template_sha256": print_}


def _begin(partial: Path, plan: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Make the partial folder, or check that the one that is there is of the same plan."""
    partial.mkdir(parents=True, exist_ok=True)
    found = _read_json(partial / "plan.json")
    if found is None:
        saved = _beside(partial / "tokenizer")
        tokenizer.save(saved)
        try:
            saved.replace(partial / "tokenizer")
        except OSError:  # another share was here first
            shutil.rmtree(saved)
        _write_whole(partial / "plan.json", plan)
    elif found != plan:
        raise DataError(
            f"{partial} holds the beginning of another preparation (other sources, tokenizer or settings): "
            "remove it, or finish that one first."
        )


def _finished(
    partial: Path,
    out: Path,
    notes: Sequence[dict[str, Any]],
    tasks: Sequence[Sequence[Unit]],
    tokenizer: Tokenizer,
    settings: Settings,
) -> Manifest:
    """Put the shards together under the folder's own name; another process may have been faster."""
    if not any(note["num_documents"] for note in notes):
        names = sorted({unit.path for units in tasks for unit in units})
        shutil.rmtree(partial, ignore_errors=True)
        few = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more" if names else "the sources"
        raise DataError(f"{few}: there is no text in it, so there is nothing to prepare: name other files.")
    files, before = [], 0
    beside = _beside(partial / "documents.npy")
    with ArrayFile(beside, np.dtype(np.int64), (2,)) as documents:
        for number, note in enumerate(notes):
            ends = np.load(partial / f"ends-{number:05d}.npy", mmap_mode="r")
            documents.append(ends + np.array([[before, 0]]))
            before += note["num_tokens"]
            if note["num_tokens"]:
                counts = {name: note[name] for name in ("num_tokens", "num_trained")}
                files.append({"name": f"tokens-{number:05d}.npy", **counts})
    beside.replace(partial / "documents.npy")
    manifest = Manifest(
        format=FORMAT,
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        unk_token_id=tokenizer.unk_token_id,
        dtype=str(np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)),
        num_tokens=before,
        num_documents=sum(note["num_documents"] for note in notes),
        num_bytes=sum(note["num_bytes"] for note in notes),
        num_trained=sum(note["num_trained"] for note in notes),
        encoder="gigatoken" if all(note["encoder"] == "gigatoken" for note in notes) else "tokenizers",
        settings=_settled(settings, tokenizer),
        files=files,
        sources=_checksums(sorted({unit.path for units in tasks for unit in units})),
    )
    write_manifest(partial, manifest)
    os.replace(partial, out)
    _clear_up(out, manifest)
    return manifest


def _clear_up(out: Path, manifest: Manifest) -> None:
    """Remove what only a partial folder needs: afterwards, so that one that is killed before can be gone on with."""
    kept = {"manifest.json", "documents.npy"}
    for file in manifest.files:
        kept |= {file["name"], file["name"].replace("tokens", "trained")}
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in kept:
            path.unlink(missing_ok=True)


def _checksums(paths: Sequence[str]) -> list[dict[str, Any]]:
    def one(path: str) -> dict[str, Any]:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"path": path, "num_bytes": file.tell(), "sha256": digest}

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, paths))


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    num_chars = 0
    for record in records:
        batch.append(record)
        num_chars += len(record.ids) if isinstance(record, Tokens) else sum(map(len, _texts(record)))
        if num_chars >= _BATCH_CHARS or len(batch) >= _BATCH_RECORDS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _note(folder: Path, number: int) -> dict[str, Any] | None:
    return _read_json(folder / f"task-{number:05d}.json")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _beside(path: Path) -> Path:
    """Return where a file is written before it has its name; no two processes on any machines share one."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.writing")


def _write_whole(path: Path, content: dict[str, Any]) -> None:
    beside = _beside(path)
    beside.write_text(json.dumps(content), "utf-8")
    beside.replace(path)


def refuse_taken(out: Path) -> None:
    """Raise DataError for a target that holds something."""
    if is_prepared(out):
        raise DataError(f"{out} already holds prepared data: choose another folder, or remove this one.")
    with disk_errors(out):
        if (out.exists() or out.is_symlink()) and not (out.is_dir() and not any(out.iterdir())):
            raise DataError(f"{out} exists and is not an empty folder: choose a new one for the data.")


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turn what the operating system says of writing to `out` into a sentence."""
    try:
        yield
    except Error:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutOfMemory(
                f"the disk is full: make room (4 to 6 bytes for each 10 bytes of text) and give the same command "
                f"again, or choose a folder on another disk and remove .{out.name}.partial."
            ) from None
        raise DataError(
            f"{out} cannot be prepared ({error.strerror or error}: {error.filename or out}): change the "
            "permissions or choose another folder."
        ) from None
