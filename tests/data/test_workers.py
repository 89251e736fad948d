"""A Ray cluster makes the same bytes as one process; what goes wrong there is a sentence here."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ostro.data import prepare as room
from ostro.data.prepare import Hands, prepare
from ostro.data.records import Unit
from ostro.data.tasks import Settings
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.data.workers import Crew
from ostro.errors import ConfigError, DataError, OutOfMemory


@pytest.fixture(scope="module")
def v1() -> Tokenizer:
    return load_tokenizer("v1")


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(room, "TASK_BYTES", 1)
    folder = tmp_path / "many"
    folder.mkdir()
    for at in range(4):
        lines = [json.dumps({"text": f"The wind rose {at} {number}. " * 9}) for number in range(at + 2)]
        (folder / f"{at}.jsonl").write_text("\n".join(lines) + '\n{"text": "the same"}\n', "utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@dataclasses.dataclass(frozen=True)
class Pid:
    """A task that says who did it, and does not end before somebody else has done one, too."""

    folder: Path

    def __call__(self, number: int, units: Sequence[Unit]) -> int:
        (self.folder / str(os.getpid())).touch()
        end = time.monotonic() + 60
        while len(list(self.folder.iterdir())) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        return os.getpid()


@dataclasses.dataclass(frozen=True)
class Killed:
    """A task whose process the system ends."""

    def __call__(self, number: int, units: Sequence[Unit]) -> int:
        os.kill(os.getpid(), 9)
        return 0


def test_ray_gives_the_same_bytes(tmp_path: Path, many: Path, v1: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Two workers of a local cluster; and the sentence of a bad record, and of a worker that is killed."""
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers have no path to the tests
    monkeypatch.chdir(tmp_path)
    chosen = Settings(dedup=True)
    prepare(["many"], tmp_path / "one", tokenizer=v1, settings=chosen, hands=Hands(1))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        address = ray.get_runtime_context().gcs_address
        prepare(["many"], tmp_path / "two", tokenizer=v1, settings=chosen, hands=Hands(ray=address))
        assert contents(tmp_path / "two") == contents(tmp_path / "one")
        (tmp_path / "pids").mkdir()
        here = [(number, [Unit("a", "text")]) for number in range(2)]
        with Crew(ray=address, num_bytes=0, warm=os.getpid) as crew:
            pids = dict(crew.done(Pid(tmp_path / "pids"), here))
        assert len({*pids.values(), os.getpid()}) == 3
        (many / "2.jsonl").write_text('{"text": "good"}\n{"text": 5}\n')
        with pytest.raises(DataError, match=r'2\.jsonl line 2: "text" must be a string, and is int'):
            prepare(["many"], tmp_path / "bad", tokenizer=v1, hands=Hands(ray=address))
        assert sorted(path.name for path in tmp_path.iterdir()) == [".bad.partial", "many", "one", "pids", "two"]
        with (
            Crew(ray=address, num_bytes=0, warm=os.getpid) as crew,
            pytest.raises(OutOfMemory, match=r"outside.*same command again"),
        ):
            list(crew.done(Killed(), here[:1]))
    finally:
        monkeypatch.undo()
        ray.shutdown()


def test_a_cluster_that_is_not_there(tmp_path: Path, many: Path, v1: Tokenizer):
    pytest.importorskip("ray")
    assert prepare([many], tmp_path / "out", tokenizer=v1, hands=Hands(1, (0, 2))) is None
    before = contents(tmp_path / ".out.partial")
    with pytest.raises(ConfigError, match=r"cluster '127.0.0.1:1' cannot be reached \(.*\): check --ray ADDRESS"):
        prepare([many], tmp_path / "out", tokenizer=v1, hands=Hands(ray="127.0.0.1:1"))
    assert contents(tmp_path / ".out.partial") == before  # what was done is gone on with


def test_without_ray_it_says_what_to_install(
    tmp_path: Path, many: Path, v1: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--ray needs the package ray: pip install 'ostro\[ray\]'"):
        prepare([many], tmp_path / "out", tokenizer=v1, hands=Hands(ray="auto"))
