"""Two hosts on one machine: two network namespaces with an address each, joined by a cable that can be cut.

Needs Linux, and user namespaces or root. `python tests/parallel/two_hosts.py FOLDER` starts itself anew inside a
namespace of its own, then trains across both hosts while the cable is cut in mid-step and joined again, and while one
host's launcher and workers are killed and started again; it prints a JSON line a scene.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import toy

ADDRESSES = ("10.77.0.1", "10.77.0.2")
STEPS, STEP_SECONDS, PROCESSES = 60, 0.1, 1
TIMEOUT_SECONDS, RDZV_SECONDS = 5, 90


class Hosts:
    """Two namespaces, each kept by a sleeping process, and a veth pair between them."""

    def __init__(self) -> None:
        self.keepers = [subprocess.Popen(["unshare", "-n", "sleep", "1000"]) for _ in ADDRESSES]
        time.sleep(0.5)  # until unshare has made them
        run("ip", "link", "add", "cable0", "type", "veth", "peer", "name", "cable1")
        for index, (keeper, address) in enumerate(zip(self.keepers, ADDRESSES, strict=True)):
            run("ip", "link", "set", f"cable{index}", "netns", str(keeper.pid))
            self.on(index, "ip", "link", "set", "lo", "up").wait()
            self.on(index, "ip", "addr", "add", f"{address}/24", "dev", f"cable{index}").wait()
            self.on(index, "ip", "link", "set", f"cable{index}", "up").wait()

    def on(self, index: int, *command: str, **options: object) -> subprocess.Popen:
        return subprocess.Popen(["nsenter", "-t", str(self.keepers[index].pid), "-n", *command], **options)

    def cable(self, state: str) -> None:
        self.on(1, "ip", "link", "set", "cable1", state).wait()

    def launch(self, index: int, folder: Path, **options: object) -> subprocess.Popen:
        own = {
            "log_dir": str(folder / "logs"),
            "nproc_per_node": PROCESSES,
            "nnodes": 2,
            "node_rank": index,
            "master_addr": ADDRESSES[0],
            "rdzv_timeout": RDZV_SECONDS,
            "timeout_seconds": TIMEOUT_SECONDS,
        }
        words = ["launch", str(STEPS), str(STEP_SECONDS), str(folder), "--", json.dumps(own | options)]
        with (folder / f"launcher{index}.log").open("ab") as log:
            return self.on(index, sys.executable, toy.__file__, *words, stdout=log, stderr=log, start_new_session=True)

    def close(self) -> None:
        for keeper in self.keepers:
            keeper.kill()


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def wait_for_step(folder: Path, step: int, seconds: float = 60) -> int:
    deadline = time.monotonic() + seconds
    while toy.read(folder)[0] < step:
        if time.monotonic() > deadline:
            raise TimeoutError(f"step {toy.read(folder)[0]} of {step} after {seconds} s")
        time.sleep(0.02)
    return toy.read(folder)[0]


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def report(scene: str, folder: Path, launchers: list[subprocess.Popen], start: float, **more: object) -> None:
    codes = [launcher.wait(timeout=150) for launcher in launchers]
    step, state = toy.read(folder)
    told = {
        "scene": scene,
        "exit_codes": codes,
        "step": step,
        "is_exact": state == toy.expected(2 * PROCESSES, STEPS),
        "starts": (folder / "logs" / "rank0.log").read_text().count("--- rank 0"),
        "seconds": round(time.monotonic() - start, 1),
    }
    print(json.dumps(told | more), flush=True)


def undisturbed(hosts: Hosts, folder: Path) -> None:
    start = time.monotonic()
    report("undisturbed", folder, [hosts.launch(index, folder) for index in (0, 1)], start)


def cut(hosts: Hosts, folder: Path) -> None:
    start = time.monotonic()
    launchers = [hosts.launch(index, folder) for index in (0, 1)]
    at = wait_for_step(folder, 10)
    hosts.cable("down")
    time.sleep(TIMEOUT_SECONDS + 6)
    stood_at = toy.read(folder)[0]
    hosts.cable("up")
    report("cable cut", folder, launchers, start, cut_at=at, stood_at=stood_at)


def killed(hosts: Hosts, folder: Path) -> None:
    start = time.monotonic()
    launchers = [hosts.launch(index, folder) for index in (0, 1)]
    at = wait_for_step(folder, 10)
    kill_host(folder, launchers[1])
    time.sleep(1)
    launchers[1] = hosts.launch(1, folder)
    report("host killed and started again", folder, launchers, start, killed_at=at)


def gone(hosts: Hosts, folder: Path) -> None:
    start = time.monotonic()
    launchers = [hosts.launch(index, folder, rdzv_timeout=20) for index in (0, 1)]
    wait_for_step(folder, 10)
    kill_host(folder, launchers[1])
    report("host gone for good", folder, launchers[:1], start)


def failed(hosts: Hosts, folder: Path) -> None:
    start = time.monotonic()
    (folder / "fail1-10").touch()
    launchers = [hosts.launch(index, folder) for index in (0, 1)]
    for launcher in launchers:
        launcher.wait(timeout=100)
    last = [(folder / f"launcher{index}.log").read_text().splitlines()[-1] for index in (0, 1)]
    report("error on one host", folder, launchers, start, told=last)


def store_killed(hosts: Hosts, folder: Path) -> None:
    start = time.monotonic()
    launchers = [hosts.launch(index, folder) for index in (0, 1)]
    at = wait_for_step(folder, 10)
    kill_host(folder, launchers[0], node_rank=0)
    time.sleep(1)
    launchers[0] = hosts.launch(0, folder)
    report("the store's host killed and started again", folder, launchers, start, killed_at=at)


def kill_host(folder: Path, launcher: subprocess.Popen, node_rank: int = 1) -> None:
    """End a host's launcher and workers at once, as a power cut would: nothing is said to anybody."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            variables = path.read_bytes().split(b"\0")
            if (
                f"GROUP_RANK={node_rank}".encode() in variables
                and f"OSTRO_LOG_DIR={folder / 'logs'}".encode() in variables
            ):
                os.kill(int(path.parent.name), signal.SIGKILL)
    launcher.kill()
    launcher.wait()


SCENES = {
    "undisturbed": undisturbed,
    "cut": cut,
    "killed": killed,
    "gone": gone,
    "failed": failed,
    "store": store_killed,
}


def main() -> None:
    folder, scenes = Path(sys.argv[1]).resolve(), sys.argv[2:] or list(SCENES)
    if os.environ.get("OSTRO_IN_NAMESPACE") != "1":
        os.environ |= {"OSTRO_IN_NAMESPACE": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        os.execvp("unshare", ["unshare", "-Urn", sys.executable, __file__, *sys.argv[1:]])
    hosts = Hosts()
    try:
        for scene in scenes:
            SCENES[scene](hosts, fresh(folder / scene))
    finally:
        hosts.close()


if __name__ == "__main__":
    main()
