"""The verb `convert`: what was asked on the command line, what is said on the way, and how it ends."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ostro import log, weights
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.degrees import Degrees, host_ranks, parse
from ostro.errors import ConfigError, Error, nearest
from ostro.inspection import described, hints_of
from ostro.log import size
from ostro.model.settings import ModelConfig
from ostro.serve.engine import tokenizer_beside, torch_dtype
from ostro.weights import CastReader, Reader, Where
from ostro.weights.mindspore_layout import MindSporeDegrees

_SUFFIXES = {".ckpt": "mindspore", ".gguf": "gguf"}
_BUILT_IN = {32000: "v1", 32768: "v3"}  # the vocabularies whose tokenizer mistral-common brings along
_LAYOUTS: dict[str, type[Degrees] | type[MindSporeDegrees]] = {
    "dcp": Degrees,
    "mindspore": MindSporeDegrees,
    "mindspore-gmm": MindSporeDegrees,
}
# Which formats an option of one format is for.
_ONLY = {
    "layout": tuple(_LAYOUTS),
    "host": tuple(_LAYOUTS),
    "optimizer": ("mindspore", "mindspore-gmm"),
    "qkv_concat": ("mindspore", "mindspore-gmm"),
    "quantize": ("gguf",),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked, in the words of the command line; None and False where nothing was."""

    source: str
    target: Path
    to: str | None = None
    format: str | None = None
    model: str | None = None
    strategy: Path | None = None
    step: int | None = None
    dtype: str | None = None
    keep_fp32: bool = False
    tokenizer: str | None = None
    layout: str | None = None
    host: str | None = None
    optimizer: bool = False
    qkv_concat: bool = False
    quantize: str | None = None
    verify: bool = False


def convert(asked: Request, say: Callable[[str], None]) -> None:
    """Convert, saying what the source is, what was chosen, what was written and how it was proved.

    Raises ConfigError for options that do not go together, WeightsError and OutOfMemory as the formats do: the target
    is then as it was before.
    """
    to = asked.to or _SUFFIXES.get(asked.target.suffix, "hf")
    _require_fitting(asked, to)
    reader = weights.open_reader(asked.source, hints_of(asked.format, asked.model, asked.strategy, asked.step))
    say(f"{asked.source}: {described(reader)}")
    for note in reader.notes:
        say(f"  {note}")
    words = _tokenizer(asked, reader.model)
    settings = _settings(asked, to, reader, words)
    if asked.dtype:
        reader = CastReader(reader, torch_dtype(asked.dtype), keep_fp32=asked.keep_fp32)
    watched = _Watched(reader)
    start = time.perf_counter()
    with _interruptible(watched, asked.target, say):
        made = weights.convert(watched, asked.target, to=to, **settings)
    seconds = time.perf_counter() - start
    say(f"wrote {asked.target} as {to}, {size(watched.num_bytes)} of tensors in {seconds:.1f} s")
    if words is None and not asked.target.is_file():
        say("  without a tokenizer: none that fits lies beside the source; name one with --tokenizer")
    for note in made.notes:
        say(f"  {note}")
    if asked.verify:
        sha256 = weights.prove(reader, asked.target, to, **settings)
        say(f"  read back and compared: every bit is as meant, sha256 of all tensors {sha256}")


def _require_fitting(asked: Request, to: str) -> None:
    writable = [name for name, format in weights.FORMATS.items() if format.write]
    if to not in writable:
        raise ConfigError(f"--to {to} is not one of {', '.join(writable)}.{nearest(to, writable)}")
    for option, formats in _ONLY.items():
        if getattr(asked, option) and to not in formats:
            raise ConfigError(
                f"--{option.replace('_', '-')} is for {' and '.join(formats)}, not for {to}: leave it out."
            )
    if asked.keep_fp32 and asked.dtype is None:
        raise ConfigError("--keep-fp32 says what --dtype is to leave alone: give --dtype too.")
    if asked.host and not asked.layout:
        raise ConfigError("--host says whose part of a --layout to write: give --layout too.")
    if asked.host and asked.verify:
        raise ConfigError("--verify reads a whole checkpoint back, and --host writes a part: give one of the two.")
    if asked.target.suffix in _SUFFIXES and not to.startswith(_SUFFIXES[asked.target.suffix]):
        raise ConfigError(f"{asked.target} names a {_SUFFIXES[asked.target.suffix]} file, --to {to} writes a folder.")


def _settings(asked: Request, to: str, reader: Reader, words: Tokenizer | Path | None) -> dict[str, Any]:
    """Return the settings of the format's `write`."""
    settings: dict[str, Any] = {"tokenizer": words.save if isinstance(words, Tokenizer) else words}
    if asked.layout:
        degrees = settings["degrees"] = parse(asked.layout, _LAYOUTS[to])
        degrees.check(reader.model)
        if asked.host:
            index, count = _host(asked.host)
            ranks = host_ranks(degrees.num_ranks, index, count)
            settings |= {"host": (index, count)} if to == "dcp" else {"host_ranks": ranks}
    if asked.optimizer and not reader.format.startswith("mindspore"):
        raise ConfigError(
            f"--optimizer keeps the state of a MindSpore checkpoint, and this is {reader.format}: leave it out."
        )
    if asked.optimizer:
        settings["optimizer"] = reader
    if asked.qkv_concat:
        settings["qkv_concat"] = True
    if asked.quantize:
        settings["quantization"] = asked.quantize
    return settings


def _host(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(count)):
        raise ConfigError(f"--host {text!r} must be i/n, hosts counted from 0: --host 0/2.")
    return int(index), int(count)


def _tokenizer(asked: Request, model: ModelConfig) -> Tokenizer | Path | None:
    """Return the tokenizer that goes along: as asked, the source's own, or the one of the vocabulary's size."""
    if asked.tokenizer is not None:
        words = load_tokenizer(asked.tokenizer)
        if words.vocab_size > model.vocab_size:
            raise ConfigError(
                f"--tokenizer {asked.tokenizer} has {words.vocab_size} pieces and the model {model.vocab_size}: they "
                "do not belong together."
            )
        return words
    folder = weights.tokenizer_folder(Path(asked.source))
    if folder is not None:
        return folder
    found = tokenizer_beside(asked.source)
    if found is None and model.vocab_size in _BUILT_IN:
        found = load_tokenizer(_BUILT_IN[model.vocab_size])
    return found if found is not None and found.vocab_size <= model.vocab_size else None


class _Watched:
    """A reader that shows how far it was read."""

    def __init__(self, source: Reader) -> None:
        self.format, self.model, self.notes = source.format, source.model, source.notes
        self.num_bytes, self.name = 0, ""
        self._source = source
        self._infos = source.names()
        self._total = sum(info.num_bytes for info in self._infos.values())
        self._line = log.ByteProgress(self._total, "converted")

    def names(self) -> Any:
        """Return the source's tensors."""
        return self._infos

    def read(self, name: str, where: Where = ()) -> Tensor:
        """Read, and show."""
        value = self._source.read(name, where)
        self.num_bytes += value.nbytes
        self.name = name
        self._line.show(self.num_bytes)
        return value

    @property
    def so_far(self) -> str:
        """Where it is, for an error."""
        return f"it stopped at {self.name}, after {size(self.num_bytes)} of {size(self._total)}"

    def close(self) -> None:
        """Leave the line."""
        self._line.close()


@contextmanager
def _interruptible(watched: _Watched, target: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Say where a conversion stopped, and let SIGTERM end it as an interrupt does: with nothing left behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        watched.close()
        say(f"{watched.so_far}; {target} was not touched.")
        raise
    except Error as error:
        watched.close()
        if not watched.name:
            raise
        raise type(error)(f"{error} ({watched.so_far}; {target} was not touched.)") from error
    finally:
        watched.close()
        signal.signal(signal.SIGTERM, before)
