"""What MindFormers' llama_preprocess.py (r1.7.0) makes of WikiText and of conversations, id for id.

Whoever goes on with a model that was trained there needs the very same records, faults included; Ostro's own
style is in wikitext.py and chat.py. Unlike there, no corpus is held in memory: cleaning is a chain of stages,
each of which takes text in pieces and gives pieces whose sum is what its rule makes of the whole file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from ostro.errors import DataError

IGNORED = -100
Item = TypeVar("Item")
Source = str | Path | Iterable[Any]
_DECODER = json.JSONDecoder()
_CHUNK_CHARS, _BATCH_CHARS, _LONGEST_CHARS = 1 << 18, 1 << 20, 1 << 28
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_ROLES, _TITLES = ("human", "gpt"), ("USER", "ASSISTANT")
_SEPARATORS = (" ", "</s>")
_ANSWER = " ASSISTANT: "
# LlamaTokenizer cuts its special tokens out of a text before sentencepiece sees what is left; nothing is
# stripped around them, so each rest gets a prefix space of its own: "a <unk> b" is ▁a ▁ <unk> ▁▁b.
_SPECIAL = re.compile("(<s>|</s>|<unk>)")

_BEFORE_BRACKETS = [(f" @{mark}@ ", mark) for mark in "-,."] + [(f" {mark} ", f"{mark} ") for mark in ":;.!?,"]
_BRACKETS = ("()", "[]", "{}", '""', "''")
_AFTER_BRACKETS = [("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°")]
_AFTER_BRACKETS += [(" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")]
# A slip there: what was meant as a pattern stands in the replacement, and its six characters land in the text.
_SLIP = (re.compile("/' [0-9]/").split, 5, "/'[0-9]/")


class Encoder(Protocol):
    """What is needed of a tokenizer; `tokenizer.Tokenizer` is one. Control tokens are never made from text."""

    bos_token_id: int
    eos_token_id: int
    unk_token_id: int | None

    def encode_arrays(self, texts: Sequence[str], /) -> list[np.ndarray]:
        """Return the ids of each text, as sentencepiece encodes it, without BOS and EOS."""
        ...


@dataclasses.dataclass
class QaReport:
    """What became of the samples so far.

    `useless` are those whose labels are all -100, from which nothing is learned, `first_useless` the number of the
    first, counted from 1; `truncated` are those longer than a record.
    """

    records: int = 0
    truncated: int = 0
    useless: int = 0
    first_useless: int | None = None


def wiki_records(path: str | Path, tokenizer: Encoder, seq_length: int, repeat: int = 1) -> Iterator[np.ndarray]:
    """Yield the records of wiki mode from one file, each int32 [seq_length + 1].

    Memory does not grow with the file, only with its longest paragraph (what stands between blank lines).
    Raises DataError for a file that is not there or not UTF-8. Source: tokenize_wiki of llama_preprocess.py and
    wikitext_clean of datareaders.py.
    """
    _check(tokenizer, seq_length)
    if repeat < 1:
        raise DataError(f"repeat={repeat} gives no record: use 1 or more.")
    length = seq_length + 1
    rest = np.empty(0, dtype=np.int32)
    for ids in _repeated(_wiki_ids(Path(path), tokenizer), repeat):
        rest = np.concatenate([rest, ids])
        end = len(rest) // length * length
        yield from rest[:end].reshape(-1, length).copy()
        rest = rest[end:]


def qa_records(
    source: Source, tokenizer: Encoder, seq_length: int, report: QaReport | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield input ids and labels of qa mode, each int32 [seq_length + 1], padded with the id of `<unk>`.

    `source` is a file with a JSON list of {"conversations": [{"from", "value"}, ...]}, or such objects. `report`
    counts along. Raises DataError, with the record's number, for what the script refuses or stumbles over;
    among it a sample that is longer than a record and stops being labelled before its end, which breaks the
    script's whole run. Source: preprocess of llama_preprocess.py, get_prompt of conversation.py.
    """
    _check(tokenizer, seq_length)
    report = QaReport() if report is None else report
    prompts = ((where, _prompt(record, where)) for where, record in _numbered(source))
    for group in _batches(prompts, size=lambda item: len(item[1])):
        for (where, _), (sample, spans) in zip(group, _samples([text for _, text in group], tokenizer), strict=True):
            ids, labels = _labelled(sample, spans, tokenizer, seq_length + 1, where)
            report.records += 1
            report.truncated += len(sample) > seq_length + 1
            if (labels == IGNORED).all():
                report.useless += 1
                report.first_useless = report.first_useless or report.records
            yield ids, labels


def alpaca_to_conversations(source: Source) -> list[dict[str, Any]]:
    """Return what alpaca_converter.py makes of Alpaca's records: ids "1", "2", …, one human and one gpt turn each.

    `source` is a file with a JSON list of {"instruction", "input", "output"} (input may be missing), or such
    objects. An input counts unless it is "": one of spaces does. Raises DataError for any field that is no text.
    """
    return [
        {
            "id": str(number),
            "conversations": [
                {"from": "human", "value": _alpaca_prompt(record, where)},
                {"from": "gpt", "value": _alpaca_field(record, "output", where)},
            ],
        }
        for number, (where, record) in enumerate(_numbered(source), start=1)
    ]


def write_conversations(conversations: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write the JSON file of alpaca_converter.py, byte for byte: indent 2, no escapes, no newline at the end.

    A folder that is not there is made; what is there already is refused, as there. The file is written beside its
    name and renamed when it is whole. Raises DataError.
    """
    path = Path(path)
    beside = Path(f"{path}.{os.getpid()}.part")
    try:
        if path.exists():
            raise DataError(f"{path} {'is a folder' if path.is_dir() else 'exists already'}: name a new file.")
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8", newline="\n") as file:
            json.dump(conversations, file, ensure_ascii=False, indent=2)
        beside.replace(path)
    except (OSError, ValueError) as error:  # ValueError: half a surrogate pair, or a null character in the name
        raise DataError(f"{str(path)!r} cannot be written: {getattr(error, 'strerror', None) or error}.") from None
    finally:
        with contextlib.suppress(OSError, ValueError):
            beside.unlink()


def _check(tokenizer: Encoder, seq_length: int) -> None:
    if seq_length < 1:
        raise DataError(f"seq_length={seq_length} gives no record: use 1 or more.")
    if tokenizer.unk_token_id is None:
        raise DataError(
            "MindFormers' records are padded with the id of <unk>, and this tokenizer has none: use the "
            "tokenizer.model of Mixtral or Llama 2."
        )


def _tokenize(texts: Sequence[str], tokenizer: Encoder) -> list[list[np.ndarray]]:
    """Return the ids of each text in parts, without BOS and EOS, as LlamaTokenizer (legacy) makes them."""
    control = {"<s>": tokenizer.bos_token_id, "</s>": tokenizer.eos_token_id, "<unk>": tokenizer.unk_token_id}
    special = {name: np.array([token_id], dtype=np.uint32) for name, token_id in control.items()}
    parts = [[part for part in _SPECIAL.split(text) if part] for text in texts]
    ids = iter(tokenizer.encode_arrays([part for found in parts for part in found if part not in special]))
    return [[special[part] if part in special else next(ids) for part in found] for found in parts]


def _wiki_ids(path: Path, tokenizer: Encoder) -> Iterator[np.ndarray]:
    bos, eos = (np.array([at], dtype=np.uint32) for at in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    kept = (text for text in _paragraphs(_cleaned(path)) if text and not text.strip().startswith("="))
    for texts in _batches(kept, size=len):
        ids = [part for parts in _tokenize(texts, tokenizer) for part in (bos, *parts, eos)]
        yield np.concatenate(ids).astype(np.int32)


def _repeated(stream: Iterator[np.ndarray], times: int) -> Iterator[np.ndarray]:
    """Yield the stream `times` times over, kept on disk between: tokenizing costs more than reading."""
    if times == 1:
        yield from stream
        return
    try:
        with tempfile.TemporaryFile() as file:
            for ids in stream:
                file.write(ids.tobytes())
                yield ids
            for _ in range(times - 1):
                file.seek(0)
                yield from (np.frombuffer(block, dtype=np.int32) for block in iter(lambda: file.read(1 << 22), b""))
    except OSError as error:
        raise DataError(f"the ids cannot be kept in {tempfile.gettempdir()} to repeat: {error.strerror}.") from None


def _batches(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    total = 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total >= _BATCH_CHARS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _samples(prompts: Sequence[str], tokenizer: Encoder) -> Iterator[tuple[np.ndarray, list[tuple[int, int]]]]:
    """Yield each prompt's ids, and of each round that is labelled its length and its instruction's, in tokens."""
    rounds = [list(takewhile(bool, prompt.split("</s>"))) for prompt in prompts]
    heads = [
        [parts[0] + _ANSWER for parts in takewhile(lambda parts: len(parts) == 2, (a.split(_ANSWER) for a in found))]
        for found in rounds
    ]
    encoded = iter(_tokenize([text for pair in zip(rounds, heads) for texts in pair for text in texts], tokenizer))
    bos, eos = (np.array([at], dtype=np.uint32) for at in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    for texts, instructions in zip(rounds, heads):
        ids = [np.concatenate([*next(encoded), eos]) for _ in texts]
        # An instruction is its tokens but the last: it ends in a space, which is a token of its own only there.
        masked = [sum(map(len, next(encoded))) - 1 for _ in instructions]
        yield np.concatenate([bos, *ids]), [(len(part), count) for part, count in zip(ids, masked)]


def _labelled(
    sample: np.ndarray, spans: Sequence[tuple[int, int]], tokenizer: Encoder, length: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and labels of one record, each int32 [length], by the script's own arithmetic."""
    padded = np.full(max(length, len(sample)), tokenizer.unk_token_id, dtype=np.int32)
    padded[: len(sample)] = sample
    labels = padded.copy()
    labels[0] = IGNORED
    at = 1
    for count, masked in spans:
        labels[at : at + masked] = IGNORED
        at += count
    labels[at:] = IGNORED
    if at < length:
        if len(sample) > length:
            raise DataError(
                f"{where}: the sample has {len(sample)} tokens, more than the {length} of a record, and an empty turn "
                f"or a turn with {_ANSWER.strip()!r} in its text, on which MindFormers' script breaks off without a "
                "file: leave the record out, or raise seq_length."
            )
        # There a token of the text that is `<unk>` counts as padding, and the whole sample is given up.
        if at != np.count_nonzero(padded != tokenizer.unk_token_id):
            labels[:] = IGNORED
    return padded[:length], labels[:length]


def _cleaned(path: Path) -> Iterator[str]:
    """Yield the file's text as wikitext_clean leaves it.

    Its brackets and quotes are paired through the whole file, across paragraphs. No stage makes or takes away
    a closer (but for the slip's), so counting them first tells of each opener whether its closer is still to come.
    """
    closers = dict.fromkeys((pair[1] for pair in _BRACKETS), 0)
    for chunk in _resplit(_read(path), *_SLIP):
        for closer in closers:
            closers[closer] += chunk.count(closer)
    chunks = _resplit(_replaced(_read(path), "s '", "s'"), *_SLIP)
    for old, new in _BEFORE_BRACKETS:
        chunks = _replaced(chunks, old, new)
    for opener, closer in _BRACKETS:
        chunks = _tightened(chunks, opener, closer, closers[closer])
    for old, new in _AFTER_BRACKETS:
        chunks = _replaced(chunks, old, new)
    return chunks


def _replaced(chunks: Iterable[str], old: str, new: str) -> Iterator[str]:
    """Do what str.replace does to the whole."""
    return _resplit(chunks, functools.partial(_split, old=old), len(old), new)


def _split(text: str, old: str) -> list[str]:
    """Return text.split(old), five times as fast where one of its characters is rare."""
    mark = old.replace(" ", "")[-1]
    if text.count(mark) * 256 > len(text):
        return text.split(old)
    offset, parts, start = old.rindex(mark), [], 0
    at = text.find(mark)
    while at >= 0:
        if at - offset >= start and text.startswith(old, at - offset):
            parts.append(text[start : at - offset])
            start = at - offset + len(old)
            at = start - 1
        at = text.find(mark, at + 1)
    return [*parts, text[start:]]


def _resplit(chunks: Iterable[str], split: Callable[[str], list[str]], width: int, new: str) -> Iterator[str]:
    """Put `new` between what `split` parts; held back is what a match of `width` over the seam could begin with."""
    held = ""
    for chunk in chunks:
        *done, last = split(held + chunk)
        seam = max(len(last) - width + 1, 0)
        held = last[seam:]
        yield new.join([*done, last[:seam]])
    yield held


def _tightened(chunks: Iterable[str], opener: str, closer: str, num_closers: int) -> Iterator[str]:
    """Drop white space after each opener and before the next closer, for openers that have one.

    Equals re.sub of opener, \\s*, anything but closers, \\s*, closer: within a pair an opener means nothing.
    """
    seen, inside, held = 0, False, ""  # closers so far; white space that may turn out to stand before a closer
    fresh = False  # nothing but white space since the opener
    for chunk in chunks:
        parts: list[str] = []
        at = 0
        while inside or seen < num_closers:
            end = chunk.find(closer if inside else opener, at)
            text = chunk[at : None if end < 0 else end]
            if inside:
                text = text.lstrip() if fresh else held + text
                fresh = fresh and not text
                kept = text.rstrip()
                held = "" if end >= 0 else text[len(kept) :]
                parts.append(kept)
            else:
                seen += text.count(closer)
                parts.append(text)
            if end < 0:
                at = len(chunk)
                break
            at = end + 1
            parts.append(chunk[end])
            if inside:
                seen, inside = seen + 1, False
            else:
                seen += opener == closer
                inside = fresh = seen < num_closers
        parts.append(chunk[at:])
        yield "".join(parts)
    yield held


def _paragraphs(chunks: Iterable[str]) -> Iterator[str]:
    """Split at each "\\n\\n" as str.split does, one paragraph in memory."""
    pending: list[str] = []
    held = ""
    for chunk in chunks:
        *ended, last = (held + chunk).split("\n\n")
        for part in ended:
            yield "".join([*pending, part])
            pending = []
        held = "\n" if last.endswith("\n") else ""
        pending.append(last[: len(last) - len(held)])
    yield "".join([*pending, held])


def _read(path: Path) -> Iterator[str]:
    """Yield the text of a file in pieces, line ends as Python reads them (\\r\\n is \\n), as there."""
    try:
        if not path.is_file():  # it is read twice, which a pipe cannot
            raise DataError(f"{str(path)!r} is not a file: name one that exists, as for MindFormers' script.")
        with path.open(encoding="utf-8") as file:
            yield from iter(lambda: file.read(_CHUNK_CHARS), "")
    except UnicodeDecodeError:
        raise DataError(_not_utf8(path)) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _not_utf8(path: Path) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return (
                    f"{path} line {number}: byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not "
                    "UTF-8: convert the file, for instance with iconv -t UTF-8."
                )
    return f"{path} is not UTF-8: convert the file, for instance with iconv -t UTF-8."


def _prompt(record: Any, where: str) -> str:
    """Return the conversation as vicuna v1.1 writes it; an empty turn is its title and a colon."""
    turns = record.get("conversations") if isinstance(record, Mapping) else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f'{where}: "conversations" must be a list of at least one {{"from", "value"}} object.')
    if turns[0].get("from") != "human":
        turns = turns[1:]
    text = _SYSTEM + " "
    for at, turn in enumerate(turns):
        who, value = turn.get("from"), turn.get("value")
        if who != _ROLES[at % 2]:
            raise DataError(f"{where}: turns must go human, gpt, human, …; turn {at + 1} is from {who!r}.")
        if "value" not in turn or not isinstance(value, str | None):
            raise DataError(f'{where}: the "value" of turn {at + 1} must be a text.')
        text += f"{_TITLES[at % 2]}: {value}{_SEPARATORS[at % 2]}" if value else f"{_TITLES[at % 2]}:"
    _check_characters(text, where)
    return text


def _alpaca_prompt(record: Any, where: str) -> str:
    """Return the prompt of Stanford Alpaca's training script for one record."""
    has_input = isinstance(record, Mapping) and record.get("input", "") != ""
    paired = ", paired with an input that provides further context" if has_input else ""
    shown = f"### Input:\n{_alpaca_field(record, 'input', where)}\n\n" if has_input else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{_alpaca_field(record, 'instruction', where)}\n\n{shown}### Response:"
    )


def _alpaca_field(record: Any, field: str, where: str) -> str:
    value = record.get(field) if isinstance(record, Mapping) else None
    if not isinstance(value, str):
        raise DataError(f'{where}: "{field}" must be a text: Alpaca has instruction, input (which may miss), output.')
    _check_characters(value, where)
    return value


def _check_characters(text: str, where: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{where}: half of a surrogate pair (\\ud800 to \\udfff) is no character: remove it."
            ) from None


def _numbered(source: Source) -> Iterator[tuple[str, Any]]:
    """Yield each record of a JSON list, or of any iterable, behind its name in an error."""
    if isinstance(source, str | Path):
        source, name = _elements(Path(source)), f"{source} record"
    else:
        name = "record"
    yield from ((f"{name} {number}", record) for number, record in enumerate(source, start=1))


def _elements(path: Path) -> Iterator[Any]:
    """Yield the elements of the JSON list in a file, one in memory."""
    chunks = _read(path)
    text, at, count = next(chunks, "").removeprefix("\ufeff"), 0, 0
    text, at = _past_space(text, at, chunks)
    if text[at : at + 1] != "[":
        raise DataError(f"{path} is not a JSON list of records: it must start with [.")
    text, at = _past_space(text, at + 1, chunks)
    while text[at : at + 1] != "]" or count:
        count += 1
        found, text, at = _value(text, at, chunks, f"{path} record {count}")
        yield found
        text, at = _past_space(text, at, chunks)
        if text[at : at + 1] != ",":
            break
        text, at = _past_space(text, at + 1, chunks)
    if text[at : at + 1] != "]":
        raise DataError(f"{path} is damaged or cut after record {count}: a JSON list goes on with a comma or ].")
    text, at = _past_space(text, at + 1, chunks)
    if at < len(text):
        raise DataError(f"{path} goes on after the list of its {count} records has ended: it must be one JSON list.")


def _past_space(text: str, at: int, chunks: Iterator[str]) -> tuple[str, int]:
    """Return the text, read on where needed, and where in it something other than white space stands, or its end."""
    while True:
        while at < len(text) and text[at] in " \t\n\r":
            at += 1
        if at < len(text) or not (more := next(chunks, "")):
            return text, at
        text, at = more, 0


def _value(text: str, at: int, chunks: Iterator[str], where: str) -> tuple[Any, str, int]:
    """Return the JSON value at `at`, the text read on as far as it goes, and the value's end in it."""
    while True:
        try:
            found, end = _DECODER.raw_decode(text, at)
            return found, text, end
        except RecursionError:
            raise DataError(f"{where}: it is nested too deeply: leave it out.") from None
        except ValueError as error:
            # What is wrong far from the end is wrong for good, but a string is reported where it begins.
            reason, place = getattr(error, "msg", "a number is too long"), getattr(error, "pos", 0)
            cut = reason.startswith("Unterminated") or place > len(text) - 16
            more = list(_up_to(chunks, len(text) - at)) if cut and len(text) - at < _LONGEST_CHARS else []
            if not more:
                raise DataError(f"{where}: this is not JSON ({reason}): mend it, or fetch the file again.") from None
            text, at = "".join([text[at:], *more]), 0


def _up_to(chunks: Iterator[str], num_chars: int) -> Iterator[str]:
    """Pass on pieces until they have `num_chars`: doubling keeps reading a long record linear."""
    while num_chars > 0 and (chunk := next(chunks, "")):
        yield chunk
        num_chars -= len(chunk)
