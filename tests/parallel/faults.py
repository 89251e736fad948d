"""Kills random ranks of real trainings at random moments, and holds what comes out against undisturbed runs.

`make faults`, minutes. The launcher starts again, training resumes; in the end weights and metrics are the undisturbed
run's, and at every kill each checkpoint that counts is read whole and is that run's of the same step, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from parity import SETTINGS

from ostro.data.prepare import prepare
from ostro.data.tokenizer import load_tokenizer
from ostro.log import read_metrics
from ostro.weights import dcp, open_reader
from ostro.weights.dcp_file import open_tensors
from ostro.weights.store import as_bytes, digest

DOCS = Path(__file__).parents[2] / "docs" / "parallel.md"
BEGIN, END = "<!-- faults: begin -->\n", "<!-- faults: end -->\n"
RANKS, STEPS = 4, 48
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp2·ep2·pp2": {"parallel.fsdp": 2, "parallel.ep": 2, "parallel.pp": 2},
    "fsdp4·ep4": {"parallel.fsdp": 4, "parallel.ep": 4},
}
TRAINING = {
    **SETTINGS,
    "model.vocab_size": 32000,
    "model.hidden_size": 64,  # with this vocabulary 49 MB of state: writing it takes long enough to be hit
    "model.initializer_range": 0.05,
    "train.global_batch_sequences": 8,
    "train.micro_batch_sequences": 1,
    "train.steps": STEPS,
    "optim.learning_rate": 1e-3,
    "optim.min_learning_rate": 0,
    "optim.schedule": "cosine",
    "checkpoint.every": 2,
}
CLOCK = ("seconds", "tokens_per_second", "mfu")
AIMS = ("write", "write", "write", "step", "step", "step", "step", "start")  # what a run's kills wait for, shuffled
PATIENCE_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class Kill:
    """One SIGKILL: whom, in which step, how long after the one before had ended, and the checkpoints read then."""

    rank: int
    step: int
    milliseconds: int
    moment: str
    checked: list[int]


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """A run nobody disturbed: the sha256 of its weights, of its checkpoints by step, and its metrics."""

    sha256: str
    checkpoints: dict[int, str]
    metrics: list[dict[str, Any]]


def launch(data: Path, run_dir: Path, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start `ostro train` on RANKS processes; what it says goes beside the run."""
    words = [f"{k}={v}" for k, v in {**TRAINING, **settings, "data.path": data, "run.dir": run_dir}.items()]
    options = ["--nproc-per-node", str(RANKS), "--max-restarts", str(len(AIMS) + 2), "--timeout-seconds", "60"]
    with run_dir.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ostro", "train", "tiny", *words, *options], stdout=log, stderr=subprocess.STDOUT
        )


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's metrics without the clock's."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def sha256_of(folder: Path) -> str:
    """Read a checkpoint whole, optimizer and random numbers included."""
    total, file, state = hashlib.sha256(), open_tensors(folder, ""), dcp.read_state(folder)
    total.update(json.dumps([state[name] for name in ("step", "num_tokens", "rng", "data")]).encode())
    for name in sorted(file.infos):
        total.update(name.encode())
        total.update(as_bytes(file.tensor(name).contiguous()))
    return total.hexdigest()


def undisturbed(data: Path, run_dir: Path, settings: dict[str, Any]) -> Undisturbed:
    """Train once without a fault and keep what it made of every step that is saved."""
    launcher = launch(data, run_dir, {**settings, "checkpoint.keep": STEPS, "checkpoint.async": False})
    if launcher.wait() != 0:
        raise RuntimeError(run_dir.with_suffix(".log").read_text())
    found = {step: sha256_of(folder) for step, folder in dcp.steps(run_dir / "checkpoints").items()}
    return Undisturbed(digest(open_reader(run_dir)), found, metrics_of(run_dir))


class Disturbed:
    """A run under the launcher, seen from outside: its workers, the step it is in, the saves under way."""

    def __init__(self, launcher: subprocess.Popen[bytes], run_dir: Path) -> None:
        self.launcher, self.run_dir = launcher, run_dir
        self.past: set[int] = set()
        self.stale: set[str] = set()
        self.started = 0.0

    def ranks(self) -> dict[int, int]:
        """Return the process ids of this round's workers by rank."""
        found = {}
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children").read_text().split()
            for pid in set(map(int, children)) - self.past:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                found |= {int(each[5:]): pid for each in variables if each.startswith(b"RANK=")}
        return found

    def writes(self) -> set[str]:
        """Return the folders of saves that have begun in this round and not ended."""
        names = {path.name for path in (self.run_dir / "checkpoints").glob("step-*.partial-*")}
        return {name for name in names - self.stale if not name.endswith("-old")}  # those are being removed

    def since_step(self) -> float | None:
        """Return the seconds since a step of this round ended or its first began; None before that."""
        with contextlib.suppress(OSError):
            changed = (self.run_dir / "metrics.jsonl").stat().st_mtime
            return time.time() - changed if changed > self.started else None
        return None

    def step(self) -> int:
        """Return the step that is being done: one more than the last in the metrics."""
        path = self.run_dir / "metrics.jsonl"
        return len(read_metrics(path)) + 1 if path.exists() else 1

    def wait_until(self, is_so: Callable[[], Any]) -> bool:
        """Wait for something; False where the run ended first."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.launcher.poll() is None:
            if is_so():
                return True
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing moves: {self.run_dir.with_suffix('.log').read_text()}")
            time.sleep(0.003)
        return False

    def begin(self) -> bool:
        """Wait for the workers of a new round."""
        self.stale, self.started = set(), time.time()
        self.stale = self.writes()
        return self.wait_until(lambda: len(self.ranks()) == RANKS)

    def moment(self, draw: random.Random, aim: str) -> bool:
        """Wait for the moment to kill in: during the start, anywhere in training, or inside a write."""
        if aim == "start":
            time.sleep(draw.uniform(0, 5))
            return self.launcher.poll() is None
        if not self.wait_until(lambda: self.since_step() is not None):
            return False
        goal = self.step() + draw.randrange(8)
        if not self.wait_until(lambda: self.step() >= goal):
            return False
        if aim == "step":
            time.sleep(draw.uniform(0, 1))
            return self.launcher.poll() is None
        delay = draw.uniform(0, 0.12)
        while self.wait_until(lambda: not self.writes()) and self.wait_until(self.writes):
            began = self.writes()
            time.sleep(delay)
            if began & self.writes():
                return True
            delay /= 2
        return False

    def kill(self, draw: random.Random) -> tuple[int, int, int, str]:
        """Kill a rank; return it, the step, the milliseconds in it, and what was going on."""
        ranks = self.ranks()
        victim = draw.choice(sorted(ranks))
        since, step, before = self.since_step(), self.step(), self.writes()
        os.kill(ranks[victim], signal.SIGKILL)
        is_torn = bool(before & self.writes())  # there before and after: the kill fell between
        if since is None:
            return victim, step, round((time.time() - self.started) * 1000), "start"
        return victim, step, round(since * 1000), "write" if is_torn else "step"

    def await_end_of_round(self) -> None:
        """Wait until the launcher has ended the others."""
        killed = set(self.ranks().values())
        self.wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in killed))
        self.past |= killed


def kills_of(run: Disturbed, expected: Undisturbed, draw: random.Random) -> Iterator[Kill]:
    """Kill a rank of every round, until the run has had enough, and read the checkpoints that are there then."""
    aims = draw.sample(AIMS, len(AIMS))
    for aim in aims:
        if not (run.begin() and run.moment(draw, aim)):
            return
        rank, step, milliseconds, moment = run.kill(draw)
        run.await_end_of_round()
        checked = []
        for number, folder in sorted(dcp.steps(run.run_dir / "checkpoints").items()):
            if sha256_of(folder) != expected.checkpoints[number]:
                raise AssertionError(f"{folder} is not what the undisturbed run has")
            checked.append(number)
        left = [path.name for path in (run.run_dir / "checkpoints").glob("step-*") if ".partial-" not in path.name]
        if len(left) != len(checked):
            raise AssertionError(f"half a checkpoint among {left}")
        print(f"  rank {rank} in step {step} after {milliseconds} ms, {moment} ({checked})", flush=True)
        yield Kill(rank, step, milliseconds, moment, checked)


def require_same(run_dir: Path, expected: Undisturbed, num_kills: int) -> int:
    """Raise AssertionError unless a run ended as the undisturbed one; return its restarts."""
    if metrics_of(run_dir) != expected.metrics:
        raise AssertionError(f"{run_dir}: the metrics differ from those of the undisturbed run")
    if digest(open_reader(run_dir)) != expected.sha256:
        raise AssertionError(f"{run_dir}: the weights differ from those of the undisturbed run")
    if any((run_dir / "checkpoints").glob("*.partial-*")):
        raise AssertionError(f"{run_dir}: what broken-off saves left was not removed")
    restarts = (run_dir / "logs" / "rank0.log").read_text().count("--- rank 0") - 1
    if restarts != num_kills:
        raise AssertionError(f"{run_dir}: {restarts} restarts after {num_kills} kills")
    for log in (*(run_dir / "logs").glob("rank*.log"), run_dir.with_suffix(".log")):
        if "Traceback" in log.read_text(errors="replace"):
            raise AssertionError(f"a traceback in {log}")
    return restarts


def disturb(folder: Path, num_kills: int, draw: random.Random) -> Iterator[tuple[str, list[Kill], str]]:
    """Train again and again until that many ranks were killed; yield what was trained, the kills, how it ended."""
    data = folder / "data"
    (folder / "text").mkdir()
    shutil.copy(json.__file__, folder / "text" / "json.py")
    prepare([folder / "text"], data, tokenizer=load_tokenizer("v1"))
    expected = {name: undisturbed(data, folder / f"undisturbed-{name}", LAYOUTS[name]) for name in LAYOUTS}
    done = 0
    for number, (is_async, name) in enumerate(itertools.cycle(itertools.product((True, False), LAYOUTS))):
        if done >= num_kills:
            return
        what = f"{name}, {'asynchronous' if is_async else 'synchronous'}"
        print(what, flush=True)
        run_dir = folder / f"run{number}"
        launcher = launch(data, run_dir, {**LAYOUTS[name], "checkpoint.async": is_async, "checkpoint.keep": 3})
        try:
            kills = list(kills_of(Disturbed(launcher, run_dir), expected[name], draw))
            if launcher.wait() != 0:
                raise AssertionError(run_dir.with_suffix(".log").read_text())
        finally:
            launcher.terminate()
            launcher.wait()
        restarts = require_same(run_dir, expected[name], len(kills))
        print(f"  {restarts} restarts, the same weights and metrics", flush=True)
        done += len(kills)
        yield what, kills, f"{restarts} restarts; weights `{expected[name].sha256}`"


def main() -> None:
    """Kill, compare, and write the log."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--kills", type=int, default=30, help="at least that many")
    arguments.add_argument("--seed", type=int, default=1, help="of ranks, moments and their order")
    arguments.add_argument("--write", action="store_true", help="write docs/parallel.md")
    asked = arguments.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        runs = list(disturb(Path(folder), asked.kills, random.Random(asked.seed)))
    kills = [kill for _, each, _ in runs for kill in each]
    writes = sum(kill.moment == "write" for kill in kills)
    text = (
        f"{time.strftime('%Y-%m-%d')}, `make faults FAULTS_FLAGS='--kills {asked.kills} --seed {asked.seed}'`: "
        f"{len(kills)} kills in {(time.monotonic() - start) / 60:.0f} minutes, {writes} of them inside a write.\n\n"
        + "\n".join(f"- {what}: {len(each)} kills, {ending}" for what, each, ending in runs)
        + "\n\n| kill | run | rank | step | ms into it | moment | checkpoints read |\n|---|---|---|---|---|---|---|\n"
    )
    numbers = itertools.count(1)
    for what, each, _ in runs:
        for kill in each:
            read = ", ".join(map(str, kill.checked)) or "none yet"
            cells = (next(numbers), what, kill.rank, kill.step, kill.milliseconds, kill.moment, read)
            text += f"| {' | '.join(map(str, cells))} |\n"
    if asked.write:
        before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(text.partition("\n")[0])
    if asked.kills >= 30 and writes < 10:
        sys.exit(f"only {writes} kills fell inside a write: take another --seed")


if __name__ == "__main__":
    main()
