"""One task of a preparation: some units of the sources become one shard of tokens, and a note that it is done."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ostro.data import chat, sources
from ostro.data.arrays import ArrayFile
from ostro.data.duplicates import digest, digests_path, repeats_path
from ostro.data.records import Chat, Record, Text, Tokens, Unit
from ostro.data.text_files import exact
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.errors import DataError

Item = TypeVar("Item", bound=Record | DataError)

_BATCH_CHARS, _BATCH_RECORDS = 1 << 22, 4096
_SMALL_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides, besides the sources and the tokenizer, which tokens come out.

    `kind` is a key of SOURCES or "auto"; `documents` is what a document of a text file is: the `file`, a `line`, or
    what `blank` lines separate; `template` names how conversations are rendered (None: "auto"); with `dedup` a record
    that equals an earlier one is left out.
    """

    kind: str = "auto"
    documents: str = "file"
    template: str | None = None
    dedup: bool = False


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """The task that writes a shard into a preparation's folder."""

    folder: Path
    words: Words
    settings: Settings

    def __call__(self, number: int, units: Sequence[Unit]) -> dict[str, Any]:
        """Write the shard `number` of these units and the note that it is done; return the note."""
        names = {word: self.folder / f"{word}-{number:05d}.npy" for word in ("tokens", "trained", "ends")}
        beside = {word: beside_of(path) for word, path in names.items()}

        def records() -> Iterator[Record]:
            return self._kept(number, units) if self.settings.dedup else _records(units)

        try:
            tokenizer = self.words.load().unproved()
            note = _written(beside, records(), tokenizer, self.settings.template)
            if note["encoder"] is None:  # what was encoded before the difference was seen is not to be trusted either
                note = _written(beside, records(), tokenizer, self.settings.template)
            note["sha256"] = [sha256_of(unit.path) if unit.is_whole else None for unit in units]
            for word, path in beside.items():
                if word != "trained" or note["num_trained"] < note["num_tokens"]:
                    path.replace(names[word])
        finally:  # a full disk is not filled further
            for path in beside.values():
                path.unlink(missing_ok=True)
        write_whole(note_path(self.folder, number), note)
        return note

    def _kept(self, number: int, units: Sequence[Unit]) -> Iterator[Record]:
        repeats = np.load(repeats_path(self.folder, number), mmap_mode="r")
        for at, record in enumerate(_records(units)):
            if at >= len(repeats):
                raise DataError(f"{record.where}: the file has changed since it was read: give the same command again.")
            if not repeats[at]:
                yield record


@dataclasses.dataclass(frozen=True)
class Digest:
    """The task before it where duplicates are left out: it writes down what each record is, in 16 bytes."""

    folder: Path

    def __call__(self, number: int, units: Sequence[Unit]) -> None:
        """Write the digests of these units' records, in their order."""
        path = digests_path(self.folder, number)
        beside = beside_of(path)
        try:
            with ArrayFile(beside, np.dtype(np.uint64), (2,)) as file:
                for batch in batches(_records(units)):
                    file.append(np.stack([digest(record) for record in batch]))
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class Words:
    """The tokenizer of a preparation, kept in its folder for whoever works on it; `name` is what errors call it."""

    folder: Path
    name: str

    def keep(self, tokenizer: Tokenizer) -> None:
        """Save it, which another share may have done."""
        if not self.folder.is_dir():
            saved = beside_of(self.folder)
            tokenizer.save(saved)
            try:
                saved.replace(self.folder)
            except OSError:
                shutil.rmtree(saved)

    def load(self) -> Tokenizer:
        """Return it, with the fast encoder where there is one."""
        if self not in _at_hand:
            tokenizer = load_tokenizer(self.folder)
            tokenizer.name = self.name
            tokenizer.hurry()
            _at_hand.clear()
            _at_hand[self] = tokenizer
            return tokenizer
        return _at_hand[self]

    def warm(self) -> None:
        """Load it, so that the first task does not have to."""
        self.load()

    def forget(self) -> None:
        """Let go of it, and with it of its encoder's memory."""
        _at_hand.pop(self, None)


_at_hand: dict[Words, Tokenizer] = {}  # in this process


def encoded(
    batch: Sequence[Record], tokenizer: Tokenizer, template: str | None
) -> list[tuple[np.ndarray, np.ndarray | None, int]]:
    """Return ids, which of them are learned (None: all) and the text's bytes of each record."""
    rows: list[tuple[np.ndarray, np.ndarray | None, int] | None] = [None] * len(batch)
    texts = [(at, record) for at, record in enumerate(batch) if isinstance(record, Text)]
    for (at, record), ids in zip(texts, tokenizer.encode_arrays([text.text for _, text in texts]), strict=True):
        rows[at] = framed(ids, tokenizer), None, _size(record.text)
    chats = [(at, record) for at, record in enumerate(batch) if isinstance(record, Chat)]
    if chats:
        named = chat.load_template(template or "auto", tokenizer)
        try:
            rendered = chat.render_batch([record for _, record in chats], named, tokenizer)
        except DataError as error:
            raise DataError(exact(str(error))) from None
        for (at, record), one in zip(chats, rendered, strict=True):
            rows[at] = one.ids, one.trained, sum(_size(message.content) for message in record.messages)
    for at, record in enumerate(batch):
        if isinstance(record, Tokens):
            require_known(record, tokenizer)
            rows[at] = record.ids, record.trained, 0
    return [row for row in rows if row is not None]


def framed(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return a text's ids between BOS and EOS, in the shards' dtype."""
    row = np.empty(len(ids) + 2, token_dtype(tokenizer))
    row[0], row[1:-1], row[-1] = tokenizer.bos_token_id, ids, tokenizer.eos_token_id
    return row


def require_known(record: Tokens, tokenizer: Tokenizer) -> None:
    """Raise DataError for tokens that are none of the tokenizer's."""
    least, most = int(record.ids.min(initial=0)), int(record.ids.max(initial=0))
    if least < 0 or most >= tokenizer.vocab_size:
        raise DataError(
            f"{exact(record.where)}: its tokens go from {least} to {most}, and tokenizer {tokenizer.name} has 0 to "
            f"{tokenizer.vocab_size - 1}: name the tokenizer that made them."
        )


def batches(records: Iterable[Item]) -> Iterator[list[Item]]:
    """Yield records, perhaps with what is wrong in the place of a bad one, some millions of characters at a time."""
    batch: list[Item] = []
    num_chars = 0
    for record in records:
        batch.append(record)
        num_chars += _num_chars(record)
        if num_chars >= _BATCH_CHARS or len(batch) >= _BATCH_RECORDS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _written(
    beside: dict[str, Path], records: Iterator[Record], tokenizer: Tokenizer, template: str | None
) -> dict[str, Any]:
    """Write a shard; the note's encoder is None where the fast one was given up in the middle of it."""
    num_trained = num_bytes = num_unlearned = 0
    was_fast = tokenizer.is_fast
    with (
        ArrayFile(beside["tokens"], token_dtype(tokenizer)) as tokens,
        ArrayFile(beside["trained"], np.dtype(bool)) as trained,
        ArrayFile(beside["ends"], np.dtype(np.int64), (2,)) as ends,
    ):
        for batch in batches(records):
            rows = encoded(batch, tokenizer, template)
            end = tokens.num_rows + np.cumsum([len(ids) for ids, _, _ in rows])
            ends.append(np.stack([end, [size for _, _, size in rows]], axis=1))
            if all(mask is None for _, mask, _ in rows):
                num_trained += int(end[-1]) - tokens.num_rows
            else:
                learned = np.concatenate([np.ones(len(ids), bool) if mask is None else mask for ids, mask, _ in rows])
                trained.append(np.ones(tokens.num_rows - trained.num_rows, bool))  # what came before without a mask
                trained.append(learned)
                num_trained += int(learned.sum())
            tokens.append(rows[0][0] if len(rows) == 1 else np.concatenate([ids for ids, _, _ in rows]))
            num_bytes += sum(size for _, _, size in rows)
            num_unlearned += sum(mask is not None and not mask[1:].any() for _, mask, _ in rows)
        if trained.num_rows:
            trained.append(np.ones(tokens.num_rows - trained.num_rows, bool))
    return {
        "num_tokens": tokens.num_rows,
        "num_documents": ends.num_rows,
        "num_bytes": num_bytes,
        "num_trained": num_trained,
        "num_unlearned": num_unlearned,
        "encoder": "gigatoken" if tokenizer.is_fast else None if was_fast else "tokenizers",
    }


def sha256_of(path: str) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb", buffering=0) as file:
        data = file.read(_SMALL_BYTES)
        if len(data) < _SMALL_BYTES:
            return hashlib.sha256(data).hexdigest()
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _records(units: Sequence[Unit]) -> Iterator[Record]:
    for unit in units:
        yield from sources.read(unit)


def _num_chars(record: Record | DataError) -> int:
    if isinstance(record, Text):
        return len(record.text)
    if isinstance(record, Chat):
        return sum(
            len(message.content) + sum(len(str(call)) for call in message.tool_calls) for message in record.messages
        )
    return len(record.ids) if isinstance(record, Tokens) else 0


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Return the dtype of the shards' tokens: two bytes where the vocabulary fits into them."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def note_path(folder: Path, number: int) -> Path:
    """Return where the note lies that a task is done."""
    return folder / f"task-{number:05d}.json"


def read_json(path: Path) -> dict[str, Any] | None:
    """Return what a file that `write_whole` wrote holds; None where there is none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def beside_of(path: Path) -> Path:
    """Return where a file is written before it has its name; no two processes on any machines share one."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.writing")


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that the file is there whole or not at all."""
    beside = beside_of(path)
    beside.write_text(json.dumps(content), "utf-8")
    beside.replace(path)
