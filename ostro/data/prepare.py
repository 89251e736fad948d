"""From sources to token shards: work is cut into tasks by size alone, tasks are done by processes, each once.

Every task writes one shard under its number and a note that it is done, so a run that was killed goes on with the tasks
that are left, and any number of processes or machines make the same files. The last one to end puts them together.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ostro.data import chat, duplicates, sources, workers
from ostro.data.arrays import ArrayFile
from ostro.data.beside import disk_errors
from ostro.data.records import Unit
from ostro.data.shards import FORMAT, Manifest, is_prepared, read_manifest, write_manifest
from ostro.data.tables import is_hub_id
from ostro.data.tasks import (
    Digest,
    Settings,
    Tokenize,
    Words,
    beside_of,
    note_path,
    read_json,
    sha256_of,
    token_dtype,
    write_whole,
)
from ostro.data.tokenizer import Tokenizer
from ostro.errors import DataError

Report = Callable[[int, int, int], None]
Tasks = Sequence[Sequence[Unit]]

_PLAN = "plan.json"
TASK_BYTES = sources.UNIT_BYTES  # of sources at most, the work of one process at a time and about one shard


@dataclasses.dataclass(frozen=True)
class Hands:
    """Who does the work: `workers` processes (None: one a core), or the Ray cluster at the address `ray`.

    `share` (i, n) does every nth task from the ith on, for a cluster's own scheduler.
    """

    workers: int | None = None
    share: tuple[int, int] = (0, 1)
    ray: str | None = None


_AS_FOUND, _ALONE = Settings(), Hands()


def prepare(
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    tokenizer: Tokenizer,
    settings: Settings = _AS_FOUND,
    hands: Hands = _ALONE,
    report: Report | None = None,
) -> Manifest | None:
    """Turn sources into token shards in the new folder `out`.

    A text becomes BOS, its ids, EOS. Of several shares whoever finishes last returns the manifest, the others None.
    `report` is called with the tokens made and the bytes of the sources done, of how many. The folder appears whole;
    until then `.NAME.partial` beside it holds what is done, and the same call goes on from there; where `out` is what
    the call would make, it is left as it is. Raises DataError for sources that cannot be used, nothing to prepare, an
    `out` that is taken, or a partial folder of other sources or settings; OutOfMemory for a full disk.
    """
    out = Path(out)
    place = Path(os.path.realpath(out))
    partial = place.with_name(f".{place.name}.partial")
    full = f"(4 to 6 bytes for each 10 bytes of text) and give the same command again, or remove {partial} and choose "
    with disk_errors(out, full=f"make room {full}a folder on another disk"):
        refuse_taken(out)
        files = sources.expand([str(path) for path in paths])
        if is_prepared(out):
            return _the_same(out, _plan(_tasks(files, settings), tokenizer, settings))
        words = Words(partial / f"tokenizer-{tokenizer.fingerprint[:16]}", tokenizer.name)
        num_bytes = sum(path.stat().st_size for path in files)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            words.keep(tokenizer)
            with workers.Crew(hands.workers, hands.ray, num_bytes=num_bytes, warm=words.warm) as crew:
                tasks = _tasks(files, settings)
                job = _Job(partial, place, tasks, tokenizer, settings, words, _plan(tasks, tokenizer, settings))
                return _done(job, hands.share, crew, report)
        except OSError:
            if not is_prepared(out):
                raise
            # Another share ended at the same moment, and put the folder together.
            return _the_same(out, _plan(_tasks(files, settings), tokenizer, settings))
        except DataError:
            if hands.share[1] == 1 and not any(partial.glob("task-*.json")):  # there is nothing to go on with
                shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            words.forget()


@dataclasses.dataclass(frozen=True)
class _Job:
    """One preparation: where it is done, and all that decides what comes out."""

    partial: Path
    out: Path
    tasks: Tasks
    tokenizer: Tokenizer
    settings: Settings
    words: Words
    plan: dict[str, Any]


def _done(job: _Job, share: tuple[int, int], crew: workers.Crew, report: Report | None) -> Manifest | None:
    """Do a share of a preparation, and put the folder together if it is the last."""
    _begin(job.partial, job.plan)
    try:
        if job.settings.dedup:
            _find_repeats(job, crew)
        _make_shards(job, share, crew, report)
        notes = [read_json(note_path(job.partial, number)) for number in range(len(job.tasks))]
        if all(notes):
            return _put_together(job, [note for note in notes if note])
    except DataError as error:
        # If the sources have to change, what was made of them is of no use; if a disk was away, it is.
        if job.partial.exists():
            write_whole(job.partial / _PLAN, job.plan | {"refused": str(error)})
        raise
    if not is_prepared(job.out):
        return None
    shutil.rmtree(job.partial, ignore_errors=True)  # made anew by a share that came late
    return _the_same(job.out, job.plan)


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
        absolute = [path if is_hub_id(str(path)) else os.path.abspath(path) for path in paths]
        files = sources.expand(absolute)
        folder = cache / _plan(_tasks(files, settings), tokenizer, settings)["key"][:16]
    if not is_prepared(folder):
        try:
            prepare(absolute, folder, tokenizer=tokenizer, settings=settings)
        except DataError:
            if not is_prepared(folder):  # another process may have been faster
                raise
    return folder


def is_of_template(manifest: Manifest, template: str, tokenizer: Tokenizer) -> bool:
    """Whether the conversations in prepared data, if there are any, were rendered by this template ("auto": any)."""
    is_rendered = manifest.num_trained < manifest.num_tokens  # texts need none, and MindRecord's rows have none
    if template == "auto" or not is_rendered or all(source["kind"] == "mindrecord" for source in manifest.sources):
        return True
    return manifest.settings["template_sha256"] == _settled(Settings(template=template), tokenizer)["template_sha256"]


def grouped(units: Sequence[Unit]) -> list[list[Unit]]:
    """Return the units in tasks of about `sources.unit_bytes_of` all of them, TASK_BYTES at most, in their order."""
    sizes = [workers.size_of(unit) for unit in units]
    most = min(TASK_BYTES, sources.unit_bytes_of(sum(sizes)))
    tasks: list[list[Unit]] = []
    filled = 0
    for unit, size in zip(units, sizes, strict=True):
        if not tasks or filled + size > most:
            tasks.append([])
            filled = 0
        tasks[-1].append(unit)
        filled += size
    return tasks


def refuse_taken(out: Path) -> None:
    """Raise DataError for a target that holds something else than prepared data."""
    if is_prepared(out):
        return
    if (out.exists() or out.is_symlink()) and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} exists and is not an empty folder: choose a new one for the data.")
    if os.path.ismount(out) or (out.exists() and out.samefile(".")):
        raise DataError(f"{out} cannot be replaced as a whole: name a new folder inside it.")


def _the_same(out: Path, plan: dict[str, Any]) -> Manifest:
    """Return the manifest of what was prepared before, if it is what would be prepared now."""
    manifest = read_manifest(out)
    if manifest.key == plan["key"]:
        _clear_up(out, manifest)  # what was killed may have left it to others
    else:
        raise DataError(
            f"{out} already holds prepared data, of other or changed sources, tokenizer or settings: choose another "
            "folder, or remove this one."
        )
    return manifest


def _plan(tasks: Tasks, tokenizer: Tokenizer, settings: Settings) -> dict[str, Any]:
    """Return what a folder must be of to be gone on with."""
    seen = []
    for unit in (unit for units in tasks for unit in units):
        seen.append([os.path.abspath(unit.path), unit.kind, unit.start, unit.stop, unit.first])
        for path in sources.files_of(unit):
            found = os.stat(path)
            seen[-1] += [found.st_size, found.st_mtime_ns]
    made_of = [FORMAT, TASK_BYTES, tokenizer.fingerprint, seen]
    text = json.dumps([made_of, _settled(settings, tokenizer)])
    key = hashlib.sha256(text.encode()).hexdigest()
    return {"key": key, "num_tasks": len(tasks)}


def _tasks(files: Sequence[Path], settings: Settings) -> list[list[Unit]]:
    return grouped(sources.units_of(files, settings.kind, documents=settings.documents))


def _settled(settings: Settings, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings as the manifest has them, the template's SHA-256 with them."""
    try:
        print_ = chat.fingerprint(chat.load_template(settings.template or "auto", tokenizer), tokenizer)
    except DataError:
        if settings.template not in (None, "auto"):
            raise
        print_ = None  # a tokenizer's own template that cannot be used, which texts do not need
    return {**dataclasses.asdict(settings), "template_sha256": print_}


def _begin(partial: Path, plan: dict[str, Any]) -> None:
    """Write down in the partial folder what it is of, or check that it is of the same."""
    found = read_json(partial / _PLAN)
    is_same = found is not None and found["key"] == plan["key"]
    if found is not None and not is_same and "refused" in found:  # the sources have changed, as they had to
        for path in partial.iterdir():
            if path.is_file():
                path.unlink(missing_ok=True)
        found = None
    if found is None:
        write_whole(partial / _PLAN, plan)
    elif not is_same:
        raise DataError(
            f"{partial} holds the beginning of another preparation (other sources, tokenizer or settings): "
            "remove it, or finish that one first."
        )


def _find_repeats(job: _Job, crew: workers.Crew) -> None:
    """Mark the records that equal an earlier one. Every share does all of it: reading is a small part of the work."""
    numbers = range(len(job.tasks))
    marks = [duplicates.repeats_path(job.partial, number) for number in numbers]
    if all(path.exists() for path in marks):
        return
    paths = [duplicates.digests_path(job.partial, number) for number in numbers]
    for _ in crew.done(Digest(job.partial), [(n, job.tasks[n]) for n in numbers if not paths[n].exists()]):
        pass
    masks = [np.zeros(len(np.load(path, mmap_mode="r")), bool) for path in paths]
    for number, places in duplicates.repeated(paths):
        masks[number][places] = True
    for final, mask in zip(marks, masks, strict=True):
        beside = beside_of(final)
        with ArrayFile(beside, mask.dtype) as file:
            file.append(mask)
        beside.replace(final)


def _make_shards(job: _Job, share: tuple[int, int], crew: workers.Crew, report: Report | None) -> None:
    """Do this share's tasks that are not done."""
    sizes = [sum(map(workers.size_of, units)) for units in job.tasks]
    mine = range(share[0], len(job.tasks), share[1])
    left = [(number, job.tasks[number]) for number in mine if not read_json(note_path(job.partial, number))]
    num_tokens, num_bytes, total = 0, 0, sum(sizes[number] for number, _ in left)
    if report:
        report(0, 0, total)  # from here on the time counts
    for number, note in crew.done(Tokenize(job.partial, job.words, job.settings), left):
        num_tokens += note["num_tokens"]
        num_bytes += sizes[number]
        if report:
            report(num_tokens, num_bytes, total)


def _put_together(job: _Job, notes: Sequence[dict[str, Any]]) -> Manifest:
    """Give the finished shards a manifest and the folder its name."""
    partial, tasks, tokenizer, settings = job.partial, job.tasks, job.tokenizer, job.settings
    paths = sorted({unit.path for units in tasks for unit in units})
    if not any(note["num_documents"] for note in notes):
        shutil.rmtree(partial)
        few = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        raise DataError(f"{few}: there is no text in it, so there is nothing to prepare: name other files.")
    files, before, num_repeats = [], 0, 0
    beside = beside_of(partial / "documents.npy")
    with ArrayFile(beside, np.dtype(np.int64), (2,)) as documents:
        for number, note in enumerate(notes):
            ends = np.load(partial / f"ends-{number:05d}.npy", mmap_mode="r")
            documents.append(ends + np.array([[before, 0]]))
            before += note["num_tokens"]
            if note["num_tokens"]:
                counts = {name: note[name] for name in ("num_tokens", "num_trained")}
                files.append({"name": f"tokens-{number:05d}.npy", **counts})
            if settings.dedup:
                num_repeats += int(np.load(duplicates.repeats_path(partial, number)).sum())
    beside.replace(partial / "documents.npy")
    manifest = Manifest(
        format=FORMAT,
        key=job.plan["key"],
        tokenizer=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        unk_token_id=tokenizer.unk_token_id,
        dtype=str(token_dtype(tokenizer)),
        num_tokens=before,
        num_documents=sum(note["num_documents"] for note in notes),
        num_bytes=sum(note["num_bytes"] for note in notes),
        num_trained=sum(note["num_trained"] for note in notes),
        num_unlearned=sum(note["num_unlearned"] for note in notes),
        num_repeats=num_repeats,
        encoder="gigatoken" if all(note["encoder"] == "gigatoken" for note in notes) else "tokenizers",
        settings=_settled(settings, tokenizer),
        files=files,
        sources=_sources(tasks, notes),
    )
    write_manifest(partial, manifest)
    os.replace(partial, job.out)
    _clear_up(job.out, manifest)
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


def _sources(tasks: Tasks, notes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return path, kind, bytes and SHA-256 of each file; a file that several tasks have read is read once more."""
    found: dict[str, tuple[str, str | None]] = {}
    for units, note in zip(tasks, notes, strict=True):
        for unit, digest in zip(units, note["sha256"], strict=True):
            found |= dict.fromkeys(sources.files_of(unit), (unit.kind, None))
            found[unit.path] = unit.kind, digest
    left = [path for path, (_, digest) in found.items() if digest is None]
    with ThreadPoolExecutor() as pool:
        again = dict(zip(left, pool.map(sha256_of, left), strict=True))
    return [
        {"path": path, "kind": kind, "num_bytes": os.path.getsize(path), "sha256": digest or again[path]}
        for path, (kind, digest) in sorted(found.items())
    ]
