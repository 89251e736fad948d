"""Damage checkpoints of every format where they say what they hold, and open them: refused, read, or a failure.

    python benchmarks/fuzz_readers.py            # 10,000 mutations a reader
    python benchmarks/fuzz_readers.py --quick    # 300
    python benchmarks/fuzz_readers.py --reader dcp --index 4711    # one again, with its traceback

A mutation must be answered with a WeightsError of one line or with a model that is read whole. One whose settings and
bits are the original's is read correctly. With other settings or values it counts as explained only if every tensor has
the shape that the settings give it, every slice is a slice of its tensor, and every row of values stands in the
damaged files' bytes; what is left is a failure, and so are other exceptions, crashes, 5 seconds without an answer, and
memory: the processes may grow by 64 MiB alone (RLIMIT_AS), and a single mutation by the files' size and 4 MiB.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import faulthandler
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from _fuzz_files import SAMPLES, Sample
from _mutations import Mutation, mutate
from torch import Tensor

from ostro import config
from ostro.errors import WeightsError
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights import Hints, Reader, open_reader
from ostro.weights.store import Where, as_bytes, same_bits
from ostro.weights.stored import StoredReader

REFUSED, CORRECT, EXPLAINED, FAILED = "refused", "read correctly", "read otherwise, explained", "failures"
OUTCOMES = (REFUSED, CORRECT, EXPLAINED, FAILED)
HEADROOM_BYTES = 64 << 20  # of a process, over what it has before the first mutation
GROWTH_BYTES = 4 << 20  # of a single mutation, over the size of the files: Python's own arenas
BATCH = 500
_MAX_MESSAGE = 4000
_MAX_STEP = 200
_MAX_RUNS, _RUN_BYTES = 4, 8  # of a row that ranks had cut; more or shorter ones could be found anywhere

Open = Callable[[Path, Hints], Reader]


class Slow(BaseException):
    """No answer in time; no reader may catch it."""


@dataclasses.dataclass(frozen=True)
class Original:
    """What an unchanged checkpoint is read as."""

    model: ModelConfig
    tensors: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader under test: its checkpoint, and how it is opened."""

    name: str
    sample: Sample
    open: Open = open_reader
    seconds: float = 5.0
    seed: int = 0

    def mutation(self, index: int) -> Mutation:
        return mutate(self.sample.files, Random(f"{self.seed}/{self.name}/{index}"))


class Wrong(Exception):
    """A checkpoint was read as what it cannot be."""


# One mutation


def read_all(reader: Reader) -> dict[str, Tensor]:
    """Read every parameter whole and in slices; Wrong unless names, shapes and slices are what they have to be."""
    infos = reader.names()
    table = layout.table(reader.model)
    if list(infos) != list(table):
        raise Wrong("its names are not the model's")
    found = {}
    for name, parameter in table.items():
        tensor = reader.read(name)
        if not tuple(tensor.shape) == infos[name].shape == parameter.shape or tensor.dtype != infos[name].dtype:
            raise Wrong(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, the model's {parameter.shape}")
        for where in _slices(parameter.shape):
            if not same_bits(reader.read(name, where), tensor[where]):
                raise Wrong(f"{name}[{where}] is not a slice of it")
        found[name] = tensor
    return found


def _slices(shape: tuple[int, ...]) -> Iterator[Where]:
    yield (shape[0] - 1,)
    yield (slice(0, shape[0], 2),)
    if len(shape) > 1:
        yield (*(0 for _ in shape[:-2]), slice(1, max(1, shape[-2] - 1)), slice(1, shape[-1]))


def judge(target: Target, original: Original, files: dict[str, bytes], folder: Path) -> tuple[str, str]:
    """Open and read what lies in a folder; return the outcome, and what there is to say about it."""
    before = _peak_bytes()
    answer = _answer(target, folder)
    grown = _peak_bytes() - before
    if grown > GROWTH_BYTES + sum(map(len, files.values())):
        return FAILED, f"it took {grown >> 20} MiB"
    if isinstance(answer, WeightsError):
        return _refused(answer)
    model, found = answer
    if model == original.model and all(same_bits(found[name], original.tensors[name]) for name in found):
        return CORRECT, ""
    return EXPLAINED, _explained(found, original, files)


def _answer(target: Target, folder: Path) -> tuple[ModelConfig, dict[str, Tensor]] | WeightsError:
    """Return what a folder is read as, in time."""
    signal.setitimer(signal.ITIMER_REAL, target.seconds)
    try:
        reader = target.open(folder / target.sample.path, target.sample.hints)
        found = read_all(reader)
        if isinstance(reader, StoredReader):
            try:
                reader.certify()  # may still refuse what was read, in a sentence; opening does not ask for it
            except WeightsError as error:
                if _refused(error)[0] == FAILED:
                    return error
    except WeightsError as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return reader.model, found


def _refused(error: WeightsError) -> tuple[str, str]:
    message = str(error)
    cause: BaseException | None = error
    while cause is not None:
        is_memory = isinstance(cause, MemoryError) or getattr(cause, "errno", None) == errno.ENOMEM
        if is_memory or "allocate" in str(cause):
            return FAILED, f"memory was asked for, then refused: {message}"
        cause = cause.__cause__ or cause.__context__
    if not message.isprintable() or len(message) > _MAX_MESSAGE or message[-1:] not in (".", "?"):
        return FAILED, f"no sentence to print: {message[:500]!r}"
    return REFUSED, message


def _explained(found: dict[str, Tensor], original: Original, files: dict[str, bytes]) -> str:
    """Return which tensors differ; Wrong for one whose values are not the files'."""
    changed = [
        name
        for name, tensor in found.items()
        if name not in original.tensors or not same_bits(tensor, original.tensors[name])
    ]
    blocks: list[set[bytes]] = []
    everything = list(files.values())
    strided = [data for name, data in files.items() if name.endswith((".bin", ".pth"))]
    for name in changed:
        if not (
            _is_in(found[name], everything)
            or _is_strided(found[name], strided)
            or _is_dequantised(found[name], everything, blocks)
        ):
            raise Wrong(f"{name} has values that the files have not")
    return f"{len(changed)} tensors, first {changed[0]}" if changed else "other settings"


def _is_in(tensor: Tensor, files: list[bytes]) -> bool:
    """Whether every row, or every column, stands in the files; also as float32 that was narrowed."""
    matrix = tensor if tensor.dim() > 1 else tensor[None]
    for held in (matrix, matrix.transpose(-2, -1)):
        for dtype in {tensor.dtype, torch.float32}:
            data = bytes(as_bytes(held.to(dtype)))
            size = held.shape[-1] * dtype.itemsize
            if all(_in_runs(data[at : at + size], files) for at in range(0, len(data), size)):
                return True
    return False


def _in_runs(row: bytes, files: list[bytes]) -> bool:
    """Whether a row is made of few runs of bytes that are in the files: records cut it once, ranks several times."""
    runs: list[int] = []
    while row:
        found, missing = 0, len(row) + 1
        while missing - found > 1:  # the longest beginning that is there
            middle = (found + missing) // 2
            if any(row[:middle] in file for file in files):
                found = middle
            else:
                missing = middle
        runs.append(found)
        row = row[found:]
        if not found or (len(runs) > 2 and min(runs) < _RUN_BYTES) or len(runs) > _MAX_RUNS:
            return False
    return True


def _is_strided(tensor: Tensor, files: list[bytes]) -> bool:
    """Whether every row stands in the files with equal steps between its items, as PyTorch's may."""
    rows = tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32).numpy()
    return all(any(_steps_through(row, data) for data in files) for row in rows.reshape(-1, rows.shape[-1]))


def _steps_through(row: np.ndarray, data: bytes) -> bool:
    for shift in range(row.itemsize):
        items = np.frombuffer(data, row.dtype, (len(data) - shift) // row.itemsize, shift)
        starts = np.flatnonzero(items == row[0])
        for step in range(_MAX_STEP):
            places = starts[:, None] + step * np.arange(len(row))
            places = places[places[:, -1] < len(items)]
            if (items[places] == row).all(1).any():
                return True
    return False


def _is_dequantised(tensor: Tensor, files: list[bytes], blocks: list[set[bytes]]) -> bool:
    """Whether every 32 values are those of a block of Q8_0 somewhere in a file, the slow way; `blocks` keeps them."""
    if tensor.dtype != torch.float32 or tensor.shape[-1] % 32:
        return False
    if not blocks:
        with np.errstate(all="ignore"):
            for data in files:
                window = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), 34)
                scales = np.ascontiguousarray(window[:, :2]).view(np.float16).astype(np.float32)
                values = np.ascontiguousarray(window[:, 2:]).view(np.int8).astype(np.float32) * scales
                blocks.append({row.tobytes() for row in values})
    rows = tensor.reshape(-1, 32).numpy()
    return all(any(row.tobytes() in known for known in blocks) for row in rows)


# Many of them, in processes of their own


def _peak_bytes() -> int:
    """Return the most address space this process ever had; 0 where the system does not tell."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(text.partition("VmPeak:")[2].split()[0]) << 10


def _write(folder: Path, changed: dict[str, bytes | None]) -> None:
    for name, data in changed.items():
        path = folder / name
        path.unlink(missing_ok=True)  # a new file: an old one may still be mapped
        if data is not None:
            path.write_bytes(data)


def _lay_out(sample: Sample, folder: Path) -> None:
    whole = sample.others | {name: file.data for name, file in sample.files.items()}
    for name, data in whole.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def original_of(target: Target, folder: Path) -> Original:
    """Read the sound checkpoint, and prepare all that is loaded late; what is kept is a copy."""
    _lay_out(target.sample, folder)
    for name in config.preset_names():
        config.preset(name)
    reader = target.open(folder / target.sample.path, target.sample.hints)
    tensors = {name: tensor.clone() for name, tensor in read_all(reader).items()}
    _is_in(next(iter(tensors.values())), [b""])
    return Original(reader.model, tensors)


def run_one(target: Target, original: Original, folder: Path, index: int) -> dict[str, Any]:
    """Try one mutation; its index, outcome, and what was done and said."""
    mutation = target.mutation(index)
    _write(folder, mutation.changed)
    whole = target.sample.others | {name: file.data for name, file in target.sample.files.items()}
    files = {name: data for name, data in (whole | mutation.changed).items() if data is not None}
    try:
        outcome, said = judge(target, original, files, folder)
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        outcome, said = FAILED, f"{type(error).__name__}: {str(error)[:300]} ({where})"
    _write(folder, {name: target.sample.files[name].data for name in mutation.changed})
    return {"index": index, "outcome": outcome, "what": mutation.what, "said": said}


def _child(target: Target, indexes: range, folder: Path, write: Callable[[str], None]) -> None:
    """Try mutations under a memory limit, and write a line on each."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # What torch leaves uninitialised would hold the right values of the mutation before.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True

    def stop(*_: object) -> None:
        raise Slow(f"no answer in {target.seconds} s")

    signal.signal(signal.SIGALRM, stop)
    original = original_of(target, folder)
    if sys.platform == "linux":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + HEADROOM_BYTES, resource.RLIM_INFINITY))
    for index in indexes:
        write(json.dumps(run_one(target, original, folder, index)) + "\n")


def _forked(target: Target, indexes: range) -> Iterator[dict[str, Any]]:
    """Yield the results of a batch from a process of its own; the last one is missing if it died over it."""
    with tempfile.TemporaryDirectory(prefix="ostro-fuzz-") as folder:
        reading, writing = os.pipe()
        process = os.fork()
        if not process:
            os.close(reading)
            try:
                faulthandler.disable()
                _child(target, indexes, Path(folder), lambda line: os.write(writing, line.encode()) and None)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as lines:
            # A process that no signal stops, in a loop of C's, is ended from here.
            while select.select([lines], [], [], 4 * target.seconds + 20)[0] and (line := lines.readline()):
                yield json.loads(line)
        try:
            os.kill(process, signal.SIGKILL)
        finally:
            os.waitpid(process, 0)


def run_batch(target: Target, indexes: range) -> list[dict[str, Any]]:
    """Try mutations in as many processes as it takes; one over which a process dies is a failure."""
    results: list[dict[str, Any]] = []
    while len(results) < len(indexes):
        rest = indexes[len(results) :]
        found = list(_forked(target, rest))
        results += found
        if len(found) < len(rest):
            what = target.mutation(rest[len(found)]).what
            results.append({"index": rest[len(found)], "outcome": FAILED, "what": what, "said": "the process died"})
    return results


def make_target(name: str, seed: int = 0) -> Target:
    """Write a reader's checkpoint and describe it."""
    with tempfile.TemporaryDirectory(prefix="ostro-fuzz-") as folder:
        return Target(name, SAMPLES[name](Path(folder)), seed=seed)


def fuzz(target: Target, num_mutations: int, jobs: int = 1) -> list[dict[str, Any]]:
    """Return the results of a number of mutations, by their index."""
    batches = [range(start, min(start + BATCH, num_mutations)) for start in range(0, num_mutations, BATCH)]
    with ThreadPoolExecutor(jobs) as pool:
        return [result for batch in pool.map(lambda batch: run_batch(target, batch), batches) for result in batch]


def row(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of a reader."""
    counts = {outcome: sum(result["outcome"] == outcome for result in results) for outcome in OUTCOMES}
    return {"reader": name, "mutations": len(results), **counts}


def show_one(target: Target, index: int) -> None:
    """Try one mutation in this process, without limits, and print what happens."""
    with tempfile.TemporaryDirectory(prefix="ostro-fuzz-") as folder:
        original = original_of(target, Path(folder))
        mutation = target.mutation(index)
        _write(Path(folder), mutation.changed)
        print(mutation.what)
        files = {name: file.data for name, file in target.sample.files.items()} | mutation.changed
        print(*judge(target, original, {name: data for name, data in files.items() if data is not None}, Path(folder)))


def main() -> int:
    """Print one table; 1 if there was a failure or less than half was refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000, help="a reader")
    parser.add_argument("--quick", action="store_true", help="300 mutations a reader")
    parser.add_argument("--reader", choices=SAMPLES, action="append", help="only this one; may be given again")
    parser.add_argument("--index", type=int, help="try this one mutation and show what happens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write the rows and the failures here too")
    options = parser.parse_args()
    num_mutations = 300 if options.quick else options.mutations
    names = options.reader or list(SAMPLES)
    if options.index is not None:
        show_one(make_target(names[0], options.seed), options.index)
        return 0
    start = time.perf_counter()
    rows, failures = [], []
    print(f"| {' | '.join(('reader', 'mutations', *OUTCOMES))} |\n|---|{'---:|' * 5}", flush=True)
    for name in names:
        results = fuzz(make_target(name, options.seed), num_mutations, options.jobs)
        rows.append(row(name, results))
        found = [{"reader": name, **result} for result in results if result["outcome"] == FAILED]
        failures += found
        counts = " | ".join(f"{value:,}" for value in list(rows[-1].values())[1:])
        print(f"| {name} | {counts} |", flush=True)
        for failure in found[:20]:
            print(*failure.values(), file=sys.stderr, flush=True)
    print(f"\n{time.perf_counter() - start:.0f} s", file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "failures": failures}, indent=1))
    return int(bool(failures) or any(2 * row[REFUSED] < row["mutations"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
