"""Saving by many ranks when something goes wrong: full disks, killed ranks, hosts that share no disk."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import random as chance
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from worlds import WorldError, run_in_world

from ostro.errors import OutOfMemory, TrainError, WeightsError
from ostro.weights import dcp, saver
from ostro.weights.parts import Held, hold, load_held
from ostro.weights.reshard import Box
from ostro.weights.saver import Saver, newest

ROWS, WIDTH = 64, 4096  # 1 MiB


def piece(rank: int, size: int, step: int) -> dict[str, Held]:
    """Return a rank's rows of a matrix that says which step it is of, and a small thing that all have."""
    rows = ROWS // size
    values = torch.full((rows, WIDTH), float(step)) + torch.arange(rank * rows, (rank + 1) * rows)[:, None] / 1000
    return {
        "model.w": Held(values, Box((rank * rows, 0), (rows, WIDTH)), (ROWS, WIDTH)),
        "optim.w.step": Held(torch.tensor(float(step)), Box((), ()), ()),
    }


def require_whole(folder: Path) -> int:
    """Load a checkpoint as one process, compare every value, and return its step."""
    filled = {"model.w": torch.zeros(ROWS, WIDTH), "optim.w.step": torch.zeros(())}
    step = load_held(folder, hold(filled))["step"]
    assert torch.equal(filled["model.w"], piece(0, 1, step)["model.w"].tensor)
    assert filled["optim.w.step"] == step
    return step


def here(directory: Path, hosts: int = 1) -> Path:
    """Return the folder of this rank's host: the first of them are on the first."""
    if hosts == 1:
        return directory
    return directory / f"host{dist.get_rank() * hosts // dist.get_world_size()}"


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Full disks


def _fill_up(directory: Path, asynchronous: bool, hosts: int) -> list[Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    writer = Saver(here(directory, hosts), 5, dist.group.WORLD, asynchronous=asynchronous)
    told = []
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in (1, 2, 3):
        if step == 2 and rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limit[1]))
        writer.save(step, piece(rank, size, step), {"step": step})
        for saved in writer.finish():
            told.append((saved.step, type(saved.error).__name__, str(saved.error)))
        if step == 2 and rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    return [told, str(newest(here(directory, hosts), dist.group.WORLD))]


@pytest.mark.parametrize(("asynchronous", "hosts"), [(False, 1), (True, 1), (True, 2)])
def test_one_ranks_full_disk_drops_the_checkpoint_everywhere(tmp_path: Path, asynchronous: bool, hosts: int) -> None:
    for told, last in run_in_world(4, _fill_up, tmp_path, asynchronous, hosts):
        assert [(step, kind) for step, kind, _ in told] == [(1, "NoneType"), (2, "OutOfMemory"), (3, "NoneType")]
        sentence = told[1][2]
        assert sentence.startswith("rank 1: ")
        assert "step-00000002 could not be written whole (File too large) and nothing of it was kept" in sentence
        assert "\n" not in sentence
        assert last.endswith("step-00000003")
    for folder in [tmp_path] if hosts == 1 else [tmp_path / "host0", tmp_path / "host1"]:
        assert entries(folder) == ["step-00000001", "step-00000003"]
    if hosts == 1:
        assert require_whole(tmp_path / "step-00000003") == 3


def _fail_to_rename(directory: Path) -> list[Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    place = here(directory, 2)
    writer = Saver(place, 5, dist.group.WORLD)
    writer.save(1, piece(rank, size, 1), {"step": 1})
    real = os.rename
    if rank == 1:

        def rename(source: Any, target: Any) -> None:
            raise OSError(errno.EIO, "Input/output error")

        os.rename = rename  # type: ignore[assignment]
    writer.save(2, piece(rank, size, 2), {"step": 2})
    if rank == 1:
        os.rename = real
    told = [str(saved.error) for saved in writer.finish()]
    return [told, entries(place), str(newest(place, dist.group.WORLD))]


def test_a_host_that_cannot_finish_takes_the_step_from_the_other(tmp_path: Path) -> None:
    for told, there, last in run_in_world(2, _fail_to_rename, tmp_path):
        assert told[0] == "None"
        assert "rank 1: " in told[1]
        assert "Input/output error" in told[1]
        assert "step-00000002" not in there
        assert last.endswith("step-00000001")


def _unsound(directory: Path, which: str) -> list[str]:
    rank = dist.get_rank()
    held = piece(rank, 2, 1)
    if which == "gap" and rank == 1:
        del held["model.w"]
    elif which == "type" and rank == 1:
        held["model.w"] = dataclasses.replace(held["model.w"], tensor=held["model.w"].tensor.half())
    elif which == "overlap":
        held["model.w"] = Held(
            torch.zeros(ROWS, WIDTH)[rank * 16 :][:48], Box((rank * 16, 0), (48, WIDTH)), (ROWS, WIDTH)
        )
    writer = Saver(directory, 5, dist.group.WORLD)
    writer.save(1, held, {})
    return [f"{type(saved.error).__name__}: {saved.error}" for saved in writer.finish()]


@pytest.mark.parametrize(
    ("which", "sentence"),
    [
        ("gap", "TrainError: the ranks' parts do not make up model.w: nothing can be saved."),
        ("overlap", "TrainError: the ranks' parts do not make up model.w: nothing can be saved."),
        ("type", "TrainError: the ranks have model.w in different shapes or types: nothing can be saved."),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path, which: str, sentence: str) -> None:
    assert run_in_world(2, _unsound, tmp_path, which) == [[sentence], [sentence]]
    assert entries(tmp_path) == []


# Beside the training


def test_what_is_saved_is_what_was_there_when_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()
    real = saver.write_boxes
    monkeypatch.setattr(saver, "write_boxes", lambda *a: (may_write.wait(10), real(*a))[1])
    writer = Saver(tmp_path, 5, asynchronous=True)
    held, state = piece(0, 1, 1), {"step": 1, "data": [1]}
    writer.save(1, held, state)
    held["model.w"].tensor.zero_()  # the next step's update
    state["data"].append(2)  # type: ignore[attr-defined]
    assert writer.poll() == []
    may_write.set()
    assert writer.finish() == [saver.Saved(1, None)]
    assert writer.poll() == writer.finish() == []
    assert require_whole(tmp_path / "step-00000001") == 1
    assert dcp.read_state(tmp_path / "step-00000001")["data"] == [1]


def test_a_second_save_waits_for_the_first_and_memory_is_used_again(tmp_path: Path) -> None:
    writer = Saver(tmp_path, 2, asynchronous=True)
    for step in range(1, 6):
        writer.save(step, piece(0, 1, step), {"step": step})
    copies = {name: copy.data_ptr() for name, copy in writer._copies.items()}
    assert [saved.step for saved in writer.finish()] == [1, 2, 3, 4, 5]
    assert entries(tmp_path) == ["step-00000004", "step-00000005"]
    assert [require_whole(tmp_path / name) for name in entries(tmp_path)] == [4, 5]
    assert set(copies) == {"model.w", "optim.w.step"}


@pytest.mark.parametrize(
    ("raised", "kind"), [(OSError(errno.ENOSPC, "full"), OutOfMemory), (OSError(errno.EACCES, "no"), WeightsError)]
)
def test_a_threads_errors_surface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: OSError, kind: type) -> None:
    def refuse(*_: object) -> None:
        raise raised

    writer = Saver(tmp_path, 5, asynchronous=True)
    monkeypatch.setattr(saver, "write_metadata", refuse)
    writer.save(1, piece(0, 1, 1), {"step": 1})
    ended = []
    while not ended:
        ended = writer.poll()
    assert (ended[0].step, type(ended[0].error)) == (1, kind)
    assert entries(tmp_path) == []


def test_a_bug_in_the_thread_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Saver(tmp_path, 5, asynchronous=True)
    monkeypatch.setattr(saver, "write_metadata", lambda *_: 1 / 0)
    writer.save(1, piece(0, 1, 1), {"step": 1})
    with pytest.raises(ZeroDivisionError):
        writer.finish()
    assert entries(tmp_path) == []


def _save_and_end(directory: Path) -> None:
    real = saver.write_boxes
    saver.write_boxes = lambda *a: (time.sleep(0.3), real(*a))[1]
    Saver(directory, 5, asynchronous=True).save(1, piece(0, 1, 1), {"step": 1})


def test_a_process_that_comes_to_its_end_finishes_its_save(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_save_and_end, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert entries(tmp_path) == ["step-00000001"]
    assert require_whole(tmp_path / "step-00000001") == 1


# Killed ranks


def _save_until_killed(directory: Path, asynchronous: bool, hosts: int, first: int, victim: int, delay: float) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    place = here(directory, hosts)
    writer = Saver(place, 2, dist.group.WORLD, asynchronous=asynchronous)
    writer.save(first, piece(rank, size, first), {"step": first})
    assert [saved.error for saved in writer.finish()] == [None]
    if rank == victim:
        kill = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
        kill.daemon = True
        kill.start()
    for step in range(first + 1, first + 1000):
        writer.save(step, piece(rank, size, step), {"step": step})
        for saved in writer.finish():
            if saved.error is not None:
                assert isinstance(saved.error, TrainError), saved.error
                raise saved.error


@pytest.mark.parametrize(("asynchronous", "hosts"), [(False, 1), (True, 1), (True, 2)])
def test_a_killed_rank_never_leaves_half_a_checkpoint(tmp_path: Path, asynchronous: bool, hosts: int) -> None:
    draw = chance.Random(hosts * 2 + asynchronous)
    places = [tmp_path] if hosts == 1 else [tmp_path / f"host{host}" for host in range(hosts)]
    partial, first = 0, 1
    for _ in range(5):
        victim, delay = draw.randrange(2), draw.uniform(0.0, 0.05)
        with pytest.raises(WorldError):
            run_in_world(2, _save_until_killed, tmp_path, asynchronous, hosts, first, victim, delay)
        for place in places:
            partial += any(".partial-" in name for name in entries(place))
            names = [name for name in entries(place) if ".partial-" not in name]
            assert names
            if hosts == 1:
                assert all(require_whole(place / name) >= first - 1 for name in names)
            else:
                assert all((place / name / ".metadata").exists() for name in names)
        last = run_in_world(hosts, _newest, tmp_path, hosts)
        assert len(set(last)) == 1
        assert last[0] is not None
        first = int(last[0].removeprefix("step-")) + 1
    assert partial  # or nothing was torn, and this has tested nothing
    run_in_world(hosts, _sweep, tmp_path, hosts, first)
    for place in places:
        assert not any(".partial-" in name for name in entries(place))


def _newest(directory: Path, hosts: int) -> str | None:
    folder = newest(here(directory, hosts), dist.group.WORLD)
    return None if folder is None else folder.name


def _sweep(directory: Path, hosts: int, step: int) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    writer = Saver(here(directory, hosts), 2, dist.group.WORLD)
    writer.save(step, piece(rank, size, step), {"step": step})
    assert [saved.error for saved in writer.finish()] == [None]


# Hosts that share no disk


@contextlib.contextmanager
def refused(text: str) -> Iterator[None]:
    with pytest.raises(WeightsError) as caught:
        yield
    assert text in str(caught.value)


def _on_hosts(directory: Path, hosts: int) -> list[str]:
    rank, size = dist.get_rank(), dist.get_world_size()
    place = here(directory, hosts)
    for step in (1, 2, 3):
        writer = Saver(place, 2, dist.group.WORLD, asynchronous=step == 2)
        writer.save(step, piece(rank, size, step), {"step": step})
        assert [saved.error for saved in writer.finish()] == [None]
    folder = newest(place, dist.group.WORLD)
    assert folder is not None
    blank = {name: dataclasses.replace(held, tensor=held.tensor * 0) for name, held in piece(rank, size, 3).items()}
    assert load_held(folder, blank, {"model.w", "optim.w.step"})["step"] == 3
    for name, held in piece(rank, size, 3).items():
        assert torch.equal(blank[name].tensor, held.tensor)
    other = piece((rank + size // 2) % size, size, 0)  # what a rank of the other host holds
    with refused("ostro convert HOSTDIR… DST --to dcp"):
        load_held(folder, other)
    return entries(folder)


def test_each_host_has_what_its_own_ranks_need(tmp_path: Path) -> None:
    there = run_in_world(4, _on_hosts, tmp_path, 2)
    assert there[0] == there[1] == [".metadata", "__0_0.distcp", "__1_0.distcp", "state.json"]
    assert there[2] == there[3] == [".metadata", "__2_0.distcp", "__3_0.distcp", "state.json"]
    for host in (0, 1):
        assert entries(tmp_path / f"host{host}") == ["step-00000002", "step-00000003"]
        state = dcp.read_state(tmp_path / f"host{host}" / "step-00000003")
        assert (state["host"], state["num_hosts"]) == (host, 2)


def _differing(directory: Path) -> str:
    """Save steps 1 and 2; host 1 loses 2, as if it was killed before its rename; then save 2 again and 3."""
    rank, size = dist.get_rank(), dist.get_world_size()
    place = here(directory, 2)
    for step in (1, 2):
        _sweep(directory, 2, step)
    if rank == 1:
        dcp.hide(place / "step-00000002")
    dist.barrier()
    found = newest(place, dist.group.WORLD)
    assert found is not None
    writer = Saver(place, 1, dist.group.WORLD)
    if rank == 1:  # host 1 gets a step 2 of another save: the two do not belong together
        other = Saver(place, 5)
        other.save(2, hold({"model.w": piece(0, 1, 2)["model.w"].tensor}), {"step": 2})
    dist.barrier()
    again = newest(place, dist.group.WORLD)
    assert again == found
    writer.save(2, piece(rank, size, 2), {"step": 2})
    assert [saved.error for saved in writer.finish()] == [None]
    last = newest(place, dist.group.WORLD)
    assert last is not None
    return f"{found.name} {last.name} {entries(place)}"


def test_a_step_that_one_host_lacks_does_not_count(tmp_path: Path) -> None:
    expected = "step-00000001 step-00000002 ['step-00000002']"
    assert run_in_world(2, _differing, tmp_path) == [expected, expected]


def test_pruning_leaves_alone_what_another_host_did_not_finish(tmp_path: Path) -> None:
    for step in (100, 200):
        (tmp_path / f"step-{step:08}").mkdir()
        for name in ("state.json", ".metadata"):
            (tmp_path / f"step-{step:08}" / name).touch()
    Saver(tmp_path, 1).save(150, piece(0, 1, 150), {"step": 150})
    assert entries(tmp_path) == ["step-00000150", "step-00000200"]
