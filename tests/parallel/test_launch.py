"""The launcher: real processes, small ones; few of them load torch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ostro import cli
from ostro.errors import ConfigError, Error
from ostro.parallel import launch as launcher
from ostro.parallel.launch import FailedError, LaunchOptions, launch

sys.path.insert(0, str(Path(__file__).parent))
import toy

TERM_SAVES = """
import os, signal, sys, time
def save(number, frame):
    time.sleep(0.3)
    open(f"saved{os.environ['RANK']}", "w").close()
    sys.exit(int(os.environ.get("SAVE_CODE", 128 + number)))
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
open(f"ready{os.environ['RANK']}", "w").close()
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launcher, "_ECHO_SECONDS", 0.6)


def run(script: str, num_processes: int = 2, **options: object) -> int:
    given = LaunchOptions(log_dir=Path("logs"), nproc_per_node=num_processes, **options)  # pyright: ignore
    return launch([sys.executable, "-c", "import os, sys, time\nrank = int(os.environ['RANK'])\n" + script], given)


def log_of(rank: int) -> str:
    return Path(f"logs/rank{rank}.log").read_text()


def signal_when(number: int, *paths: str) -> threading.Thread:
    """Send this process a signal once the files are there and it listens."""

    def wait() -> None:
        deadline = time.monotonic() + 20
        while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL or not all(Path(path).exists() for path in paths):
            if time.monotonic() > deadline:
                return  # the test fails by what then does not happen; a signal would end all tests
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_log_a_rank_and_rank_0_on_the_console(capfd: pytest.CaptureFixture[str]) -> None:
    names = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "OSTRO_TIMEOUT_SECONDS")
    script = f"print(rank, *[os.environ[name] for name in {names!r}]); print('to stderr', rank, file=sys.stderr)"
    assert run(script, 3, timeout_seconds=7.0) == 0
    for rank in range(3):
        assert f"{rank} 3 {rank} 3 127.0.0.1 7.0\n" in log_of(rank)
        assert f"to stderr {rank}\n" in log_of(rank)
    shown = capfd.readouterr().out
    assert sorted(shown.splitlines()) == ["0 3 0 3 127.0.0.1 7.0", "to stderr 0"]


@pytest.mark.parametrize("code", [2, 5])
def test_what_cannot_be_better_next_time_ends_the_job_at_once(code: int, capfd: pytest.CaptureFixture[str]) -> None:
    script = f"""
if rank == 1:
    print("some line")
    print("ostro: tp=8 does not divide num_key_value_heads=4: use tp 1, 2 or 4.", flush=True)
    os._exit({code})
time.sleep(60)
"""
    with pytest.raises(
        FailedError, match=r"^tp=8 does not divide num_key_value_heads=4: use tp 1, 2 or 4\.$"
    ) as caught:
        run(script)
    assert caught.value.exit_code == code
    assert log_of(0).count("--- rank 0") == 1
    assert f"rank 1 failed first, with exit code {code}; its log is logs/rank1.log" in capfd.readouterr().out


def test_who_only_lost_a_connection_is_not_the_cause() -> None:
    script = """
if rank == 0:
    print("ostro: rank 0 lost its connection to another rank in all_reduce: …", flush=True)
    os._exit(1)
if rank == 2:
    raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:63720")
time.sleep(0.4)
os.kill(os.getpid(), 9)
"""
    with pytest.raises(FailedError, match="rank 1 was ended by SIGKILL") as caught:
        run(script, 3, max_restarts=0)
    assert caught.value.exit_code == 137


def test_killed_ranks_are_started_again_until_the_restarts_are_used_up() -> None:
    script = """
print("start", os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["MASTER_PORT"], flush=True)
if rank == 1 and len(open("logs/rank1.log").read().split("--- rank")) <= int(sys.argv[-1]):
    os.kill(os.getpid(), 9)
if rank == 0 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    time.sleep(60)
"""
    options = LaunchOptions(log_dir=Path("logs"), nproc_per_node=2, max_restarts=1)
    command = [sys.executable, "-c", "import os, sys, time\nrank = int(os.environ['RANK'])\n" + script]
    assert launch([*command, "2"], options) == 0
    assert [line.split()[1] for line in log_of(0).splitlines() if line.startswith("start")] == ["0", "1"]
    with pytest.raises(FailedError, match="SIGKILL"):  # the next launch writes after what is there
        launch([*command, "9"], options)
    assert log_of(1).count("--- rank 1 of 2") == 4


@pytest.mark.parametrize(
    ("said", "starts"), [("step 2: the loss is nan.", 2), ("rank 1 waited 5 s in all_reduce: rank 0 did not come.", 3)]
)
def test_what_a_rank_says_of_itself_twice_it_would_say_again(said: str, starts: int) -> None:
    script = f"if rank: print('ostro: {said}', flush=True); os._exit(1)\ntime.sleep(60)"
    with pytest.raises(FailedError, match=said) as caught:
        run(script, max_restarts=2)
    assert caught.value.exit_code == 1
    assert log_of(1).count("--- rank 1") == starts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_workers_and_their_save_is_waited_for(number: int) -> None:
    thread = signal_when(number, "ready0", "ready1")
    assert run(TERM_SAVES) == 128 + number
    thread.join()
    assert Path("saved0").exists()
    assert Path("saved1").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_save_that_fails_after_a_signal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAVE_CODE", "4")
    thread = signal_when(signal.SIGTERM, "ready0", "ready1")
    with pytest.raises(FailedError) as caught:
        run(TERM_SAVES)
    thread.join()
    assert caught.value.exit_code == 4


def test_workers_that_were_stopped_themselves_are_not_started_again() -> None:
    assert run("sys.exit(143)") == 143
    assert log_of(0).count("--- rank 0") == 1


def test_a_signal_ends_the_wait_for_other_hosts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    thread = signal_when(signal.SIGTERM)
    start = time.monotonic()
    assert run("", nnodes=2, node_rank=1, master_addr="127.0.0.1", master_port=port, rdzv_timeout=30) == 143
    thread.join()
    assert time.monotonic() - start < 5


def test_hosts_that_do_not_come() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(Error, match=f"not all 2 hosts met at 127.0.0.1:{port} within --rdzv-timeout 1 s"):
        run("", nnodes=2, node_rank=1, master_addr="127.0.0.1", master_port=port, rdzv_timeout=1)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"the store cannot be kept at 127.0.0.1:{port}"):
            run("", nnodes=2, master_addr="127.0.0.1", master_port=port, rdzv_timeout=1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"nproc_per_node": 0}, "count from 1"),
        ({"nnodes": 2}, "needs --master-addr"),
        ({"nnodes": 2, "node_rank": 2, "master_addr": "a"}, "not one of --nnodes 2"),
        ({"master_port": 70000}, "is no port"),
        ({"max_restarts": -1}, "at least 0"),
    ],
)
def test_options_that_cannot_be(options: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        launch(["true"], LaunchOptions(log_dir=Path("logs"), **options))
    assert not Path("logs").exists()


def test_a_launcher_within_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="leave out --nproc-per-node"):
        run("")


def test_a_watchdog_that_aborted_is_told_by_rank_and_collective() -> None:
    script = """
print("[rank1]:[E] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=812, OpType=ALLTOALL_BASE, "
      "NumelIn=4, NumelOut=4, Timeout(ms)=600000) ran for 600012 milliseconds before timing out.", flush=True)
os.abort() if rank == 1 else time.sleep(60)
"""
    with pytest.raises(FailedError, match="rank 1 waited 600 s in ALLTOALL_BASE") as caught:
        run(script, max_restarts=0)
    assert caught.value.exit_code == 134


def test_training_goes_on_after_a_rank_was_killed(tmp_path: Path) -> None:
    (tmp_path / "kill1-3").touch()
    command = [sys.executable, toy.__file__, "work", "6", "0", str(tmp_path)]
    assert launch(command, LaunchOptions(log_dir=Path("logs"), nproc_per_node=2)) == 0
    assert toy.read(tmp_path) == (6, toy.expected(2, 6))
    assert "goes on from step 3" in log_of(0)


def test_the_command_line_starts_workers_with_its_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noted(command: list[str], options: LaunchOptions) -> int:
        seen.append((command, options))
        return 5

    monkeypatch.setattr(launcher, "launch", noted)
    words = "--nproc-per-node 2 run.dir=run parallel.dp=6 train.global_batch_sequences=12 "
    words += "--nnodes 3 --node-rank 1 --master-addr host --train.steps 4 --resume"
    assert cli.main(["train", "tiny", *words.split()]) == 5
    ((command, options),) = seen
    assert command[:4] == [sys.executable, "-m", "ostro", "train"]
    layout = ["parallel.dp=6", "train.global_batch_sequences=12"]
    assert command[4:] == ["tiny", "run.dir=run", *layout, "--train.steps", "4", "checkpoint.resume=must"]
    assert options == LaunchOptions(Path("run/logs"), nproc_per_node=2, nnodes=3, node_rank=1, master_addr="host")


def test_a_wrong_recipe_is_told_before_anything_is_started(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "tiny", "train.stepz=1", "--nproc-per-node", "2"]) == 2
    assert "Did you mean" in capfd.readouterr().err
    assert not Path("runs").exists()


def test_another_number_of_ranks_than_the_layouts_is_told_before_anything_is_started(
    capfd: pytest.CaptureFixture[str],
) -> None:
    layout = ["parallel.fsdp=2", "parallel.pp=2", "train.global_batch_sequences=8"]
    assert cli.main(["train", "tiny", *layout, "--nproc-per-node", "3"]) == 2
    assert "the layout fsdp2·pp2 is for 4 ranks and 3 were started" in capfd.readouterr().err
    assert not Path("runs").exists()


def test_in_the_background(capfd: pytest.CaptureFixture[str]) -> None:
    options = LaunchOptions(log_dir=Path("logs"), nproc_per_node=2)
    assert launcher.launch_ostro(["train", "--help"], options, in_background=True) == 0
    told = capfd.readouterr().out
    pid = int(told.split()[1])
    assert "tail -F logs/launcher.log" in told
    assert f"kill {pid}" in told
    assert os.getsid(pid) == pid
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "--nproc-per-node" in Path("logs/launcher.log").read_text()


def test_the_options_come_back_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(launcher, "launch_ostro", lambda arguments, options, in_background: seen.append(options) or 0)
    options = LaunchOptions(Path("a b"), 2, 3, 1, "host", 1234, 5.0, 0, 7.5)
    layout = ["parallel.dp=6", "train.global_batch_sequences=12"]
    assert cli.main(["train", "tiny", *layout, *options.arguments()]) == 0
    assert seen == [options]


@pytest.mark.skipif("OSTRO_TEST_TWO_HOSTS" not in os.environ, reason="takes three minutes: set OSTRO_TEST_TWO_HOSTS=1")
@pytest.mark.timeout(600)
def test_two_hosts(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-Urn", "true"], check=False).returncode:
        pytest.skip("this machine does not permit network namespaces to users")
    script = Path(__file__).with_name("two_hosts.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False, timeout=550
    )
    assert done.returncode == 0, done.stderr
    scenes = {row["scene"]: row for row in map(json.loads, done.stdout.splitlines())}
    lost = ("cable cut", "host killed and started again", "the store's host killed and started again")
    for scene in ("undisturbed", *lost):
        assert scenes[scene]["exit_codes"] == [0, 0]
        assert scenes[scene]["is_exact"]
    assert [scenes[scene]["starts"] for scene in lost] == [2, 2, 2]
    assert scenes["cable cut"]["stood_at"] < scenes["cable cut"]["step"]
    assert scenes["host gone for good"]["exit_codes"] == [1]
    assert scenes["error on one host"]["exit_codes"] == [3, 3]
    assert set(scenes["error on one host"]["told"]) == {"ostro: rank 1 read something bad."}
