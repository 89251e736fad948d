"""What this machine has, and whether Ostro can work with it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ostro.data.shards import cache_dir
from ostro.errors import Error
from ostro.machine import memory_limit_bytes, usable_cores

if TYPE_CHECKING:
    from rich.console import Console

Status = Literal["pass", "warn", "fail"]

GIB = 2**30
OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 11)
DEMO_MEMORY_BYTES = 4_000_000_000
FULL_DISK_BYTES = 1_000_000_000
ROOMY_DISK_BYTES = 20_000_000_000
# One core with AVX2 or NEON reaches more.
SLOW_FLOPS = 20e9


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing looked at: what is true (`detail`) and, unless it passes, what to do about it (`advice`)."""

    name: str
    status: Status
    detail: str
    advice: str = ""


def doctor() -> list[Check]:
    """Look at everything Ostro needs or would use, in the order in which it is needed; takes about a second.

    Where torch cannot be imported, its check fails and those that need it are left out.
    """
    checks = [check_python(), check_torch()]
    if checks[-1].status != "fail":
        checks += [check_device(), check_attention(), check_bf16(), check_product_rate(), check_compiler()]
    return [
        *checks,
        check_cores(),
        check_memory(),
        check_disk(),
        check_cache(),
        check_tokenizer(),
        check_tensorboard(),
    ]


def exit_status(checks: Iterable[Check]) -> int:
    """Return 1 where a check failed, else 0; warnings do not count."""
    return int(any(check.status == "fail" for check in checks))


def render(checks: Iterable[Check], console: Console | None = None) -> None:
    """Print a row a check, what to do under what is true, and a closing line; on stdout by default."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    checks = list(checks)
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for check in checks:
        told = Text(check.detail)
        if check.advice:
            told.append(f"\n{check.advice}", style="dim")
        table.add_row(Text(check.status, style=_STYLES[check.status]), check.name, told)
    counts = [(sum(check.status == status for check in checks), status) for status in _STYLES]
    console = console or Console()
    console.print(table)
    console.print(Text(" " + " · ".join(f"{count} {status}" for count, status in counts), style="bold"))


_STYLES: dict[Status, str] = {"pass": "green", "warn": "yellow", "fail": "bold red"}


def check_python() -> Check:
    """Python 3.11 or newer."""
    detail = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        return Check("python", "fail", detail, "Ostro needs Python 3.11 or newer: install one and make a new .venv.")
    return Check("python", "pass", detail)


def check_torch() -> Check:
    """torch 2.11 or newer that can be imported."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("torch", "fail", f"cannot be imported: {error}", "Run make setup, or install torch 2.13.0.")
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        return Check("torch", "fail", torch.__version__, "Ostro needs torch 2.11 or newer: install torch 2.13.0.")
    return Check("torch", "pass", torch.__version__)


def check_device() -> Check:
    """Which accelerator torch sees, how many of them, and their memory."""
    import torch

    from ostro import device

    found = device.accelerator()
    if found.type == "cpu":
        advice = "Enough for the demo and small models; Mixtral-8x7B wants GPUs or NPUs, and torch built for them."
        return Check("device", "warn", "no accelerator: everything runs on the CPU", advice)
    detail = f"{torch.accelerator.device_count()} × {device.name(found)} ({found.type})"
    try:
        free, total = torch.accelerator.get_memory_info()
        detail += f", {free / GIB:.0f} of {total / GIB:.0f} GiB free"
    except (RuntimeError, NotImplementedError):  # a backend that does not tell
        return Check("device", "pass", detail)
    if free < total / 2:
        return Check("device", "warn", detail, "Other processes hold most of its memory: stop them first.")
    return Check("device", "pass", detail)


def check_attention() -> Check:
    """Which attention `ostro.model.attention` will choose for bf16 on this device."""
    from ostro import device

    found = device.accelerator()
    if not device.is_cuda(found):
        return Check("attention", "pass", "documents: causal attention document by document")
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        advice = "This torch has no torch.nn.attention.varlen: install torch 2.13.0."
        return Check("attention", "fail", "varlen cannot be imported", advice)
    return Check("attention", "pass", "varlen: flash attention over packed documents")


def check_bf16() -> Check:
    """Whether the CPU multiplies bf16 at full speed."""
    from ostro import device

    if device.bf16_is_fast():
        return Check("bf16", "pass", "this CPU multiplies bf16 at least as fast as fp32")
    advice = "Ostro computes products of bf16 operands in fp32 here; there is nothing to do."
    return Check("bf16", "warn", "this CPU multiplies bf16 more slowly than fp32", advice)


def check_product_rate() -> Check:
    """The rate of a large matrix product, which MFU is measured against."""
    import torch

    from ostro import device

    found = device.accelerator()
    dtype = torch.float32 if found.type == "cpu" else torch.bfloat16
    flops = device.peak_flops(found, dtype)
    detail = f"{flops / 1e12:.3g} TFLOP/s in {str(dtype).removeprefix('torch.')}"
    if flops < SLOW_FLOPS:
        return Check("matmul", "warn", detail, "That is slow: see whether other programs keep the cores busy.")
    return Check("matmul", "pass", detail)


def check_compiler() -> Check:
    """A C++ compiler, which torch.compile needs on the CPU."""
    names = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    found = next((path for path in map(shutil.which, filter(None, names)) if path), None)
    if found is None:
        return Check("compiler", "warn", "no C++ compiler", "torch.compile needs one: install g++ or clang.")
    return Check("compiler", "pass", found)


def check_cores() -> Check:
    """The cores this process may use."""
    num_cores = usable_cores()
    detail = f"{num_cores} usable of {os.cpu_count()}"
    if num_cores < 2:
        return Check("cores", "warn", detail, "The demo is made for two cores; it takes longer on one.")
    return Check("cores", "pass", detail)


def check_memory() -> Check:
    """The memory this process may use: the machine's, or its container's limit."""
    limit = memory_limit_bytes()
    detail = f"{limit / GIB:.1f} GiB"
    if limit < DEMO_MEMORY_BYTES:
        return Check("memory", "fail", detail, "The demo needs 4 GB: use a larger machine or raise the limit.")
    return Check("memory", "pass", detail)


def check_disk() -> Check:
    """Free space where runs are written: the current folder."""
    try:
        folder = Path.cwd()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Check("disk", "fail", f"the current folder cannot be read: {error}", "Start from another one.")
    detail = f"{free / GIB:.1f} GiB free in {folder}"
    if free < FULL_DISK_BYTES:
        advice = "Prepared text and checkpoints are written here: free some space, or start elsewhere."
        return Check("disk", "fail", detail, advice)
    if free < ROOMY_DISK_BYTES:
        return Check("disk", "warn", detail, "Enough for small models; one copy of Mixtral-8x7B takes 93 GB.")
    return Check("disk", "pass", detail)


def check_cache() -> Check:
    """Whether files can be written where downloaded and prepared data is kept."""
    advice = "Make it writable, or set XDG_CACHE_HOME to a folder that is."
    try:
        folder = cache_dir()
    except RuntimeError:  # pathlib's, for a user without a home
        return Check("cache", "fail", "this user has no home folder", advice)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Check("cache", "fail", f"{folder} cannot be written: {error.strerror or error}", advice)
    return Check("cache", "pass", str(folder))


def check_tokenizer() -> Check:
    """Whether Mixtral's own tokenizer, which mistral-common ships, loads and gives a text back."""
    from ostro.data.tokenizer import load_tokenizer

    text = "eight winds"
    try:
        tokenizer = load_tokenizer("v1")
    except (Error, ImportError) as error:
        return Check("tokenizer", "fail", str(error), "Run make setup again: mistral-common brings its files.")
    if tokenizer.decode(tokenizer.encode(text)) != text:
        advice = "Install the versions of constraints.txt."
        return Check("tokenizer", "fail", f"v1 does not give {text!r} back", advice)
    return Check("tokenizer", "pass", f"v1, {tokenizer.vocab_size} pieces")


def check_tensorboard() -> Check:
    """Whether TensorBoard is installed; without it runs write metrics.jsonl only."""
    if importlib.util.find_spec("tensorboard") is None:
        advice = "pip install 'ostro[tensorboard]' draws curves; metrics.jsonl is written without it."
        return Check("tensorboard", "warn", "not installed", advice)
    return Check("tensorboard", "pass", "installed")
