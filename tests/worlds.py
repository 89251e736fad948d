"""Worlds of real processes on gloo, forked from one that has torch loaded: 16 ranks stand in a fraction of a second.

torchrun needs half a minute for that; it is used where the launcher itself is what a test is about.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT_SECONDS = 120.0


class WorldError(AssertionError):
    """A rank failed or hung; the message holds each failing rank's traceback."""


def run_in_world(
    size: int, rank_main: Callable[..., Any], *args: Any, timeout_seconds: float = _TIMEOUT_SECONDS
) -> list[Any]:
    """Call `rank_main(*args)` on every rank of a new gloo world; return what each rank returned, by rank.

    Results go through torch.save: tensors, numbers, text, dicts and lists of them. When a rank raises or the time is
    over all are killed and WorldError says what happened.
    """
    with tempfile.TemporaryDirectory(prefix="world-") as folder:
        sys.stdout.flush()
        sys.stderr.flush()
        pids = [_fork(rank, size, Path(folder), rank_main, args, timeout_seconds) for rank in range(size)]
        status = _wait(pids, time.monotonic() + timeout_seconds)
        failed = [rank for rank in range(size) if status[rank] != 0]
        if failed:
            told = [(rank, Path(folder, f"{rank}.error")) for rank in failed]
            texts = [f"rank {rank}:\n{path.read_text()}" for rank, path in told if path.exists()]
            raise WorldError(
                "\n".join(texts) or f"ranks {failed} ended with {[status[r] for r in failed]} (−9: killed for its time)"
            )
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(size)]


def _fork(rank: int, size: int, folder: Path, rank_main: Callable[..., Any], args: Any, timeout_seconds: float) -> int:
    with warnings.catch_warnings():  # the parent's other threads are no concern of a child that never meets them
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        store = dist.FileStore(str(folder / "store"), size)
        timeout = datetime.timedelta(seconds=timeout_seconds)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        result = rank_main(*args)
        torch.save(result, folder / f"{rank}.pt")
        dist.barrier()  # nobody leaves while another still talks to it
        status = 0
    except BaseException:  # whatever it was, the parent is to know
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pids: list[int], deadline: float) -> list[int]:
    """Return each process's status; the first failure and the deadline end all others."""
    status: dict[int, int] = {}
    while len(status) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in status:
                done, code = os.waitpid(pid, os.WNOHANG)
                if done:
                    status[rank] = os.waitstatus_to_exitcode(code)
        if any(status.values()) or time.monotonic() > deadline:
            time.sleep(0.2)  # for the others' own tracebacks
            for rank, pid in enumerate(pids):
                if rank not in status:
                    os.kill(pid, signal.SIGKILL)
                    status[rank] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            break
        time.sleep(0.005)
    return [status[rank] for rank in range(len(pids))]
