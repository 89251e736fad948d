"""`ostro train` on many processes and hosts: start the workers, watch them, meet again when some are lost.

The hosts meet through torch's elastic rendezvous (rendezvous.py). The workers are watched here and not by torch's
agent: that one starts again whatever a worker's exit code says, cannot tell the other hosts why it gave up, and has one
patience both for a save that SIGTERM asked for and for ranks that hang in a collective.

    worker ends with       then
    0                      wait for the others
    2, 3, 4, 5             the job ends at once: settings, data, memory, checkpoints are no better the next time
    130, 143               stopped by a signal, after a save: the job ends with that code
    the same sentence of   the job ends: a loss that is not finite comes again, to the bit
    its own as before
    anything else          all hosts meet again and start anew, `max_restarts` times
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ostro import log
from ostro.errors import ConfigError, Error
from ostro.machine import usable_cores
from ostro.parallel import process
from ostro.parallel.rendezvous import JobEndedError, Meeting, Round

FINAL_CODES = (2, 3, 4, 5)
STOPPED_CODES = (128 + signal.SIGINT, 128 + signal.SIGTERM)
DEFAULT_PORT = 29500
_POLL_SECONDS = 0.05
_ASK_SECONDS = 0.5  # between questions to the store of other hosts
_ECHO_SECONDS = 1.0  # after a rank failed, for what it does to the others; who is left then is ended
_PEER_SECONDS = 3.0  # for another host to say why, where here connections only broke
_STOP_SECONDS = 120.0  # for a save that a signal asked for
_TAIL_BYTES = 65536
_SENTENCE = b"ostro: "  # how cli.py begins an error
_OF_OTHERS = re.compile(r"rank \d+ |a rank ")  # how sentences about a lost connection or a hang begin
_WATCHDOG = re.compile(r"OpType=(\w+).*?ran for (\d+) milliseconds before timing out")


@dataclasses.dataclass(frozen=True)
class LaunchOptions:
    """What `ostro train` takes beside a recipe to run on many processes and hosts."""

    log_dir: Path
    nproc_per_node: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    rdzv_timeout: float = 600.0
    max_restarts: int = 3
    timeout_seconds: float = process.DEFAULT_TIMEOUT_SECONDS

    def check(self) -> None:
        """Raise ConfigError where the options contradict each other or the place they are used in."""
        if self.nproc_per_node < 1 or self.nnodes < 1:
            raise ConfigError("--nproc-per-node and --nnodes count from 1.")
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(f"--node-rank {self.node_rank} is not one of --nnodes {self.nnodes}: they count from 0.")
        if self.nnodes > 1 and self.master_addr is None:
            raise ConfigError(
                f"--nnodes {self.nnodes} needs --master-addr: the address of the host with --node-rank 0."
            )
        if self.master_port is not None and not 0 < self.master_port < 65536:
            raise ConfigError(f"--master-port {self.master_port} is no port: give 1 to 65535.")
        if self.max_restarts < 0 or self.rdzv_timeout <= 0 or self.timeout_seconds <= 0:
            raise ConfigError("--max-restarts is at least 0, --rdzv-timeout and --timeout-seconds are more than 0.")
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            raise ConfigError(
                "this process was started by torchrun or another launcher (RANK is set) and asks for processes of its "
                "own: leave out --nproc-per-node and --nnodes, or start it without that launcher."
            )

    def arguments(self) -> list[str]:
        """Return the options as `ostro train` takes them."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]


class FailedError(Error):
    """A worker's first error, with that worker's exit code."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


@dataclasses.dataclass(frozen=True)
class Failure:
    """How a rank ended: its exit code as a shell gives it, what it said, when, and whether it only followed another.

    `is_its_own` where it said so itself, and of itself: not of other ranks, nor was it killed.
    """

    rank: int
    exit_code: int
    sentence: str
    log: str
    time: float
    is_echo: bool
    is_its_own: bool


def launch(command: list[str], options: LaunchOptions) -> int:
    """Run `command` in `nproc_per_node` processes on this host, as part of `nnodes` hosts; return the exit code.

    Workers find each other through torchrun's variables. Each rank writes `rank{rank}.log` in `log_dir`, restarts
    after what was there; what rank 0 writes is shown here too. SIGTERM and SIGINT go to the workers and are waited
    for; the code then is 128 + the signal's number, as without a launcher. Raises FailedError with the first failing
    rank's sentence and exit code.
    """
    options.check()
    _make_log_dir(options)
    meeting = Meeting(
        node_rank=options.node_rank,
        num_nodes=options.nnodes,
        num_local=options.nproc_per_node,
        address=options.master_addr or "127.0.0.1",
        port=options.master_port or DEFAULT_PORT,
        timeout_seconds=options.rdzv_timeout,
    )
    try:
        with _Signals() as signals:
            return _run_rounds(command, options, meeting, signals)
    except _Stopped as stopped:
        return 128 + stopped.number
    except JobEndedError as ended:
        raise FailedError(ended.sentence, ended.exit_code) from None
    finally:
        meeting.leave()


def launch_ostro(arguments: list[str], options: LaunchOptions, *, in_background: bool) -> int:
    """Run `ostro` with `arguments` in all processes, or leave that to a process in the background and say which."""
    if not in_background:
        return launch([sys.executable, "-m", "ostro", *arguments], options)
    pid = detach(arguments, options)
    log.say(f"process {pid} goes on in the background")
    log.say(f"follow: tail -F {launcher_log(options)}   each rank's log is beside it")
    log.say(f"stop:   kill {pid}   saves first")
    return 0


def detach(arguments: list[str], options: LaunchOptions) -> int:
    """Start `ostro` with `arguments` and the options in the background, in a session of its own; return its process id.

    What it writes goes to `launcher_log(options)`.
    """
    options.check()
    _make_log_dir(options)
    with launcher_log(options).open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "ostro", *arguments, *options.arguments()],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        ).pid


def _make_log_dir(options: LaunchOptions) -> None:
    try:
        options.log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--log-dir {options.log_dir} cannot be made: {error.strerror}.") from None


def launcher_log(options: LaunchOptions) -> Path:
    """Return where a launcher in the background writes: hosts may share the folder."""
    return options.log_dir / (f"launcher{options.node_rank}.log" if options.node_rank else "launcher.log")


def _run_rounds(command: list[str], options: LaunchOptions, meeting: Meeting, signals: _Signals) -> int:
    restarts, before = 0, ""
    while True:
        world = meeting.next_round()
        with _Workers(command, options, world) as workers, signals.sent_to(workers):
            ending = _watch(workers, meeting, signals)
        if isinstance(ending, int):
            return ending
        if ending is None:
            _tell("a host came back or began anew: all start again from the last checkpoint")
            continue
        is_final = ending.exit_code in FINAL_CODES or (ending.is_its_own and ending.sentence == before)
        is_last = is_final or restarts == options.max_restarts or signals.caught is not None
        meeting.tell_failure(dataclasses.asdict(ending))
        if is_last:
            ending = _cause(ending, meeting)
        here = " on this host" if options.nnodes > 1 and not is_last else ""
        _tell(f"rank {ending.rank} failed first{here}, with exit code {ending.exit_code}; its log is {ending.log}")
        if is_last:
            meeting.end(ending.sentence, ending.exit_code)
            raise FailedError(ending.sentence, ending.exit_code)
        restarts, before = restarts + 1, ending.sentence
        _tell(f"{ending.sentence} Restart {restarts} of {options.max_restarts}.")


def _cause(failure: Failure, meeting: Meeting) -> Failure:
    """Return the failure of another host that this one only followed, where there is one."""
    deadline = time.monotonic() + _PEER_SECONDS
    while failure.is_echo and meeting.num_nodes > 1 and time.monotonic() < deadline:
        meeting.raise_if_ended()
        for other in meeting.failures_of_others():
            if not other["is_echo"]:
                return Failure(**other)
        time.sleep(0.1)
    return failure


def _watch(workers: _Workers, meeting: Meeting, signals: _Signals) -> int | Failure | None:
    """Wait for the round's end: an exit code, a failure, or None where another host asks for a new round."""
    asked_at, is_told = 0.0, False
    while True:
        time.sleep(_POLL_SECONDS)
        workers.show()
        codes = workers.exit_codes()
        if signals.caught is not None or any(code in STOPPED_CODES for code in codes):
            return _stop(workers, signals.caught)
        if any(codes):  # None: it runs
            workers.wait(_ECHO_SECONDS)
            return workers.first_failure()
        is_done = all(code == 0 for code in codes)
        if is_done and not is_told:
            meeting.say_done()
            is_told = True
        if is_done and meeting.all_done():
            return 0
        if time.monotonic() - asked_at > _ASK_SECONDS:
            asked_at = time.monotonic()
            meeting.raise_if_ended()
            if meeting.others_wait():
                return None


def _stop(workers: _Workers, caught: int | None) -> int | Failure:
    """Wait for the workers' saves; the code is theirs, or the failure of one that could not save."""
    workers.wait(_STOP_SECONDS)
    codes = workers.exit_codes()
    if None in codes:
        _tell(f"not all ranks have saved and left within {_STOP_SECONDS:g} s; they are ended")
    failure = workers.first_failure(besides=STOPPED_CODES)
    if failure is not None and not failure.is_echo:
        return failure
    if all(code == 0 for code in codes):
        return 0
    return 128 + caught if caught is not None else next(code for code in codes if code in STOPPED_CODES)


class _Stopped(BaseException):
    """A signal came while no workers ran."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Signals:
    """Between enter and exit, SIGTERM and SIGINT go to the workers; where there are none they raise _Stopped."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._workers: _Workers | None = None
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: Any) -> None:
        if self._workers is None:
            raise _Stopped(number)
        self.caught = number
        self._workers.send(number)

    @contextlib.contextmanager
    def sent_to(self, workers: _Workers) -> Any:
        self._workers = workers
        try:
            yield
        finally:
            self._workers = None

    def __enter__(self) -> _Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not the main thread: whoever runs us there owns the signals
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


class _Workers:
    """The processes of one round on this host; leaving ends those that still run, with SIGKILL.

    SIGTERM would ask ranks that hang in a collective for a save that needs the lost ones.
    """

    def __init__(self, command: list[str], options: LaunchOptions, world: Round) -> None:
        self.world = world
        self.ranks = range(world.first_rank, world.first_rank + options.nproc_per_node)
        self.logs = [options.log_dir / f"rank{rank}.log" for rank in self.ranks]
        self.starts: list[int] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self._shown, self._rest = 0, b""
        try:
            for rank, path in zip(self.ranks, self.logs, strict=True):
                with path.open("ab") as file:
                    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
                    file.write(f"--- rank {rank} of {world.world_size}, start {world.number}, {stamp}\n".encode())
                    file.flush()
                    self.starts.append(file.tell())
                    self.processes.append(
                        subprocess.Popen(
                            command,
                            stdin=subprocess.DEVNULL,
                            stdout=file,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,  # a terminal's Ctrl-C comes through the launcher, once
                            env=_environment(options, world, rank),
                        )
                    )
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise ConfigError(f"{error.filename or command[0]} cannot be used: {error.strerror}.") from None
            raise
        self._shown = self.starts[0]

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        for one in self.processes:
            if one.poll() != 0:
                with contextlib.suppress(ProcessLookupError):  # its children too, also where it is gone itself
                    os.killpg(one.pid, signal.SIGKILL)
            one.wait()
        if self.starts and self._shown:
            self.show()

    def exit_codes(self) -> list[int | None]:
        """Return each process's exit code, minus a signal's number where one killed it; None while it runs."""
        return [one.poll() for one in self.processes]

    def send(self, number: int) -> None:
        """Send a signal to each that runs."""
        for one in self.processes:
            with contextlib.suppress(ProcessLookupError):
                one.send_signal(number)

    def wait(self, seconds: float) -> None:
        """Wait until all have ended, or for that long."""
        deadline = time.monotonic() + seconds
        while None in self.exit_codes() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            self.show()

    def show(self) -> None:
        """Copy rank 0's new whole lines to the console; its error is left for the end."""
        if self.world.first_rank != 0 or not self.logs:
            return
        with self.logs[0].open("rb") as file:
            file.seek(self._shown)
            new = file.read()
        self._shown += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        text = "".join(
            line.decode(errors="replace") + "\n" for line in lines if not line.startswith((_SENTENCE, b"--- rank "))
        )
        if text:
            with contextlib.suppress(BrokenPipeError):  # whoever read us has had enough; the log has it all
                sys.stdout.write(text)
                sys.stdout.flush()

    def first_failure(self, besides: tuple[int, ...] = ()) -> Failure | None:
        """Return the failure that came first and followed no other, of those that have ended, `besides` some codes."""
        failures = [
            _failure(rank, code, path, start)
            for rank, code, path, start in zip(self.ranks, self.exit_codes(), self.logs, self.starts, strict=True)
            if code
        ]
        failures = [failure for failure in failures if failure.exit_code not in besides]
        return min(failures, key=lambda failure: (failure.is_echo, failure.time), default=None)


def _failure(rank: int, code: int, path: Path, start: int) -> Failure:
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - _TAIL_BYTES))
        lines = [line.strip() for line in file.read().splitlines() if line.strip()]
    said = [line.removeprefix(_SENTENCE) for line in lines if line.startswith(_SENTENCE)]
    last = (said or lines or [b""])[-1].decode(errors="replace")
    tail = b"\n".join(lines[-30:]).decode(errors="replace")
    watchdog = _WATCHDOG.search(tail)
    if watchdog:
        seconds = int(watchdog[2]) / 1000
        last = f"rank {rank} waited {seconds:.0f} s in {watchdog[1]} and another rank did not come; see {path.parent}."
    elif code < 0 and not said:
        last = _killed(rank, -code)
    return Failure(
        rank=rank,
        exit_code=code if code > 0 else 128 - code,
        sentence=last or f"rank {rank} ended with exit code {code} and said nothing.",
        log=str(path),
        time=path.stat().st_mtime,
        is_echo=bool(process.LOST.search(last if said else tail)) and not watchdog,
        is_its_own=bool(said) and not _OF_OTHERS.match(last),
    )


def _killed(rank: int, number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    why = "; where nobody sent it, this machine's memory was not enough" if number == signal.SIGKILL else ""
    return f"rank {rank} was ended by {name}{why}."


def _environment(options: LaunchOptions, world: Round, rank: int) -> dict[str, str]:
    local = rank - world.first_rank
    own = {
        "RANK": rank,
        "WORLD_SIZE": world.world_size,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": options.nproc_per_node,
        "GROUP_RANK": options.node_rank,
        "GROUP_WORLD_SIZE": options.nnodes,
        "MASTER_ADDR": world.address,
        "MASTER_PORT": world.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # torch: the store is the launcher's, do not open one
        "TORCHELASTIC_RESTART_COUNT": world.number,
        "TORCHELASTIC_MAX_RESTARTS": options.max_restarts,
        "TORCHELASTIC_RUN_ID": "ostro",
        process.TIMEOUT_VARIABLE: options.timeout_seconds,
        process.LOG_DIR_VARIABLE: options.log_dir,
        process.LAUNCHER_VARIABLE: os.getpid(),
        "PYTHONUNBUFFERED": 1,
    }
    defaults = {
        "OMP_NUM_THREADS": max(1, usable_cores() // options.nproc_per_node),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": 1,
        "TORCH_FR_DUMP_TEMP_FILE": options.log_dir / "flight-",
    }
    return {k: str(v) for k, v in defaults.items()} | dict(os.environ) | {k: str(v) for k, v in own.items()}


def _tell(text: str) -> None:
    log.say(text, "yellow")
