"""Reading everything before anything is trained on: every bad record named, and what the good ones will amount to."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ostro.data import chat, sources
from ostro.data.arrays import ArrayFile
from ostro.data.beside import Beside, disk_errors
from ostro.data.duplicates import as_json, digest, repeated
from ostro.data.records import Chat, Record, Text, Tokens
from ostro.data.tasks import Settings, batches, framed, require_known
from ostro.data.text_files import exact
from ostro.data.tokenizer import Tokenizer
from ostro.data.workers import size_of
from ostro.errors import DataError

Report = Callable[[int, int, int], None]


@dataclasses.dataclass
class Summary:
    """What was read: `errors` are sentences, each beginning with file and line; `notes` what is good but not whole.

    `num_over` counts records of more than `seq_length` tokens; duplicates are records equal to an earlier one.
    """

    seq_length: int
    num_records: int = 0
    num_tokens: int = 0
    num_trained: int = 0
    longest: int = 0
    num_over: int = 0
    num_duplicates: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, ids: np.ndarray, trained: np.ndarray | None) -> None:
        """Count a record."""
        self.num_records += 1
        self.num_tokens += len(ids)
        self.num_trained += len(ids) if trained is None else int(trained.sum())
        self.longest = max(self.longest, len(ids))
        self.num_over += len(ids) > self.seq_length


@dataclasses.dataclass(frozen=True)
class Shown:
    """A record as it will be learned: its text in pieces, each with whether it is trained."""

    where: str
    pieces: list[tuple[str, bool]]


def check(
    paths: Iterable[str | Path],
    tokenizer: Tokenizer,
    settings: Settings,
    seq_length: int,
    fix: Path | None = None,
    report: Report | None = None,
) -> Summary:
    """Read every record and count; with `fix` write the good ones there as JSON Lines, in their order.

    `report` is called with the tokens counted and the bytes of the sources read, of how many. Raises DataError for
    what is no source at all, a `fix` that exists, and what one file cannot hold.
    """
    summary = Summary(seq_length)
    with _opened(fix) as write, tempfile.TemporaryDirectory() as folder:
        digests = ArrayFile(Path(folder) / "digests.npy", np.dtype(np.uint64), (2,))
        for batch in batches(_items(paths, settings, lambda *read: report and report(summary.num_tokens, *read))):
            for item in _rendered(batch, tokenizer, settings.template):
                if isinstance(item, DataError):
                    summary.errors.append(str(item))
                    continue
                record, ids, trained, note = item
                summary.add(ids, trained)
                if note:
                    summary.notes.append(note)
                digests.append(digest(record)[None])
                if write is not None:
                    write(record)
        digests.close()
        found = repeated([Path(folder) / "digests.npy"])
        summary.num_duplicates = sum(len(places) for _, places in found)
    return summary


def preview(
    paths: Iterable[str | Path], tokenizer: Tokenizer, settings: Settings, count: int, max_chars: int = 4000
) -> Iterator[Shown]:
    """Yield the first records as they will be learned; a text and tokens are cut after `max_chars`."""
    for unit in sources.units(paths, settings.kind, documents=settings.documents):
        for record in sources.read(unit):
            if count < 1:
                return
            count -= 1
            where = exact(record.where)
            if isinstance(record, Text):
                yield Shown(where, [("<s>", False), (record.text[:max_chars], True), ("</s>", True)])
            elif isinstance(record, Chat):
                named = chat.load_template(settings.template or "auto", tokenizer)
                yield Shown(where, chat.render(record, named, tokenizer).pieces)
            else:
                require_known(record, tokenizer)
                yield Shown(where, _runs(record, tokenizer, max_chars))


def _runs(record: Tokens, tokenizer: Tokenizer, max_tokens: int) -> list[tuple[str, bool]]:
    """Return a record's text in runs of tokens that are learned and that are not."""
    ids = record.ids[:max_tokens]
    if not len(ids) or record.trained is None:
        return [(tokenizer.decode(ids.tolist()), True)]
    trained = record.trained[:max_tokens]
    cuts = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(ids)]
    return [(tokenizer.decode(ids[a:b].tolist()), bool(trained[a])) for a, b in itertools.pairwise(cuts)]


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[Callable[[Record], None] | None]:
    """Give what writes a record into a new file, which is there at the end and whole."""
    if path is None:
        yield None
        return
    beside = Beside([path])
    kinds: set[bool] = set()
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(beside.drop)
        with disk_errors(path):
            file = at_the_end.enter_context(contextlib.closing(beside.path(path).open("x", encoding="utf-8")))

        def write(record: Record) -> None:
            if isinstance(record, Tokens):
                raise DataError(f"{record.where}: records of tokens have no text to write: leave --fix out.")
            line = json.dumps(as_json(record), ensure_ascii=False) + "\n"
            kinds.add(isinstance(record, Text))
            if len(kinds) > 1:
                raise DataError(
                    f"{record.where}: texts and conversations do not go into one file: give --fix one kind of sources "
                    "at a time."
                )
            with disk_errors(path):
                file.write(line)

        yield write
        with disk_errors(path):
            file.close()
            beside.keep()


def _items(
    paths: Iterable[str | Path], settings: Settings, report: Callable[[int, int], object]
) -> Iterator[Record | DataError]:
    """Yield the records, bad ones in their places; report the bytes read, of how many."""
    units = sources.units(paths, settings.kind, documents=settings.documents)
    num_bytes, total = 0, sum(map(size_of, units))
    report(0, total)
    for unit in units:
        yield from sources.attempts(unit)
        num_bytes += size_of(unit)
        report(num_bytes, total)


def _rendered(
    batch: Sequence[Record | DataError], tokenizer: Tokenizer, template: str | None
) -> Iterator[tuple[Record, np.ndarray, np.ndarray | None, str] | DataError]:
    """Yield each record, its ids, which are learned, and a note; what is wrong in the place of one that is bad."""
    texts = [record for record in batch if isinstance(record, Text)]
    ids_of = dict(zip(map(id, texts), tokenizer.encode_arrays([text.text for text in texts]), strict=True))
    chats = [record for record in batch if isinstance(record, Chat)]
    refused: list[DataError] = []
    made = {}
    if chats:
        named = chat.load_template(template or "auto", tokenizer)
        made = {one.where: one for one in chat.render_batch(chats, named, tokenizer, refused)}
    of_chats = iter(refused)  # in the order of those that were not made
    for record in batch:
        if isinstance(record, DataError):
            yield record
        elif isinstance(record, Text):
            yield record, framed(ids_of[id(record)], tokenizer), None, ""
        elif isinstance(record, Tokens):
            try:
                require_known(record, tokenizer)
            except DataError as error:
                yield error
            else:
                yield record, record.ids, record.trained, ""
        elif record.where in made:
            one = made[record.where]
            yield record, one.ids, one.trained, exact(one.note)
        else:
            yield DataError(exact(str(next(of_chats))))
