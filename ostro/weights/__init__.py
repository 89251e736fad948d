"""Checkpoints: bytes on disk, in any format, as readers and writers of canonical tensors.

A new format is a file of its own with `detect`, `open_reader` and (where it can be written) `write`, and a
line in `FORMATS`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ostro.errors import ConfigError, WeightsError
from ostro.model.settings import ModelConfig
from ostro.weights import dcp, gguf, hf, lora_run, mindspore, mistral
from ostro.weights.adapters import Adapter
from ostro.weights.certify import certify, evict
from ostro.weights.hf_config import tokenizer_folder
from ostro.weights.located import located
from ostro.weights.merged import Merged, report
from ostro.weights.store import (
    NO_HINTS,
    CastReader,
    Difference,
    Hints,
    ModuleReader,
    OnRead,
    RandomReader,
    Reader,
    TensorInfo,
    Watched,
    Where,
    compare,
    digest,
    load_into,
)
from ostro.weights.stored import StoredReader
from ostro.weights.upcycle import open_upcycled

__all__ = [
    "FORMATS",
    "NO_HINTS",
    "CastReader",
    "Converted",
    "Difference",
    "Format",
    "Hints",
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
    "located",
    "open_reader",
    "prove",
    "tokenizer_folder",
]


@dataclasses.dataclass(frozen=True)
class Format:
    """A checkpoint format.

    `what` describes it in an error; `detect(path)` says whether a path looks like it; `open_reader(path, hints)`
    opens one; `write(reader, path, …)` writes one and may return notes on it, None where the format cannot be
    written. `hints` are those it can use beside the format's own name.
    """

    name: str
    what: str
    detect: Callable[[Path], bool]
    open_reader: Callable[..., Reader]
    write: Callable[..., Sequence[str] | None] | None
    hints: tuple[str, ...] = ()


FORMATS = {
    # Before the format that its checkpoints have.
    "lora": Format("lora", lora_run.WHAT, lora_run.detect, lora_run.open_reader, None, ("step",)),
    "dcp": Format("dcp", dcp.WHAT, dcp.detect, dcp.open_reader, dcp.write, ("step", "partial")),
    "mindspore": Format(
        "mindspore",
        mindspore.WHAT,
        mindspore.detect,
        mindspore.open_reader,
        mindspore.write,
        ("model", "strategy", "step", "partial"),
    ),
    # Told from the one above when its tensors are seen.
    "mindspore-gmm": Format(
        "mindspore-gmm",
        mindspore.WHAT,
        lambda path: False,
        mindspore.open_reader,
        functools.partial(mindspore.write, is_gmm=True),
        ("model", "strategy", "step", "partial"),
    ),
    "mistral": Format("mistral", mistral.WHAT, mistral.detect, mistral.open_reader, mistral.write, ("model",)),
    "gguf": Format("gguf", gguf.WHAT, gguf.detect, gguf.open_reader, gguf.write),
    # Last: a folder of any other format may have a config.json too.
    "hf": Format("hf", hf.WHAT, hf.detect, hf.open_reader, hf.write, ("model",)),
    # Not a path: opened as open_reader(model, seed).
    "random": Format("random", "random weights", lambda path: False, RandomReader, None),
}


def detect(path: str | Path) -> str:
    """Return the name of the format a path holds; WeightsError if there is nothing or nothing known."""
    path = located(path)
    if not path.exists():
        raise WeightsError(f"{path} does not exist: give a checkpoint or a run directory.")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise WeightsError(f"{path} is a LoRA adapter and no model: give the model it is for, and it with --adapter.")
    for name, format in FORMATS.items():
        if format.detect(path):
            return name
    known = " nor ".join(dict.fromkeys(format.what for format in FORMATS.values() if format.name != "random"))
    raise WeightsError(f"{path} holds neither {known}: give the folder that does.")


def open_reader(path: str | Path, hints: Hints = NO_HINTS, *, check: bool = True) -> Reader:
    """Open a checkpoint of any format, or the newest one of a run directory.

    With `check` every tensor the model needs must be there, with its shape, and nothing else.
    """
    path = located(path)  # absolute, since what lies around it matters: rank folders, strategies
    try:
        format = FORMATS[hints.format or detect(path)]
        for field in dataclasses.fields(hints):
            if getattr(hints, field.name) is not None and field.name not in ("format", *format.hints):
                raise ConfigError(
                    f"--{field.name} says nothing about {path}, which is of format {format.name}: leave it out."
                )
        reader = format.open_reader(path, hints)
        if check and not hints.partial and isinstance(reader, StoredReader):
            reader.check()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error}): check its permissions.") from error
    return reader


@dataclasses.dataclass(frozen=True)
class Start:
    """What a training starts from: a checkpoint, a dense one to be upcycled, or (no path) random weights."""

    path: str | None
    model: ModelConfig
    seed: int
    strategy: str | None = None
    upcycle: bool = False

    def open(self, *, is_part: bool = False) -> Reader:
        """Open it; with `is_part` a training checkpoint may lack what other hosts' ranks have."""
        if self.path is None:
            return RandomReader(self.model, self.seed)
        if self.upcycle:
            return open_upcycled(located(self.path), self.model, self.seed)
        format = detect(self.path)
        hints = Hints(partial=(is_part and "partial" in FORMATS[format].hints) or None)
        if self.strategy:
            hints = dataclasses.replace(hints, strategy=Path(self.strategy))
        if format.startswith("mindspore"):  # which seldom says its model
            hints = dataclasses.replace(hints, model=dataclasses.replace(self.model, router="softmax"))
        return open_reader(self.path, hints)


@dataclasses.dataclass(frozen=True)
class Converted:
    """What there is to say about a checkpoint that was written: `notes` for its user, and the sha256 of its tensors'
    bytes if they were read back."""

    notes: tuple[str, ...] = ()
    sha256: str | None = None


def convert(
    src: str | Path | Reader,
    dst: str | Path,
    *,
    to: str,
    dtype: torch.dtype | None = None,
    keep_fp32: bool = False,
    verify: bool = False,
    adapter: Adapter | None = None,
    on_read: OnRead | None = None,
    **settings: Any,
) -> Converted:
    """Write the checkpoint `src` (a path, or a reader) as format `to` to the new path `dst`.

    `dtype` None keeps each tensor's own; `keep_fp32` leaves norms and router in fp32 whatever it is. An `adapter` is
    merged into it, and the notes say how much each matrix moved. `settings` are those of the format's `write`. The
    tokenizer files of a Hugging Face folder come along into another unless `tokenizer` says otherwise. `on_read` is
    told each tensor that is about to be read, and how many bytes were. With `verify` the source's checksums and the
    copies its ranks hold are compared first, and afterwards both sides are read once more and compared bit for bit, the
    target from the disk. Nothing stays of a conversion that fails.
    """
    dst = Path(os.path.abspath(dst))
    writable = [name for name, format in FORMATS.items() if format.write]
    write = FORMATS[to].write if to in FORMATS else None
    if write is None:
        raise WeightsError(f"checkpoints cannot be written as {to!r}: use {' or '.join(writable)}.")
    reader = open_reader(src) if isinstance(src, str | Path) else src
    if isinstance(reader, StoredReader):
        if verify:
            reader.certify()
        if to == "hf" and reader.format == "hf":
            settings.setdefault("tokenizer", tokenizer_folder(reader.path))
    source = reader if dtype is None else CastReader(reader, dtype, keep_fp32=keep_fp32)
    if adapter is not None:
        source = Merged(reader, adapter, source.names())
    notes = tuple(write(Watched(source, on_read) if on_read else source, dst, **settings) or ())
    told = report(source) if isinstance(source, Merged) else ()
    return Converted((*notes, *told), prove(source, dst, to, **settings) if verify else None)


def prove(meant: Reader, dst: Path, to: str, **settings: Any) -> str:
    """Return the sha256 of the tensors at `dst`, having read them from the disk and compared every bit with `meant`.

    Raises WeightsError for any difference; what was written stays, for whoever looks into it.
    """
    evict(dst)
    hints = Hints(format=to, model=meant.model if "model" in FORMATS[to].hints else None)
    written = open_reader(dst, hints)
    if isinstance(written, StoredReader):
        written.certify()
    if to == "gguf":
        meant = gguf.as_stored(meant, settings.get("quantization"))
    if "optimizer" in settings and isinstance(written, StoredReader):
        found = mindspore.moments(written)
        for prefix, moment in mindspore.moments(settings["optimizer"]).items():
            certify(moment, found[prefix])
    return certify(meant, written)
