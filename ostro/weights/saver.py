"""Training checkpoints of many ranks: each writes its own file, beside the training, and all count or none.

Hosts may share a disk or have one each; which it is, is tried. On each disk the lowest rank that writes there leads: it
makes the folder, describes what the others wrote into it, and renames it when every rank on every disk has said that
it is done. What several ranks of a disk hold, one of them writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ostro import errors
from ostro.errors import Error, TrainError, WeightsError
from ostro.weights import dcp
from ostro.weights.dcp_file import Stored, brief, write_boxes, write_metadata
from ostro.weights.folder import not_written, written_beside
from ostro.weights.parts import Held
from ostro.weights.reshard import Box, is_covered, shared
from ostro.weights.store import TensorInfo

T = TypeVar("T")
R = TypeVar("R")

_HEAD_BYTES = 1200  # of each item in a file: what many small ones are made of
_NICE = 10  # of the writing thread: it takes what the step leaves, and a tenth of a busy core


@dataclasses.dataclass(frozen=True)
class Saved:
    """How a save ended: the step, and why there is no checkpoint of it, if there is none."""

    step: int
    error: Error | None


class Saver:
    """Writes the checkpoints of a run, at most one at a time; every rank has one and calls it at the same steps.

    `group` are the ranks (None: this process alone): gloo, and used for nothing else, since saving talks from a thread
    of its own when `asynchronous`. Then `save` copies what this rank writes into memory of its own and returns.
    """

    def __init__(
        self, directory: Path, keep: int, group: dist.ProcessGroup | None = None, *, asynchronous: bool = False
    ) -> None:
        self._directory = directory
        self._keep = keep
        self.group = group
        self._asynchronous = asynchronous
        self._plan: _Plan | None = None
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._ended: list[Saved | Exception] = []

    def save(self, step: int, held: Mapping[str, Held], state: Mapping[str, Any], *, is_best: bool = False) -> None:
        """Save what the ranks hold, and the JSON state of the lowest; waits for a save that is under way.

        What becomes of it, `poll` and `finish` say; the last good checkpoint is kept until this one is whole. The best
        is kept, as `dcp.BEST`, until there is another.
        """
        self._wait()
        try:
            if self._plan is None:
                self._plan = _agree(self._directory, self.group, held)
        except Error as error:
            self._ended.append(Saved(step, error))
            return
        values = {name: held[name] for name in self._plan.mine}
        if self._asynchronous:
            values = {name: self._copied(name, piece) for name, piece in values.items()}
        job = functools.partial(self._run, step, self._plan, values, json.dumps(state, indent=1) + "\n", is_best)
        if self._asynchronous:
            # No daemon: a process that comes to its end waits for it.
            self._thread = threading.Thread(target=_politely, args=(job,), name=f"save step {step}")
            self._thread.start()
        else:
            job()

    def poll(self) -> list[Saved]:
        """Return how the saves ended that have ended since this was last asked, without waiting."""
        if self._thread is not None and self._thread.is_alive():
            return []
        return self.finish()

    def finish(self) -> list[Saved]:
        """Wait for the save that is under way; return as `poll` does."""
        self._wait()
        ended, self._ended = self._ended, []
        for outcome in ended:
            if isinstance(outcome, Exception):  # a bug, not a full disk
                raise outcome
        return [outcome for outcome in ended if isinstance(outcome, Saved)]

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copied(self, name: str, piece: Held) -> Held:
        copy = self._copies.get(name)
        if copy is None:
            copy = self._copies[name] = torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype)
        return dataclasses.replace(piece, tensor=copy.copy_(piece.tensor))

    def _run(self, step: int, plan: _Plan, values: Mapping[str, Held], state: str, is_best: bool) -> None:
        try:
            _write(dcp.step_folder(self._directory, step), plan, values, state, self.group)
            if plan.is_lead:
                if is_best:
                    dcp.mark_best(self._directory, step)
                dcp.prune(self._directory, self._keep, step)
            self._ended.append(Saved(step, None))
        except Error as error:
            self._ended.append(Saved(step, error))
        except Exception as error:
            self._ended.append(error)


def newest(directory: Path, group: dist.ProcessGroup | None = None) -> Path | None:
    """Return the newest checkpoint that is whole for every rank of `group`, or None.

    Without a shared disk a host may have one that another did not finish, or one of the same step from an earlier try.
    """
    if group is None:
        return dcp.latest(directory)

    def mine() -> set[tuple[int, str]]:
        found = set()
        for step, folder in dcp.steps(directory).items():
            try:
                found.add((step, str(dcp.read_state(folder).get("save", ""))))
            except WeightsError:
                if dcp.is_whole(folder):  # and was not pruned just now
                    raise
        return found

    common = _together(group, mine, lambda each: [set.intersection(*each)] * len(each))
    return dcp.step_folder(directory, max(common)[0]) if common else None


def every_name(held: Mapping[str, Held], group: dist.ProcessGroup | None = None) -> set[str]:
    """Return the names of all ranks' tensors: what `load_held` wants to know where a rank does not have them all."""
    return _together(group, lambda: set(held), lambda each: [set.union(*each)] * len(each))


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a rank writes of what it holds; for one that leads also every tensor there is, and the bytes of its disk."""

    rank: int
    leads: Sequence[int]  # of every rank: the lowest that shares its disk
    mine: Sequence[str]
    infos: Mapping[str, TensorInfo]
    num_bytes: int

    @property
    def is_lead(self) -> bool:
        return self.leads[self.rank] == self.rank

    def state(self, text: str, token: str) -> str:
        """Return the JSON state, with the host it is of and a word that this save has on all hosts, if there are
        several disks."""
        disks = sorted(set(self.leads))
        host = {"host": disks.index(self.rank), "num_hosts": len(disks), "save": token} if len(disks) > 1 else {}
        return json.dumps(json.loads(text) | host, indent=1) + "\n"


def _write(folder: Path, plan: _Plan, values: Mapping[str, Held], state: str, group: dist.ProcessGroup | None) -> None:
    """Write one checkpoint, all ranks together; Error on every rank, and nothing of it left, if one of them fails."""
    is_committed = False

    def begin() -> str:
        if not plan.is_lead:
            return ""
        needed_bytes = plan.num_bytes + len(state) + (1 << 20)
        return stack.enter_context(written_beside(folder, needed_bytes=needed_bytes, replace=dcp.is_whole(folder))).name

    def write() -> list[Stored]:
        if not values:
            return []
        boxes = ((name, piece.box, piece.tensor.detach().cpu()) for name, piece in values.items())
        with _refusals(folder):
            return write_boxes(partial / f"__{plan.rank}_0.distcp", boxes)

    def describe() -> None:
        if plan.is_lead:
            with _refusals(folder):
                (partial / dcp.STATE).write_text(plan.state(state, token), "utf-8")
                write_metadata(partial, plan.infos, stored)

    def commit() -> None:
        nonlocal is_committed
        stack.close()  # a lead's is renamed now
        is_committed = plan.is_lead

    def of_disks(each: list[list[Stored]]) -> list[list[Stored]]:
        return [
            [item for lead, items in zip(plan.leads, each, strict=True) if lead == rank for item in items]
            for rank in range(len(each))
        ]

    with contextlib.ExitStack() as stack:
        token = secrets.token_hex(8)
        name, token = _together(group, begin, lambda names: [(names[lead], token) for lead in plan.leads])
        partial = Path(os.path.realpath(folder)).parent / name
        stored = _together(group, write, of_disks)
        _together(group, describe, _nothing)
        try:
            _together(group, commit, _nothing)
        except Error:
            if is_committed:  # and another disk does not have it
                dcp.hide(folder)
            raise


def _agree(directory: Path, group: dist.ProcessGroup | None, held: Mapping[str, Held]) -> _Plan:
    """Find out who shares a disk, and deal out what is held; a lead removes what killed saves have left."""
    leads = _leads(directory, group)
    plan = _together(
        group, lambda: {name: (piece.info, piece.box) for name, piece in held.items()}, lambda each: _plans(each, leads)
    )
    if plan.is_lead:
        dcp.sweep(directory)
    return plan


def _leads(directory: Path, group: dist.ProcessGroup | None) -> list[int]:
    """Return for every rank the lowest that has the same disk: one after another writes a file, and all look for it."""
    if group is None:
        return [0]
    rank, leads = dist.get_rank(group), [-1] * dist.get_world_size(group)
    while -1 in leads:
        lead = leads.index(-1)
        mark = directory / f".seen-by-{secrets.token_hex(8)}"

        def make(mark: Path = mark, lead: int = lead) -> str:
            with _refusals(directory):
                directory.mkdir(parents=True, exist_ok=True)
                if rank == lead:
                    mark.touch()
            return mark.name

        name = _together(group, make, lambda names, lead=lead: [names[lead]] * len(names))
        try:
            seen = _together(group, (directory / name).exists, lambda each: [each] * len(each))
        finally:
            if rank == lead:
                mark.unlink(missing_ok=True)
        leads = [lead if old < 0 and is_seen else old for old, is_seen in zip(leads, seen, strict=True)]
    return leads


def _plans(held: list[dict[str, tuple[TensorInfo, Box]]], leads: Sequence[int]) -> list[_Plan]:
    """Deal out every box of every disk to one of the ranks that hold it: to the one with the least to write so far."""
    _require_sound(held)
    mine: list[list[str]] = [[] for _ in held]
    num_bytes = [0] * len(held)
    infos: dict[str, TensorInfo] = {}
    holders: dict[tuple[int, str, Box], list[int]] = {}
    for rank, pieces in enumerate(held):
        for name, (info, box) in pieces.items():
            infos[name] = info
            if box.num_elements:
                holders.setdefault((leads[rank], name, box), []).append(rank)
    totals = [0] * len(held)
    # First what few hold: the rest then evens out.
    for (lead, name, box), ranks in sorted(holders.items(), key=lambda item: len(item[1])):
        writer = min(ranks, key=num_bytes.__getitem__)
        size = box.num_elements * infos[name].dtype.itemsize
        mine[writer].append(name)
        num_bytes[writer] += size + _HEAD_BYTES
        totals[lead] += size
    # A lead names also what only other disks hold: a host's folder then shows what it is a part of.
    of_leads = [infos if leads[rank] == rank else {} for rank in range(len(held))]
    return [_Plan(rank, leads, mine[rank], of_leads[rank], totals[rank]) for rank in range(len(held))]


def _require_sound(held: list[dict[str, tuple[TensorInfo, Box]]]) -> None:
    """Raise TrainError unless the ranks' boxes make up every tensor: what cannot be loaded is not to be written."""
    boxes: dict[str, dict[Box, TensorInfo]] = {}
    for pieces in held:
        for name, (info, box) in pieces.items():
            if any(other != info for other in boxes.get(name, {}).values()):
                raise TrainError(f"the ranks have {name} in different shapes or types: nothing can be saved.")
            boxes.setdefault(name, {})[box] = info
    for name, found in boxes.items():
        shape = next(iter(found.values())).shape
        if not is_covered(shape, found) or shared(found):
            raise TrainError(f"the ranks' parts do not make up {name}: nothing can be saved.")


def _nothing(each: list[None]) -> list[None]:
    return each


def _together(group: dist.ProcessGroup | None, act: Callable[[], T], reply: Callable[[list[T]], Sequence[R]]) -> R:
    """Do `act` on every rank, and return this rank's part of `reply`, which rank 0 makes of what all returned.

    Raises on every rank the error of the lowest that failed, and TrainError if one is gone.
    """
    result: Any = None
    failure: Exception | None = None
    try:
        result = act()
    except Exception as error:
        failure = error
    if group is None:
        if failure is not None:
            raise failure
        return reply([result])[0]
    each: list[Any] = [None] * dist.get_world_size(group)
    is_first = dist.get_rank(group) == 0
    got: list[Any] = [None]
    try:
        dist.gather_object((result, _told(failure)), each if is_first else None, group=group, group_dst=0)
        answers = _answers(each, reply) if is_first else None
        dist.scatter_object_list(got, answers, group=group, group_src=0)
    except RuntimeError as error:  # a bug in `reply` would be none
        raise TrainError(
            f"a rank ended or could not be reached while a checkpoint was saved ({brief(error)}): start the run again; "
            "it goes on from the last whole checkpoint."
        ) from error
    if failure is not None and not isinstance(failure, Error):
        raise failure
    answer, told = got[0]
    if told is not None:
        raise getattr(errors, told[0])(told[1])
    return answer


def _answers(each: list[tuple[Any, tuple[str, str] | None]], reply: Callable[[list[Any]], Sequence[R]]) -> list[Any]:
    told = [
        (kind, f"rank {rank}: {text}") for rank, (_, failed) in enumerate(each) if failed for kind, text in [failed]
    ]
    if not told:
        try:
            return [(answer, None) for answer in reply([result for result, _ in each])]
        except Error as error:
            told = [(type(error).__name__, str(error))]
    return [(None, told[0])] * len(each)


def _told(failure: Exception | None) -> tuple[str, str] | None:
    """Return an error as it is sent to the other ranks: its class and its sentence."""
    if failure is None:
        return None
    if isinstance(failure, Error):
        return type(failure).__name__, str(failure)
    return TrainError.__name__, f"saving failed ({brief(failure)}); its log says where."


@contextlib.contextmanager
def _refusals(target: Path) -> Iterator[None]:
    """Say what the system refused, in our words."""
    try:
        yield
    except OSError as error:
        raise not_written(target, error) from error


def _politely(job: Callable[[], None]) -> None:
    """Do a thread's work at a lower priority than the training's."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    job()
