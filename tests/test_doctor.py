"""Each check of the doctor passes on a good machine, and says so on a bad one."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import io
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ostro import device, doctor
from ostro.data import tokenizer
from ostro.errors import DataError

Usage = collections.namedtuple("Usage", "total used free")


@dataclasses.dataclass
class Forgetful:
    """A tokenizer that loses what it encodes."""

    vocab_size: int = 3

    def encode(self, text: str) -> list[int]:
        return [0] * len(text)

    def decode(self, ids: list[int]) -> str:
        return ""


def absent(*_: object, **__: object) -> None:
    return None


def broken_tokenizer(source: str) -> None:
    raise DataError(f"tokenizer {source!r} has no file: install mistral-common.")


def accelerated(monkeypatch: pytest.MonkeyPatch, free: int, total: int) -> None:
    """Pretend that torch sees two accelerators with `free` of `total` bytes each."""
    monkeypatch.setattr(device, "accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(device, "name", lambda found: "Wind 100")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (free, total))


def varlen_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "is_cuda", lambda found: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "varlen" in name else name)


def unwritable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)


BAD = {
    "old python": ("python", "fail", lambda m, _: m.setattr(doctor, "OLDEST_PYTHON", (4, 0))),
    "old torch": ("torch", "fail", lambda m, _: m.setattr(torch, "__version__", "2.10.1+cu128")),
    "no torch": ("torch", "fail", lambda m, _: m.setitem(sys.modules, "torch", None)),
    "no accelerator": (
        "device",
        "warn",
        lambda m, _: m.setattr(device, "accelerator", lambda: torch.device("cpu")),
    ),
    "busy accelerator": ("device", "warn", lambda m, _: accelerated(m, 10 * doctor.GIB, 80 * doctor.GIB)),
    "no varlen": ("attention", "fail", lambda m, _: varlen_missing(m)),
    "slow bf16": ("bf16", "warn", lambda m, _: m.setattr(device, "bf16_is_fast", lambda: False)),
    "slow products": (
        "matmul",
        "warn",
        lambda m, _: m.setattr(device, "peak_flops", lambda found, dtype: 1e9),
    ),
    "no compiler": ("compiler", "warn", lambda m, _: m.setattr(shutil, "which", absent)),
    "one core": ("cores", "warn", lambda m, _: m.setattr(doctor, "usable_cores", lambda: 1)),
    "small memory": ("memory", "fail", lambda m, _: m.setattr(doctor, "memory_limit_bytes", lambda: 2**31)),
    "full disk": ("disk", "fail", lambda m, _: m.setattr(shutil, "disk_usage", lambda path: Usage(9, 9, 0))),
    "narrow disk": (
        "disk",
        "warn",
        lambda m, _: m.setattr(shutil, "disk_usage", lambda path: Usage(9, 9, 5 * 10**9)),
    ),
    "unwritable cache": ("cache", "fail", unwritable),
    "no home": ("cache", "fail", lambda m, _: homeless(m)),
    "broken tokenizer": (
        "tokenizer",
        "fail",
        lambda m, _: m.setattr(tokenizer, "load_tokenizer", broken_tokenizer),
    ),
    "wrong tokenizer": (
        "tokenizer",
        "fail",
        lambda m, _: m.setattr(tokenizer, "load_tokenizer", lambda source: Forgetful()),
    ),
    "no tensorboard": ("tensorboard", "warn", lambda m, _: m.setattr(importlib.util, "find_spec", absent)),
}


@pytest.fixture(scope="module")
def loaded() -> tokenizer.Tokenizer:
    """The real tokenizer, loaded once: it takes most of the doctor's time."""
    return tokenizer.load_tokenizer("v1")


@pytest.fixture
def good(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loaded: tokenizer.Tokenizer) -> None:
    """A machine on which everything passes."""
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda source: loaded)
    accelerated(monkeypatch, 79 * doctor.GIB, 80 * doctor.GIB)
    monkeypatch.setattr(device, "bf16_is_fast", lambda: True)
    monkeypatch.setattr(device, "peak_flops", lambda found, dtype: 1e12)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor, "usable_cores", lambda: 2)
    monkeypatch.setattr(doctor, "memory_limit_bytes", lambda: 8 * doctor.GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9, 0, 10**12))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("good")
def test_a_good_machine_passes():
    checks = doctor.doctor()
    assert {check.name: check.status for check in checks} == {name: "pass" for name, _, _ in BAD.values()}
    assert not any(check.advice for check in checks)
    assert doctor.exit_status(checks) == 0
    assert "2 × Wind 100" in next(check.detail for check in checks if check.name == "device")


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize("case", BAD)
def test_each_check_can_fail(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    name, status, spoil = BAD[case]
    spoil(monkeypatch, tmp_path)
    checks = doctor.doctor()
    spoiled = [check for check in checks if check.status != "pass"]
    assert [(check.name, check.status) for check in spoiled] == [(name, status)]
    assert spoiled[0].advice.endswith(".")
    assert doctor.exit_status(checks) == (status == "fail")


def test_this_machine_is_looked_at_without_an_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checks = doctor.doctor()
    assert [check.name for check in checks] == [
        "python",
        "torch",
        "device",
        "attention",
        "bf16",
        "matmul",
        "compiler",
        "cores",
        "memory",
        "disk",
        "cache",
        "tokenizer",
        "tensorboard",
    ]


def test_memory_limit_is_the_smaller_of_machine_and_container(tmp_path: Path):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = tmp_path / "memory.max"
    assert doctor.memory_limit_bytes(limit) == machine
    limit.write_text("max\n")
    assert doctor.memory_limit_bytes(limit) == machine
    limit.write_text("1000\n")
    assert doctor.memory_limit_bytes(limit) == 1000


def test_render_shows_each_check_with_its_advice_and_counts():
    checks = [
        doctor.Check("python", "pass", "3.11"),
        doctor.Check("disk", "fail", "0.1 GiB free in [here]", "Free some space."),
    ]
    out = io.StringIO()
    doctor.render(checks, Console(file=out, width=100))
    assert [line.split() for line in out.getvalue().splitlines()] == [
        ["pass", "python", "3.11"],
        ["fail", "disk", "0.1", "GiB", "free", "in", "[here]"],
        ["Free", "some", "space."],
        ["1", "pass", "·", "0", "warn", "·", "1", "fail"],
    ]
