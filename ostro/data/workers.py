"""Who does the tasks of a preparation: this process, processes beside it, or a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from ostro.data.records import Unit
from ostro.errors import ConfigError, Error, OutOfMemory

Result = TypeVar("Result")
Task = Callable[[int, Sequence[Unit]], Result]
Numbered = Sequence[tuple[int, Sequence[Unit]]]

_SMALL_BYTES = 8 << 20  # what is done before another process has started


class Crew:
    """Does tasks, in any order; a context, whose processes begin when it is entered and are gone when it is left.

    `workers` None is one process a core, and this process alone where there are few `num_bytes` to read; `ray` is the
    address of a cluster that does the tasks instead. `warm` is what a process does first.
    """

    def __init__(
        self, workers: int | None = None, ray: str | None = None, *, num_bytes: int, warm: Callable[[], None]
    ) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        is_little = workers is None and num_bytes < _SMALL_BYTES
        self._count = 1 if is_little else workers or cores
        self._ray, self._warm = ray, warm
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Crew:
        if self._count > 1 and self._ray is None:
            # Not fork, which the thread pools of the tokenizers do not survive: it was tried, and hung. Not Pool, which
            # waits for ever for what a killed process had begun.
            self._pool = ProcessPoolExecutor(self._count, multiprocessing.get_context("spawn"), initializer=_begin)
            with _uninterrupted():  # which processes inherit
                for _ in range(self._count):
                    self._pool.submit(self._warm)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def done(self, task: Task[Result], tasks: Numbered) -> Iterator[tuple[int, Result]]:
        """Do a task for each number and its units; yield the number and the result whenever one is done.

        Raises what the task raises, OutOfMemory where a process was killed, ConfigError for a cluster not there.
        """
        if tasks and self._ray is not None:
            yield from _on_ray(task, tasks, self._ray)
        elif self._pool is None or len(tasks) < 2:
            for number, units in tasks:
                yield number, task(number, units)
        else:
            yield from self._shared(self._pool, task, tasks)

    def _shared(self, pool: ProcessPoolExecutor, task: Task[Result], tasks: Numbered) -> Iterator[tuple[int, Result]]:
        try:
            with _uninterrupted():
                started = {pool.submit(task, number, units): number for number, units in tasks}
            for ended in as_completed(started):
                yield started[ended], ended.result()
        except BrokenProcessPool:
            raise _killed('with fewer --workers (from Python, call prepare under if __name__ == "__main__":)') from None


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C, in this thread and for ever in processes that are started meanwhile: it is this one that ends."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    """End this process with the one that started it, however that ends: it would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_it, daemon=True).start()


def size_of(unit: Unit) -> int:
    """Return the bytes that a unit takes in its file."""
    return (unit.stop if unit.stop is not None else os.path.getsize(unit.path)) - unit.start


def _on_ray(task: Task[Result], tasks: Numbered, address: str) -> Iterator[tuple[int, Result]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("--ray needs the package ray: pip install 'ostro[ray]'.") from None
    was_there = ray.is_initialized()
    try:
        _reach(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    except (Exception, SystemExit) as error:  # a connection can fail in many ways
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ConfigError(f"the Ray cluster {address!r} cannot be reached ({reason}): check --ray ADDRESS.") from None
    try:
        yield from _ray_results(ray, task, tasks)
    finally:
        if not was_there:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself finds out after some minutes."""
    found = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if found:
        socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=10).close()


def _ray_results(ray: Any, task: Task[Result], tasks: Numbered) -> Iterator[tuple[int, Result]]:
    remote = ray.remote(_called)
    pending = {remote.remote(task, number, [_absolute(unit) for unit in units]): number for number, units in tasks}
    try:
        while pending:
            (ended,), _ = ray.wait(list(pending), num_returns=1)
            result = ray.get(ended)
            yield pending.pop(ended), result
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (Error, OSError)):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise _killed(f"on a cluster that has more of it ({reason})") from None
    finally:
        for left in pending:
            ray.cancel(left)
        ray.wait(list(pending), num_returns=len(pending)) if pending else None


def _called(task: Task[Result], number: int, units: Sequence[Unit]) -> Result:
    return task(number, units)


def _absolute(unit: Unit) -> Unit:
    return dataclasses.replace(unit, path=os.path.abspath(unit.path))


def _killed(how: str) -> OutOfMemory:
    return OutOfMemory(
        "a process that prepared data was ended from outside, as a system short of memory does: give the same command "
        f"again, which goes on from there, {how}."
    )
