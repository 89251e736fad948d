"""One process of a job: how it finds the others, and what it says when one of them does not come.

`join` reads what torchrun, our launcher or Slurm's srun left in the environment. A collective that waits too long, or
whose peer is gone, becomes a sentence in `explained`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import socket
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from ostro import device as devices
from ostro.errors import ConfigError, TrainError
from ostro.machine import usable_cores

# The launcher tells its workers through these.
TIMEOUT_VARIABLE = "OSTRO_TIMEOUT_SECONDS"
LOG_DIR_VARIABLE = "OSTRO_LOG_DIR"
LAUNCHER_VARIABLE = "OSTRO_LAUNCHER_PID"
DEFAULT_TIMEOUT_SECONDS = 600.0

# What gloo and the sockets below it say when the other end is gone, also in a log that another program wrote.
LOST = re.compile(
    r"connection closed by peer|connection reset|broken pipe|connection was reset|lost its connection|"
    r"connection refused|remote process exited|failed to recv, got 0 bytes",
    re.IGNORECASE,
)
_TIMED_OUT = re.compile(r"timed out waiting|timed out after|wait timeout|watchdog caught", re.IGNORECASE)
_RECORDED_COLLECTIVES = "2000"
_OTHERS_SECONDS = 3.0  # between the first rank whose wait is over and the last that began to wait in the same step
_MAX_STEP = 0xFFFFFFF0  # above are Slurm's names for steps that are no srun: a batch script, an interactive shell


@dataclasses.dataclass(frozen=True)
class Process:
    """Which process of the job this is: of all `world_size`, and of those on this host."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


ALONE = Process(rank=0, world_size=1, local_rank=0, local_world_size=1)


def join(device: torch.device, timeout_seconds: float | None = None) -> Process:
    """Find the other processes of the job and make the default group; without a launcher there is one process and none.

    `timeout_seconds` bounds every wait, of groups made later as well; unless given it is OSTRO_TIMEOUT_SECONDS, or
    600. Raises ConfigError where the environment contradicts itself, TrainError where the others do not come.
    """
    found = _from_torchrun(os.environ) or from_slurm(os.environ)
    if found is None:
        return ALONE
    process, address, port = found
    _end_with_launcher()
    os.environ |= {
        "RANK": str(process.rank),
        "WORLD_SIZE": str(process.world_size),
        "LOCAL_RANK": str(process.local_rank),
        "LOCAL_WORLD_SIZE": str(process.local_world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _RECORDED_COLLECTIVES)
    if process.local_world_size < process.world_size:
        _choose_interface(address)
    devices.select(device, process.local_rank)
    _share_cores(process.local_world_size)
    timeout = datetime.timedelta(seconds=_timeout_seconds(timeout_seconds))
    _set_default_timeout(timeout)
    try:
        dist.init_process_group(devices.backend(device), timeout=timeout)
    except (RuntimeError, ValueError) as error:  # DistStoreError and DistNetworkError are RuntimeErrors
        raise TrainError(
            f"rank {process.rank} waited for all {process.world_size} processes at {address}:{port} and they did not "
            f"meet within {timeout.total_seconds():g} s: {_first_line(error)}"
        ) from error
    return process


def _share_cores(num_local: int) -> None:
    """Take a share of the host's cores: our launcher and torchrun say how many, srun without a binding does not."""
    if "OMP_NUM_THREADS" not in os.environ and usable_cores() == os.cpu_count():
        torch.set_num_threads(max(1, usable_cores() // num_local))


def leave() -> None:
    """Take leave of the other processes; harmless where there are none, and after a failure."""
    if dist.is_initialized():
        # Without this, gloo's threads end a process that failed by abort(), and its exit code is lost.
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


@contextlib.contextmanager
def explained(process: Process) -> Iterator[None]:
    """Turn a collective that waited too long, or whose peer is gone, into a TrainError that names ranks and collective.

    After a wait that was too long the flight recorder's entries are written to `flight-rank{rank}.json` in the
    launcher's log folder.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if process.world_size == 1 or not dist.is_initialized():
            raise
        if LOST.search(text):
            call = _last_call(error)
            _post(process, call)  # gloo closes its connections when a wait is over: that rank asks who else waited
            raise TrainError(
                f"rank {process.rank} lost its connection to another rank in {call.name}: that one ended first, and "
                "its log says why."
            ) from error
        if _TIMED_OUT.search(text):
            raise TrainError(_hang_sentence(process, _last_call(error), text)) from error
        raise


def _from_torchrun(variables: Any) -> tuple[Process, str, int] | None:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not variables.get(name)]
    if "RANK" in missing or "WORLD_SIZE" in missing:  # an address alone is often left in a shell
        return None
    if missing:
        raise ConfigError(f"RANK and WORLD_SIZE are set and {missing[0]} is not: start with torchrun, or unset them.")
    rank, world_size = _number(variables, "RANK"), _number(variables, "WORLD_SIZE")
    local_rank = _number(variables, "LOCAL_RANK") if variables.get("LOCAL_RANK") else rank
    local_size = _number(variables, "LOCAL_WORLD_SIZE") if variables.get("LOCAL_WORLD_SIZE") else world_size
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK={rank} is not one of WORLD_SIZE={world_size}: start with torchrun, or unset both.")
    return (
        Process(rank, world_size, local_rank, local_size),
        variables["MASTER_ADDR"],
        _number(variables, "MASTER_PORT"),
    )


def from_slurm(variables: Any) -> tuple[Process, str, int] | None:
    """Return the process that srun made of this one and where all meet, or None where no srun runs several tasks.

    A batch script and an interactive shell carry SLURM_NTASKS and SLURM_PROCID of the allocation too; only a step of
    srun has SLURM_STEP_NUM_TASKS (srun's manual, "output environment variables").
    """
    if not variables.get("SLURM_PROCID") or not variables.get("SLURM_STEP_NUM_TASKS"):
        return None
    world_size = _number(variables, "SLURM_STEP_NUM_TASKS")
    step = variables.get("SLURM_STEP_ID") or variables.get("SLURM_STEPID") or "0"
    if world_size < 2 or (step.isdigit() and int(step) >= _MAX_STEP):
        return None
    node = _number(variables, "SLURM_NODEID") if variables.get("SLURM_NODEID") else 0
    tasks = variables.get("SLURM_STEP_TASKS_PER_NODE") or variables.get("SLURM_TASKS_PER_NODE") or str(world_size)
    hosts = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST") or ""
    address = variables.get("MASTER_ADDR") or _first_host(hosts)
    if not address:
        raise ConfigError("srun runs several tasks and names no host: set MASTER_ADDR to the host of rank 0.")
    port = _number(variables, "MASTER_PORT") if variables.get("MASTER_PORT") else _port_of(variables, step)
    process = Process(_number(variables, "SLURM_PROCID"), world_size, _number(variables, "SLURM_LOCALID"), 0)
    return dataclasses.replace(process, local_world_size=_tasks_of(tasks, node)), address, port


def _port_of(variables: Any, step: str) -> int:
    """Return a port that all tasks of a step compute alike and other steps seldom share."""
    job = variables.get("SLURM_JOB_ID") or "0"
    return 20000 + (int(job) * 16 + int(step)) % 10000 if job.isdigit() and step.isdigit() else 20000


def _first_host(hosts: str) -> str:
    """Return the first host of Slurm's compressed list: `node[003-006,9],login` begins with node003."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", hosts)
    return "".join(part or "" for part in match.groups()) if match else ""


def _tasks_of(tasks: str, node: int) -> int:
    """Return how many tasks run on a node, of Slurm's `4(x2),3`."""
    counts: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    return counts[node] if node < len(counts) else max(counts, default=1)


def _number(variables: Any, name: str) -> int:
    value = variables.get(name, "")
    if not value.strip().lstrip("-").isdigit():
        raise ConfigError(
            f"{name}={value!r} in the environment is no number: start with torchrun or srun, or unset it."
        )
    return int(value)


def _timeout_seconds(given: float | None) -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = given if given is not None else float(text or DEFAULT_TIMEOUT_SECONDS)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"a wait of {given if given is not None else text!r} seconds is asked for: give more than 0.")
    return seconds


def _set_default_timeout(timeout: datetime.timedelta) -> None:
    """Give groups that are made later, each axis of a mesh among them, the same timeout; theirs would be 30 minutes.

    torch has no public way: it reads these two names when it makes a group. Where they are gone this does nothing.
    """
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        if hasattr(c10d, name):
            setattr(c10d, name, timeout)


def _choose_interface(address: str) -> None:
    """Let gloo use the interface that reaches `address`; it takes what the host's name means, often the loopback."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    import fcntl
    import struct

    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode())
                there = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24])  # SIOCGIFADDR, Linux
                if there == own and name != "lo":
                    os.environ["GLOO_SOCKET_IFNAME"] = name


def _end_with_launcher() -> None:
    """Ask the kernel for SIGTERM when the launcher dies, so that a killed launcher leaves nothing behind (Linux)."""
    launcher = os.environ.get(LAUNCHER_VARIABLE, "")
    if not launcher.isdigit():
        return
    import ctypes
    import signal
    import sys

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != int(launcher):
        raise TrainError("the launcher ended before this process had begun.")


# --- what a process was waiting for


@dataclasses.dataclass(frozen=True)
class _Call:
    """The collective a rank is in: its name, its number within its group, that group's name and ranks."""

    name: str
    number: int | None
    group: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return self.name if self.number is None else f"{self.name} (call {self.number} of {self.group})"


def _last_call(error: BaseException) -> _Call:
    """Return the collective that raised: from the flight recorder, or for sends and receives from the traceback.

    gloo's sends and receives are not recorded, so its last entry would be an older call.
    """
    everyone = tuple(range(dist.get_world_size()))
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame.name for frame in frames if frame.filename.endswith("distributed_c10d.py")]
    names = [name for name in ours if name != "wrapper" and not name.startswith("_")]
    if names and names[-1] in ("send", "recv", "isend", "irecv", "batch_isend_irecv"):
        return _Call(names[-1], None, "", everyone)
    if not names and any("pipelining" in frame.filename for frame in frames):
        return _Call("a pipeline's send or receive", None, "", everyone)
    entries = flight_entries()
    if not entries:
        return _Call(names[-1] if names else "a collective", None, "", everyone)
    last = entries[-1]
    name, description = (*last.get("process_group", ["", ""]), "", "")[:2]
    label = str(last.get("profiling_name", "")).rpartition(":")[2] or "a collective"
    return _Call(label, last.get("collective_seq_id"), description or name, _ranks_of(name) or everyone)


def flight_entries() -> list[dict[str, Any]]:
    """Return the flight recorder's entries, oldest first; empty where this torch has none or records nothing.

    Its dump is private: this is the one place that touches it.
    """
    dump = getattr(getattr(torch._C, "_distributed_c10d", None), "_dump_fr_trace_json", None)
    if dump is None:
        return []
    try:
        return json.loads(dump()).get("entries", [])
    except (RuntimeError, TypeError, ValueError):
        return []


def _ranks_of(group_name: str) -> tuple[int, ...]:
    """Return the ranks of the group torch calls `group_name`; empty where it cannot be asked (it is private)."""
    try:
        group = c10d._resolve_process_group(group_name)  # pyright: ignore[reportArgumentType]
        return tuple(dist.get_process_group_ranks(group))
    except (AttributeError, RuntimeError, ValueError, KeyError, TypeError):
        return ()


def _hang_sentence(process: Process, call: _Call, text: str) -> str:
    """Tell the others where this rank waited, learn who else did, and say who did not come."""
    folder = os.environ.get(LOG_DIR_VARIABLE, "")
    if folder:
        with contextlib.suppress(OSError):
            path = Path(folder) / f"flight-rank{process.rank}.json"
            path.write_text(json.dumps(flight_entries(), indent=1), encoding="utf-8")
    told = _told_by_others(process, call)
    began = f"rank {process.rank} waited {_waited_seconds(text):g} s in {call}"
    absent = [rank for rank in call.ranks if rank != process.rank and rank not in told]
    if absent:
        logs = " and ".join(str(Path(folder) / f"rank{rank}.log") for rank in absent[:2])
        who = f"rank {absent[0]}" if len(absent) == 1 else f"ranks {', '.join(map(str, absent))}"
        return f"{began}: {who} did not come{f'; see {logs}' if folder else ''}."
    elsewhere = [f"rank {rank} waited in {told[rank]}" for rank in call.ranks if told.get(rank, str(call)) != str(call)]
    if elsewhere:
        return f"{began}: {', '.join(elsewhere[:4])}; ranks must make the same calls in the same order."
    return f"{began}: all its ranks came, so it is the network between their hosts that does not carry."


def _waited_seconds(text: str) -> float:
    match = re.search(r"(\d+) ?ms", text)  # gloo says how long that was; groups may differ
    if match:
        return int(match[1]) / 1000
    timeout = getattr(c10d, "default_pg_timeout", None)
    return timeout.total_seconds() if isinstance(timeout, datetime.timedelta) else DEFAULT_TIMEOUT_SECONDS


def _post(process: Process, call: _Call) -> Any:
    """Write into the job's store where this rank waits; return the store, or None where there is none any more."""
    try:
        store = c10d._get_default_store()
        store.set(f"ostro/waits/{process.rank}", str(call))
    except (AttributeError, RuntimeError):  # no such function in this torch, or the store's host is gone
        return None
    return store


def _told_by_others(process: Process, call: _Call) -> dict[int, str]:
    """Post where this rank waits and return where the ranks of its group do, by rank."""
    told = {process.rank: str(call)}
    store = _post(process, call)
    deadline = time.monotonic() + _OTHERS_SECONDS
    with contextlib.suppress(RuntimeError):
        while store is not None and len(told) < len(call.ranks) and time.monotonic() < deadline:
            for rank in call.ranks:
                if rank not in told and store.check([f"ostro/waits/{rank}"]):
                    told[rank] = store.get(f"ostro/waits/{rank}").decode()
            time.sleep(0.05)
    return told


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
