"""The verb `convert`: what was asked on the command line, what is said on the way, and how it ends."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ostro import log, weights
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.degrees import Degrees, host_ranks, parse
from ostro.errors import ConfigError, DataError, Error, WeightsError, nearest
from ostro.inspection import described, hints_of
from ostro.log import size
from ostro.model.settings import ModelConfig
from ostro.serve.load import tokenizer_beside, torch_dtype
from ostro.weights import Reader, lora_run
from ostro.weights.adapters import Adapter, open_adapter
from ostro.weights.joined import join
from ostro.weights.mindspore_layout import MindSporeDegrees
from ostro.weights.store import architecture_difference
from ostro.weights.upcycle import open_upcycled

# Which formats a target of this suffix is a file of; without --to the first is meant.
_FILES = {
    ".ckpt": ("mindspore", "mindspore-gmm"),
    ".safetensors": ("mindspore", "mindspore-gmm"),
    ".gguf": ("gguf",),
}
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
    """What was asked, in the words of the command line; None and False where nothing was.

    `others` are the folders of further hosts, where they share no disk.
    """

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
    adapter: str | None = None
    others: tuple[str, ...] = ()
    upcycle: bool = False


def convert(asked: Request, say: Callable[[str], None]) -> None:
    """Convert, saying what the source is, what was chosen, what was written and how it was proved.

    Raises ConfigError for options that do not go together, WeightsError and OutOfMemory as the formats do: the target
    is then as it was before.
    """
    if asked.others:
        return _join(asked, say)
    to = asked.to or _FILES.get(asked.target.suffix, ("hf",))[0]
    _require_fitting(asked, to)
    hints = hints_of(asked.format, asked.model, asked.strategy, asked.step)
    reader, adapter = _opened(asked, hints)
    say(f"{asked.source}: {described(reader)}")
    for note in reader.notes:
        say(f"  {note}")
    if adapter is not None:
        say(f"{asked.adapter or asked.source}: {_lora_words(adapter)}")
    words, told = _tokenizer(asked, reader.model)
    for stale in asked.target.parent.glob(f"{asked.target.name}.partial-*"):
        say(f"  {stale} is left of a conversion that was killed: remove it")
    progress = _Progress(None if asked.layout else sum(info.num_bytes for info in reader.names().values()))
    start = time.perf_counter()
    with _interruptible(progress, asked.target, say):
        made = weights.convert(
            reader,
            asked.target,
            to=to,
            dtype=torch_dtype(asked.dtype) if asked.dtype else None,
            keep_fp32=asked.keep_fp32,
            verify=asked.verify,
            adapter=adapter,
            on_read=progress.show,
            **_settings(asked, to, reader, words),
        )
    seconds = time.perf_counter() - start
    say(f"wrote {asked.target} as {to}, {size(_bytes_of(asked.target))} in {seconds:.1f} s")
    for note in (*([told] if not _is_bare(asked, to) else []), *made.notes):
        say(f"  {note}")
    if made.sha256:
        say(f"  read back and compared: every bit is as meant, sha256 of all tensors {made.sha256}")
    return None


def _opened(asked: Request, hints: weights.Hints) -> tuple[Reader, Adapter | None]:
    """Open the source and what is merged into it: of a LoRA run, its model and what it has trained."""
    path = weights.located(asked.source)
    if not asked.format and path.exists() and lora_run.detect(path):
        if asked.adapter is not None:
            raise ConfigError(
                f"{asked.source} is a LoRA run, with an adapter of its own: give the model that it started from."
            )
        run = lora_run.open_run(path, asked.step)
        return run.base(), run.adapter
    reader = _upcycled(asked.source, hints) if asked.upcycle else weights.open_reader(asked.source, hints)
    return reader, None if asked.adapter is None else open_adapter(asked.adapter, reader.model)


def _lora_words(adapter: Adapter) -> str:
    lora = adapter.lora
    kind = "DoRA" if lora.dora else "LoRA"
    words = f"{kind} of rank {lora.rank}, scale {lora.scale:g}, on {', '.join(lora.matrices)}"
    return "; ".join((words, *adapter.notes))


def _join(asked: Request, say: Callable[[str], None]) -> None:
    """Bring the folders of hosts without a shared disk together, the optimizer's state included."""
    plain = Request(asked.source, asked.target, to="dcp", step=asked.step, others=asked.others)
    if dataclasses.replace(asked, to=asked.to or "dcp") != plain:
        raise ConfigError(
            "several sources are the folders of hosts without a shared disk, which are joined with --to dcp and at "
            "most --step: convert what comes of it with the other options."
        )
    start = time.perf_counter()
    with _interruptible(_Progress(None), asked.target, say):
        first = join([Path(source) for source in (asked.source, *asked.others)], asked.target, asked.step)
    say(
        f"wrote {asked.target} as dcp, {size(_bytes_of(asked.target))} in {time.perf_counter() - start:.1f} s, of "
        f"{first.name} of {len(asked.others) + 1} hosts"
    )
    if asked.target.name != first.name:
        say(f"  to resume from it, put it where all ranks see it, as checkpoints/{first.name} of the run directory")


def _upcycled(source: str, hints: weights.Hints) -> Reader:
    if hints != weights.Hints(model=hints.model):
        raise ConfigError(
            "--upcycle reads a Hugging Face folder of a dense Mistral: leave --from, --strategy and --step out."
        )
    reader = open_upcycled(source, hints.model)
    differing = architecture_difference(reader.model, hints.model or reader.model)
    if differing is not None:
        name, theirs, ours = differing
        raise WeightsError(f"{source} has {name}={theirs}, and --model has {ours}: name a model of the same sizes.")
    return reader


def _is_bare(asked: Request, to: str) -> bool:
    """Whether the target is a file that tensors alone go into."""
    return to.startswith("mindspore") and asked.target.suffix in _FILES


def _bytes_of(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _require_fitting(asked: Request, to: str) -> None:
    writable = [name for name, format in weights.FORMATS.items() if format.write]
    if to not in writable:
        raise ConfigError(f"--to {to} is not one of {', '.join(writable)}.{nearest(to, writable)}")
    for option, formats in _ONLY.items():
        if getattr(asked, option) not in (None, False) and to not in formats:
            raise ConfigError(
                f"--{option.replace('_', '-')} is for {' and '.join(formats)}, not for {to}: leave it out."
            )
    if asked.adapter is not None and asked.optimizer:
        raise ConfigError("--optimizer keeps the state of weights that an adapter changes: give one of the two.")
    if asked.keep_fp32 and asked.dtype is None:
        raise ConfigError("--keep-fp32 says what --dtype is to leave alone: give --dtype too.")
    if asked.host and not asked.layout:
        raise ConfigError("--host says whose part of a --layout to write: give --layout too.")
    if asked.host and asked.verify:
        raise ConfigError("--verify reads a whole checkpoint back, and --host writes a part: give one of the two.")
    formats = _FILES.get(asked.target.suffix)
    if formats is not None and to not in formats:
        raise ConfigError(f"{asked.target} names a file of {formats[0]}, --to {to} is for a folder: name one.")
    if asked.tokenizer and _is_bare(asked, to):
        raise ConfigError(f"--tokenizer is for folders, and {asked.target} is a file of tensors alone: leave it out.")


def _settings(asked: Request, to: str, reader: Reader, words: Tokenizer | Path | None) -> dict[str, Any]:
    """Return the settings of the format's `write`."""
    settings: dict[str, Any] = {"tokenizer": words.save if isinstance(words, Tokenizer) else words}
    if asked.layout is not None:
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
    if not all(part.isascii() and part.isdigit() and len(part) < 8 for part in (index, count)) or not int(count):
        raise ConfigError(f"--host {text!r} must be i/n, hosts counted from 0: --host 0/2.")
    return int(index), int(count)


def _tokenizer(asked: Request, model: ModelConfig) -> tuple[Tokenizer | Path | None, str]:
    """Return the tokenizer that goes along, and what to say: as asked, the source's own, or the vocabulary's."""
    if asked.tokenizer is not None:
        words = load_tokenizer(asked.tokenizer)
        if words.vocab_size > model.vocab_size:
            raise ConfigError(
                f"--tokenizer {asked.tokenizer} has {words.vocab_size} pieces and the model {model.vocab_size}: they "
                "do not belong together."
            )
        return words, f"with the tokenizer {words.name}"
    folder = weights.tokenizer_folder(Path(asked.source))
    try:
        found = tokenizer_beside(asked.source)
    except DataError as error:
        return folder, f"with the source's tokenizer files as they are: {error}"
    if found is not None and found.vocab_size <= model.vocab_size:
        return folder or found, "with the source's own tokenizer"
    if found is not None:
        return None, (
            f"without a tokenizer: the source's has {found.vocab_size} pieces and the model {model.vocab_size}; name "
            "another with --tokenizer"
        )
    if model.vocab_size in _BUILT_IN:
        words = load_tokenizer(_BUILT_IN[model.vocab_size])
        return words, f"with Mixtral's tokenizer {words.name}, since the vocabulary has {model.vocab_size} pieces"
    return None, "without a tokenizer: none lies beside the source; name one with --tokenizer"


class _Progress:
    """How far a conversion is, shown and remembered."""

    def __init__(self, total_bytes: int | None) -> None:
        self.name = ""
        self._num_bytes = 0
        self._line = log.ByteProgress(total_bytes, "converted")
        self.close = self._line.close

    def show(self, name: str, num_bytes: int) -> None:
        """Note the tensor that is read now, and the bytes before it."""
        self.name, self._num_bytes = name, num_bytes
        self._line.show(num_bytes)

    def __str__(self) -> str:
        return f"it stopped at {self.name}, after {size(self._num_bytes)}" if self.name else "it had not begun"


@contextmanager
def _interruptible(progress: _Progress, target: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Say where a conversion stopped, and let a signal end it as an interrupt does: with nothing left behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, word) for word in ("SIGTERM", "SIGHUP") if hasattr(signal, word)]
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    except KeyboardInterrupt:
        progress.close()
        say(f"{progress}; {target} was not touched.")
        raise
    except Error as error:
        progress.close()
        if not progress.name:
            raise
        raise type(error)(f"{error} ({progress}; {target} was not touched.)") from error
    finally:
        progress.close()
        for number, handler in before.items():
            signal.signal(number, handler)
