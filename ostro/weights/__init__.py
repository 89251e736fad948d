"""Checkpoints: bytes on disk, in any format, as readers and writers of canonical tensors.

A new format is a file of its own with `detect`, `open_reader` and (where it can be written) `write`, and a
line in `FORMATS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ostro.errors import WeightsError
from ostro.weights import dcp, hf
from ostro.weights.store import (
    Difference,
    ModuleReader,
    RandomReader,
    Reader,
    TensorInfo,
    Where,
    compare,
    digest,
    load_into,
)

__all__ = [
    "FORMATS",
    "Difference",
    "Format",
    "ModuleReader",
    "RandomReader",
    "Reader",
    "TensorInfo",
    "Where",
    "compare",
    "convert",
    "detect",
    "digest",
    "load_into",
    "open_reader",
]


@dataclasses.dataclass(frozen=True)
class Format:
    """A checkpoint format.

    `what` describes it in an error; `detect(path)` says whether a path looks like it; `open_reader(path)`
    opens one; `write(reader, path, *, dtype, …)` writes one, None where the format cannot be written.
    """

    name: str
    what: str
    detect: Callable[[Path], bool]
    open_reader: Callable[..., Reader]
    write: Callable[..., None] | None


FORMATS = {
    "hf": Format("hf", hf.WHAT, hf.detect, hf.open_reader, hf.write),
    "dcp": Format("dcp", dcp.WHAT, dcp.detect, dcp.open_reader, dcp.write),
    # Not a path: opened as open_reader(model, seed).
    "random": Format("random", "random weights", lambda path: False, RandomReader, None),
}


def detect(path: str | Path) -> str:
    """Return the name of the format a path holds; WeightsError if there is nothing or nothing known."""
    path = Path(path)
    if not path.exists():
        raise WeightsError(f"{path} does not exist: give a checkpoint or a run directory.")
    for name, format in FORMATS.items():
        if format.detect(path):
            return name
    known = " nor ".join(format.what for format in FORMATS.values() if format.name != "random")
    raise WeightsError(f"{path} holds neither {known}: give the folder that does.")


def open_reader(path: str | Path) -> Reader:
    """Open a checkpoint of any format, or the newest one of a run directory."""
    try:
        return FORMATS[detect(path)].open_reader(Path(path))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error}): check its permissions.") from error


def convert(
    src: str | Path | Reader, dst: str | Path, *, to: str, dtype: torch.dtype | None = None, **settings: Any
) -> None:
    """Write the checkpoint `src` (a path, or a reader) as format `to` into the new folder `dst`.

    `dtype` None keeps each tensor's own; `settings` are those of the format's `write`. The tokenizer files of
    a Hugging Face folder come along into another unless `tokenizer` says otherwise.
    """
    writable = [name for name, format in FORMATS.items() if format.write]
    write = FORMATS[to].write if to in FORMATS else None
    if write is None:
        raise WeightsError(f"checkpoints cannot be written as {to!r}: use {' or '.join(writable)}.")
    reader = open_reader(src) if isinstance(src, str | Path) else src
    if to == "hf" and isinstance(reader, hf.HfReader):
        settings.setdefault("tokenizer", hf.tokenizer_folder(reader.path))
    write(reader, Path(dst), dtype=dtype, **settings)
