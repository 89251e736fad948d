"""What a worker calls first: the variables it reads, and the sentences when another rank does not come."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ostro import device as devices
from ostro.errors import ConfigError, Error, LayoutError
from ostro.parallel import process
from ostro.parallel.process import ALONE, Process, explained, from_slurm, join, leave

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OSTRO_")) or name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)


def test_without_a_launcher_there_is_one_process_and_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "left.in.a.shell")
    assert join(torch.device("cpu")) == ALONE
    assert not dist.is_initialized()
    leave()


def test_srun_with_several_tasks() -> None:
    found = from_slurm(SRUN)
    assert found == (
        Process(rank=5, world_size=7, local_rank=1, local_world_size=3),
        "gpu003",
        20000 + 4711 * 16 % 10000,
    )
    assert from_slurm(SRUN | {"SLURM_STEP_ID": "1"}) != found  # two steps of a job at once
    assert from_slurm(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})[1:] == ("10.0.0.1", 1234)  # pyright: ignore


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu003", "gpu003"),
        ("a-1,a-2", "a-1"),
        ("gpu[003-006,9],login", "gpu003"),
        ("gpu[7,9]-ib,x", "gpu7-ib"),
    ],
)
def test_the_first_host_of_slurms_list(hosts: str, first: str) -> None:
    assert from_slurm(SRUN | {"SLURM_STEP_NODELIST": hosts})[1] == first  # pyright: ignore


@pytest.mark.parametrize(("tasks", "node", "count"), [("4(x2),3", 1, 4), ("4(x2),3", 2, 3), ("2", 0, 2)])
def test_the_tasks_of_a_node(tasks: str, node: int, count: int) -> None:
    found = from_slurm(SRUN | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)})
    assert found is not None
    assert found[0].local_world_size == count


@pytest.mark.parametrize(
    "change",
    [
        {"SLURM_STEP_NUM_TASKS": ""},  # a batch script, which has the allocation's SLURM_NTASKS and SLURM_PROCID=0
        {"SLURM_STEP_NUM_TASKS": "1"},  # an interactive shell
        {"SLURM_STEP_ID": str(0xFFFFFFFB)},  # the batch step, where Slurm numbers it
        {"SLURM_PROCID": ""},
    ],
)
def test_slurm_without_several_tasks_is_one_process(change: dict[str, str]) -> None:
    assert from_slurm(SRUN | change) is None


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK='x'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2 is not one of"),
        (SRUN | {"SLURM_LOCALID": ""}, "SLURM_LOCALID=''"),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, "set MASTER_ADDR"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1", "OSTRO_TIMEOUT_SECONDS": "soon"},
            "a wait of 'soon' seconds",
        ),
    ],
)
def test_an_environment_that_contradicts_itself(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sentence: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=sentence):
        join(torch.device("cpu"))


@pytest.mark.parametrize(
    ("usable", "given", "expected"),
    [(16, None, [4]), (2, None, [1]), (4, None, []), (16, "3", [])],  # 4 of 16: srun has bound it
)
def test_processes_of_a_host_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, usable: int, given: str | None, expected: list[int]
) -> None:
    taken: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 2 if usable == 2 else 16)
    monkeypatch.setattr(process, "usable_cores", lambda: usable)
    process._share_cores(4)
    assert taken == expected


def test_a_backend_for_each_device() -> None:
    assert devices.backend(torch.device("cpu")) == "gloo"
    assert devices.backend(torch.device("cuda", 1)) == "cpu:gloo,cuda:nccl"


def test_more_processes_than_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    with pytest.raises(LayoutError, match="this host has 4 accelerators and its process number 4 wants one"):
        devices.select(torch.device("cuda"), 4)


def in_world(
    size: int,
    work: Any,
    folder: Path,
    timeout_seconds: float = 2.0,
    others_seconds: float = 0.7,
    num_started: int | None = None,
) -> dict[int, str]:
    """Fork `size` processes that join, call `work(process)` and leave; return what each ended with, by rank."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    fork = multiprocessing.get_context("fork")
    told = fork.Queue()

    def main(rank: int) -> None:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ |= {"OSTRO_LOG_DIR": str(folder), "OSTRO_TIMEOUT_SECONDS": str(timeout_seconds)}
        process._OTHERS_SECONDS = others_seconds
        me = ALONE
        try:
            me = join(torch.device("cpu"))
            with explained(me):
                work(me)
            told.put((rank, "done"))
        except Error as error:
            told.put((rank, f"{type(error).__name__}: {error}"))
        finally:
            leave()

    workers = [fork.Process(target=main, args=(rank,)) for rank in range(num_started or size)]
    for worker in workers:
        worker.start()
    ends = dict(told.get(timeout=30) for _ in workers)
    for worker in workers:
        worker.join(10)
        assert worker.exitcode == 0
    return ends


def test_a_rank_that_does_not_come_is_named_with_the_collective(tmp_path: Path) -> None:
    def work(me: Process) -> None:
        pair = dist.new_group([0, 1], group_desc="mesh_ep")
        dist.new_group([1, 2])
        x = torch.ones(2)
        dist.all_reduce(x)
        if me.rank == 1:
            time.sleep(4)
        elif me.rank == 0:  # a group of an axis has the same timeout, and only its own ranks are missed
            dist.all_to_all_single(torch.empty(2), x, group=pair)

    told = in_world(3, work, tmp_path)
    assert told[0] == (
        "TrainError: rank 0 waited 2 s in all_to_all (call 1 of mesh_ep): rank 1 did not come; "
        f"see {tmp_path}/rank1.log."
    )
    assert told[1] == told[2] == "done"
    names = [entry["profiling_name"] for entry in json.loads((tmp_path / "flight-rank0.json").read_text())]
    assert names == ["gloo:all_reduce", "gloo:all_to_all"]


@pytest.mark.parametrize("delay_seconds", [0.0, 0.5])
def test_ranks_in_different_collectives_are_named_with_both(tmp_path: Path, delay_seconds: float) -> None:
    def work(me: Process) -> None:
        dist.barrier()
        if me.rank == 0:
            dist.all_reduce(torch.ones(2))
        else:
            time.sleep(delay_seconds)
            dist.recv(torch.ones(2), 0)

    told = in_world(2, work, tmp_path, others_seconds=20)  # it ends as soon as both have told
    assert told[0] == (
        "TrainError: rank 0 waited 2 s in all_reduce (call 2 of default_pg): rank 1 waited in recv; "
        "ranks must make the same calls in the same order."
    )
    # gloo closes its connections when rank 0's wait is over; where that comes first rank 1 knows no more than this
    waited = "TrainError: rank 1 waited 2 s in recv: rank 0 waited in all_reduce (call 2 of"
    assert told[1].startswith((waited, "TrainError: rank 1 lost its connection to another rank in recv"))


def test_a_rank_that_left_is_no_hang(tmp_path: Path) -> None:
    def work(me: Process) -> None:
        dist.barrier()
        if me.rank == 0:
            dist.all_reduce(torch.ones(2))

    told = in_world(2, work, tmp_path, timeout_seconds=20)
    assert told == {
        0: "TrainError: rank 0 lost its connection to another rank in all_reduce: that one ended first, and its log "
        "says why.",
        1: "done",
    }


def test_others_that_never_start(tmp_path: Path) -> None:
    told = in_world(2, lambda me: None, tmp_path, timeout_seconds=1, num_started=1)
    assert told[0].startswith("TrainError: rank 0 waited for all 2 processes at 127.0.0.1:")
    assert "did not meet within 1 s" in told[0]


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="only Linux's kernel tells a process of its parent's end"
)
def test_a_killed_launcher_leaves_nothing_behind() -> None:
    fork = multiprocessing.get_context("fork")
    told = fork.Queue()

    def work() -> None:
        process._end_with_launcher()
        told.put(os.getpid())
        time.sleep(60)

    def launcher() -> None:
        os.environ["OSTRO_LAUNCHER_PID"] = str(os.getpid())
        fork.Process(target=work).start()
        time.sleep(60)

    parent = fork.Process(target=launcher)
    parent.start()
    worker = told.get(timeout=10)
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    deadline = time.monotonic() + 5
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(worker)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
