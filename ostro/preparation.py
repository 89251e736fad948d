"""The verb `prepare`: what was asked on the command line, and what is said about it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path

from ostro.data.prepare import Hands
from ostro.data.tasks import Settings
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.errors import ConfigError, DataError, nearest
from ostro.log import ByteProgress, duration, size
from ostro.sections import Train

_TARGETS = ("native", "mindrecord", "megatron")
_STYLES = ("native", "mindformers")
_SHOWN = 20  # bad records, the others are counted


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked, in the words of the command line."""

    sources: list[str]
    out: Path | None = None
    kind: str = "auto"
    documents: str = "file"
    template: str = "auto"
    tokenizer: str = "v1"
    style: str = "native"
    to: str = "native"
    seq_length: int | None = None
    repeat: int = 1
    partitions: int = 1
    check: bool = False
    fix: Path | None = None
    preview: int = 0
    dedup: bool = False
    conversations: Path | None = None
    tokens_per_second: float | None = None
    workers: int | None = None
    share: str | None = None
    ray: str | None = None


def prepare(asked: Request, say: Callable[[str], None]) -> None:
    """Do what was asked of the sources: check them, show some, or write them.

    Raises ConfigError for options that do not go together, DataError for bad data (exit code 3).
    """
    _require_fitting(asked)
    hands = Hands(asked.workers, _share(asked.share), asked.ray)
    tokenizer = load_tokenizer(asked.tokenizer)
    settings = Settings(asked.kind, asked.documents, asked.template, asked.dedup)
    if asked.preview:
        _preview(asked, tokenizer, settings)
    if asked.check or asked.fix is not None:
        _check(asked, tokenizer, settings, say)
    if asked.conversations is not None:
        _alpaca(asked, asked.conversations, say)
    if asked.out is None:
        return
    if asked.style == "mindformers":
        _as_mindformers(asked, asked.out, tokenizer, say)
    elif asked.to == "megatron":
        _to_megatron(asked, asked.out, tokenizer, settings, say)
    else:
        _native(asked, asked.out, tokenizer, settings, hands, say)


def _require_fitting(asked: Request) -> None:
    for option, value, least in (
        ("workers", asked.workers, 1),
        ("seq-length", asked.seq_length, 1),
        ("repeat", asked.repeat, 1),
        ("partitions", asked.partitions, 1),
        ("preview", asked.preview, 0),
    ):
        if value is not None and value < least:
            raise ConfigError(f"--{option} {value} is too small: use {least} or more.")
    if asked.tokens_per_second is not None and not 0 < asked.tokens_per_second < math.inf:
        raise ConfigError(f"--tokens-per-second {asked.tokens_per_second:g} is no speed: use a number above 0.")
    for word, known, option in ((asked.to, _TARGETS, "to"), (asked.style, _STYLES, "style")):
        if word not in known:
            raise ConfigError(f"--{option} {word} is not one of {', '.join(known)}.{nearest(word, known)}")
    if asked.out is None and not (asked.check or asked.fix or asked.preview or asked.conversations):
        raise ConfigError("there is nothing to do: give --out DIR, or --check, or --preview N.")
    if (asked.to == "mindrecord") != (asked.style == "mindformers") and not (asked.conversations and not asked.out):
        raise ConfigError(
            "--style mindformers and --to mindrecord go together: its records are padded and cut for them."
        )
    _require_used(asked)
    if asked.style == "mindformers" and asked.out is not None and asked.seq_length is None:
        raise ConfigError("--style mindformers makes records of one length: give --seq-length (MindFormers' is 2048).")
    if (asked.repeat != 1 or asked.partitions != 1) and asked.style != "mindformers":
        raise ConfigError("--repeat and --partitions are for --style mindformers: leave them out.")
    if (asked.share or asked.ray or asked.dedup) and (asked.out is None or asked.to != "native"):
        raise ConfigError(
            "--shard, --ray and --dedup are for a folder of token shards: give --out, and no --to, or leave them out."
        )
    if asked.workers is not None and (asked.out is None or asked.to != "native"):
        raise ConfigError("--workers is for a folder of token shards, the rest is done by one process: leave it out.")
    if asked.share and asked.ray:
        raise ConfigError("--shard and --ray both say who does the work: give one of them.")
    if asked.conversations is not None and asked.style != "mindformers":
        raise ConfigError("--conversations is for --style mindformers: leave it out.")
    if asked.style == "mindformers" and (asked.check or asked.fix or asked.preview):
        raise ConfigError(
            "--check, --fix and --preview show Ostro's own tokens, not MindFormers' records: give them without --style."
        )


def _require_used(asked: Request) -> None:
    """Raise ConfigError for options that what was asked would pass over in silence."""
    if asked.style == "mindformers":
        plain = Request(asked.sources)
        for option in ("kind", "documents", "template"):
            if getattr(asked, option) != getattr(plain, option):
                raise ConfigError(
                    f"--{option} is not for --style mindformers, which has rules of its own: leave it out."
                )
        return
    if not (asked.check or asked.fix) and (asked.seq_length or asked.tokens_per_second) and asked.to != "mindrecord":
        raise ConfigError(
            "--seq-length and --tokens-per-second are what --check counts by: add it, or leave them out. Rows are cut "
            "when training begins, by data.seq_length."
        )


def _native(
    asked: Request, out: Path, tokenizer: Tokenizer, settings: Settings, hands: Hands, say: Callable[[str], None]
) -> None:
    from ostro.data.prepare import prepare as run
    from ostro.data.shards import is_prepared

    start = time.perf_counter()
    was_there = is_prepared(out)
    progress = _Progress()
    try:
        manifest = run(asked.sources, out, tokenizer=tokenizer, settings=settings, hands=hands, report=progress.show)
    except KeyboardInterrupt:
        progress.close()
        say(f"{out}: interrupted; the same command goes on with what is left")
        raise
    finally:
        progress.close()
    seconds = time.perf_counter() - start
    if manifest is None:
        say(f"{out}: share {asked.share} is done; the last share to end puts the folder together")
        return
    rate = "prepared before, unchanged" if was_there else f"{progress.num_tokens / seconds:,.0f} tokens/s"
    say(
        f"{out}: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens of {manifest.num_bytes:,} bytes, "
        f"{rate}"
    )
    if manifest.num_trained < manifest.num_tokens:
        say(f"  {manifest.num_trained / manifest.num_tokens:.1%} of the tokens are learned")
    if manifest.num_unlearned:
        say(f"  {manifest.num_unlearned:,} documents teach nothing: none of their tokens is learned")
    if settings.dedup:
        say(f"  {manifest.num_repeats:,} records that equal an earlier one were left out")
    if manifest.encoder != "gigatoken":
        say("  encoded by the package tokenizers: gigatoken is missing, or gave other ids for this data")


class _Progress:
    """Passes on how far a preparation is, in bytes of its sources, when it says how many there are."""

    def __init__(self) -> None:
        self._line: ByteProgress | None = None
        self.num_tokens = 0

    def show(self, num_tokens: int, num_bytes: int, total_bytes: int) -> None:
        """Show it."""
        self.num_tokens = num_tokens
        if self._line is None:
            self._line = ByteProgress(total_bytes, "read")
        self._line.show(num_bytes)

    def close(self) -> None:
        """Clear the line."""
        if self._line is not None:
            self._line.close()


def _share(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    index, _, count = text.partition("/")
    if not all(part.isascii() and part.isdigit() and len(part) < 7 for part in (index, count)):
        raise ConfigError(f"--shard {text!r} must be i/n, counted from 0: --shard 0/4.")
    if int(index) >= int(count):
        raise ConfigError(f"--shard {text}: shares are counted from 0, the last of n is n-1.")
    return int(index), int(count)


def _alpaca(asked: Request, target: Path, say: Callable[[str], None]) -> None:
    from ostro.data import sources
    from ostro.data.mindformers import alpaca_to_conversations, write_conversations

    files = sources.expand(asked.sources)
    if len(files) != 1 or sources.detect(files[0]) != "alpaca":
        raise ConfigError("--conversations takes one file of Alpaca records: name it alone.")
    conversations = alpaca_to_conversations(files[0])
    write_conversations(conversations, target)
    say(f"{target}: {len(conversations):,} conversations, as alpaca_converter.py writes them")


def _as_mindformers(asked: Request, out: Path, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
    from ostro.data.mindformers_files import write_mindrecord

    assert asked.seq_length is not None
    tokenizer.hurry()
    progress = ByteProgress(None, "written")
    try:
        count, notes = write_mindrecord(
            asked.sources,
            out,
            tokenizer,
            seq_length=asked.seq_length,
            repeat=asked.repeat,
            partitions=asked.partitions,
            report=progress.show,
        )
    finally:
        progress.close()
    say(f"{out}: {count:,} records of {asked.seq_length + 1} tokens")
    for note in notes:
        say(f"  {note}")


def _to_megatron(
    asked: Request, out: Path, tokenizer: Tokenizer, settings: Settings, say: Callable[[str], None]
) -> None:
    from ostro.data import sources
    from ostro.data.megatron import MegatronWriter
    from ostro.data.tasks import batches, encoded
    from ostro.data.workers import size_of

    tokenizer.hurry()
    count = num_tokens = num_trained = num_bytes = 0
    units = sources.units(asked.sources, asked.kind, documents=asked.documents)
    with (
        contextlib.closing(ByteProgress(sum(map(size_of, units)), "read")) as progress,
        MegatronWriter(out, "uint16" if tokenizer.vocab_size < 65500 else "int32") as writer,
    ):
        for unit in units:
            for batch in batches(sources.read(unit)):
                for ids, trained, _ in encoded(batch, tokenizer, settings.template):
                    writer.append(ids)
                    count += 1
                    num_tokens += len(ids)
                    num_trained += len(ids) if trained is None else int(trained.sum())
            num_bytes += size_of(unit)
            progress.show(num_bytes)
        if not count:
            raise DataError(f"{asked.sources[0]}: there is no text in it, so there is nothing to prepare: name others.")
    say(f"{out}.bin and {out}.idx: {count:,} documents, {num_tokens:,} tokens")
    if num_trained < num_tokens:
        say("  Megatron's files have no place for which tokens are learned: all of them will be")


def _check(asked: Request, tokenizer: Tokenizer, settings: Settings, say: Callable[[str], None]) -> None:
    from ostro.data.check import check

    tokenizer.hurry()
    length = asked.seq_length or 4096
    start = time.perf_counter()
    progress = _Progress()
    try:
        found = check(asked.sources, tokenizer, settings, length, asked.fix, progress.show)
    finally:
        progress.close()
    for error in found.errors[:_SHOWN]:
        say(error)
    if len(found.errors) > _SHOWN:
        say(f"… and {len(found.errors) - _SHOWN} more bad records")
    share = found.num_trained / found.num_tokens if found.num_tokens else 0.0
    say(
        f"{found.num_records:,} good records, {found.num_tokens:,} tokens, the longest {found.longest:,}; "
        f"{found.num_over:,} are longer than {length:,}; {share:.1%} of the tokens are learned; "
        f"{found.num_duplicates:,} repeat an earlier one; {len(found.errors):,} are bad"
    )
    say(_estimate(asked, found.num_tokens, length, time.perf_counter() - start))
    for note in found.notes[:3]:
        say(f"  {note}")
    if asked.fix is not None:
        say(f"wrote the good ones to {asked.fix}, {size(asked.fix.stat().st_size)}")
    if found.errors:
        what = (
            "mend them, or take the good ones with --fix FILE"
            if asked.fix is None
            else f"{asked.fix} has the good ones"
        )
        raise DataError(f"{len(found.errors)} records are bad: {what}.")


def _estimate(asked: Request, num_tokens: int, length: int, seconds: float) -> str:
    rows = -(-num_tokens // length)
    batch = Train().global_batch_sequences
    text = f"an epoch is about {rows:,} rows of {length:,} tokens, {-(-rows // batch):,} steps of {batch} rows"
    if asked.tokens_per_second:
        text += f", {duration(num_tokens / asked.tokens_per_second)} at {asked.tokens_per_second:,.0f} tokens/s"
    return f"{text}; read in {seconds:.1f} s"


def _preview(asked: Request, tokenizer: Tokenizer, settings: Settings) -> None:
    import rich
    from rich.text import Text

    from ostro.data.check import preview

    for shown in preview(asked.sources, tokenizer, settings, asked.preview):
        lines = Text.assemble((shown.where, "bold"), "\n")
        for text, trained in shown.pieces:
            lines.append(text, "green" if trained else "dim")
        rich.get_console().print(lines, end="\n\n", soft_wrap=True)
