"""Folders that appear whole or not at all: written beside their place, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from ostro.errors import Error, OutOfMemory, WeightsError
from ostro.log import size

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def written_beside(target: Path, *, needed_bytes: int, replace: bool = False, is_file: bool = False) -> Iterator[Path]:
    """Give a fresh folder beside `target`; when the block ends, sync it and rename it to `target`.

    With `is_file` the path given is that of a file, which the block writes. If the block raises, nothing is left
    behind. A target that exists and is not empty raises WeightsError before anything is written, unless
    `replace`; too little free space raises OutOfMemory.
    """
    target = Path(os.path.realpath(target))
    made: list[Path] = []
    partial = _beside(target)
    try:
        _require_free(target, replace, is_file)
        made = _make_parents(target.parent)
        free_bytes = shutil.disk_usage(target.parent).free
        if free_bytes < needed_bytes:
            raise OutOfMemory(
                f"{target} needs {size(needed_bytes)}, its disk has {size(free_bytes)} free: "
                "free some space or choose another disk."
            )
        if not is_file:
            partial.mkdir()
        yield partial
        _sync(partial)
        _rename(partial, target, replace, is_file)
        made = []
    except OSError as error:
        raise not_written(target, error) from error
    finally:
        with _undisturbed():
            partial.unlink(missing_ok=True) if is_file else shutil.rmtree(partial, ignore_errors=True)
            for parent in reversed(made):
                with contextlib.suppress(OSError):
                    parent.rmdir()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let no second interrupt break off the clearing up after the first."""
    words = ("SIGINT", "SIGTERM", "SIGHUP")
    signals = [getattr(signal, word) for word in words if hasattr(signal, word)]
    if threading.current_thread() is not threading.main_thread():
        signals = []
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def not_written(target: Path, error: OSError) -> Error:
    """Return the error to raise when the system refused to write to `target`."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return OutOfMemory(
            f"{target} could not be written whole ({reason}) and nothing of it was kept: free some space or "
            "choose another disk."
        )
    return WeightsError(f"{target} cannot be written ({reason}): choose another place or change its permissions.")


def _beside(target: Path) -> Path:
    return target.parent / f"{target.name}.partial-{secrets.token_hex(4)}"


def _require_free(target: Path, replace: bool, is_file: bool) -> None:
    if is_file:
        if target.exists():
            raise WeightsError(f"{target} exists: choose another name or remove it.")
    elif target.is_dir():
        if not replace and any(target.iterdir()):
            raise WeightsError(f"{target} exists and is not empty: choose another folder or remove it.")
        if target == Path.cwd() or target.is_mount():
            raise WeightsError(f"{target} is where a disk is mounted or you stand: name a new folder inside it.")
    elif target.exists():
        raise WeightsError(f"{target} is a file where a folder is to be written: choose another name.")


def _make_parents(parent: Path) -> list[Path]:
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename(partial: Path, target: Path, replace: bool, is_file: bool) -> None:
    if replace and target.is_dir():
        # Two renames, since a folder cannot take the place of a full one; a crash between them loses both.
        old = _beside(target)
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    elif is_file:
        # A rename would replace a file that has appeared meanwhile; a link refuses to.
        os.link(partial, target)
        partial.unlink()
    else:
        partial.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
