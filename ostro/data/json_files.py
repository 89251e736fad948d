"""Records of JSON: a line each, or values over many lines, in an array or one after another, read as a stream."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from ostro.data.conversations import CONVERSATIONS, kind_of
from ostro.data.records import Text, Unit
from ostro.data.text_files import LARGEST, Item, chunks, head, lines, place, too_long, utf8
from ostro.errors import DataError

Decode = Callable[[str, int], tuple[Any, int]]

_SPACE = re.compile(r"[ \t\n\r]*")
# A value that goes on after the end of what was read so far fails at most this far before that end: at a word like
# -Infinity or an escape. A string that goes on fails where it begins, and says so.
_CUT_CHARS, _CUT_STRING = 16, "Unterminated string"


class _KeyTwice(ValueError):
    """A key stands twice in one object, and which of its values is meant nobody knows."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _KeyTwice(f"the key {twice!a} stands twice in one object")
    return found


_quick = json.JSONDecoder().raw_decode
_strict = json.JSONDecoder(object_pairs_hook=_each_key_once).raw_decode


def read_texts(unit: Unit) -> Iterator[Item]:
    """Yield the field `text` of each record; blank ones are left out."""
    return _read(unit, "jsonl")


def read_alpaca(unit: Unit) -> Iterator[Item]:
    """Yield Alpaca's records as conversations."""
    return _read(unit, "alpaca")


def read_sharegpt(unit: Unit) -> Iterator[Item]:
    """Yield ShareGPT's records as conversations."""
    return _read(unit, "sharegpt")


def read_messages(unit: Unit) -> Iterator[Item]:
    """Yield OpenAI's messages as conversations."""
    return _read(unit, "messages")


def read_prompts(unit: Unit) -> Iterator[Item]:
    """Yield prompts and their completions as conversations."""
    return _read(unit, "prompt")


def kind_of_fields(record: dict[str, Any]) -> str | None:
    """Return the kind whose fields a record has; a conversation's win over a text beside it."""
    found = kind_of(record)
    if found == "prompt_completion":
        return "prompt"
    return found or ("jsonl" if "text" in record else None)


def made(kind: str, record: Any, where: str) -> Item:
    """Return what a record of `kind` becomes, or the DataError that says why it becomes nothing."""
    try:
        if kind == "jsonl":
            return _text(record, where)
        return CONVERSATIONS["prompt_completion" if kind == "prompt" else kind](record, where)
    except DataError as error:
        return error


def opening(path: str) -> tuple[bool, Any]:
    """Return whether a file's records stand a line each, and the first of them (None where it cannot be read)."""
    first = head(path).lstrip()[:1]
    if first == b"{":
        line = next(line for line in lines(path) if line and not line.isspace())
        try:
            return True, _parsed(utf8(line, path), path, _quick)
        except DataError:
            pass
    if first in (b"{", b"["):
        try:
            return False, next(values(path, _quick), None)
        except DataError:
            return first == b"{", None
    return True, None


def values(path: str, decode: Decode) -> Iterator[Any]:
    """Yield the elements of a file's array, or the values that stand one after another.

    A piece of the file is in memory, more of it where one value is longer. Raises DataError, with the line, where it is
    no JSON; nothing after that can be told apart.
    """
    window = _Window(path, decode)
    if window.next() != "[":
        while window.next():
            yield window.value()
        return
    window.at += 1
    mark = window.next()
    window.at += mark == "]"
    while mark != "]":
        window.next()
        yield window.value()
        mark = window.next()
        if mark not in (",", "]"):
            raise window.wrong("expecting ',' or ']'" if mark else "the file ends within the array")
        window.at += 1
    if window.next():
        raise window.wrong("something follows the array")


class _Window:
    """The part of a JSON file that is being looked at: `text`, and the place `at` in it."""

    def __init__(self, path: str, decode: Decode) -> None:
        self.text, self.at = "", 0
        self._path, self._decode = path, decode
        self._parts = _decoded(path)
        self._first_line = 1  # on which `text` begins

    def next(self) -> str:
        """Go to the next character that is not blank and return it, "" at the end of the file."""
        while True:
            found = _SPACE.match(self.text, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self.text) or not self._grow():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """Return the value that begins here and go to its end."""
        while True:
            try:
                value, end = self._decode(self.text, self.at)
            except json.JSONDecodeError as error:
                may_go_on = error.msg.startswith(_CUT_STRING) or error.pos >= len(self.text) - _CUT_CHARS
                if may_go_on and self._grow():
                    continue
                raise self.wrong(error.msg[:1].lower() + error.msg[1:], error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self.wrong(_reason(error)) from None
            if end > len(self.text) - _CUT_CHARS and self._grow():  # a number may go on: 1, 1.5, 1.5e-7
                continue
            self.at = end
            return value

    def wrong(self, reason: str, at: int | None = None) -> DataError:
        """Return the sentence that the JSON at the window's place, or at `at`, is none."""
        return DataError(
            f"{place(self._path, self._line(at))}: this is not JSON ({reason}): mend it, or write one record a line, "
            "so that a bad one spoils no other; for a plain text file say --kind text."
        )

    def _line(self, at: int | None = None) -> int:
        return self._first_line + self.text.count("\n", 0, self.at if at is None else at)

    def _grow(self) -> bool:
        """Read on, at least as much again as there is; what lies before `at` is forgotten. False at the end."""
        kept, line = self.text[self.at :], self._line()
        if len(kept) > LARGEST:
            raise too_long(place(self._path, line), "the record")
        parts = [next(self._parts, "")]
        if not parts[0]:
            return False
        size = len(parts[0])
        while size < len(kept) and (part := next(self._parts, "")):
            parts.append(part)
            size += len(part)
        self.text, self.at, self._first_line = kept + "".join(parts), 0, line
        return True


def _decoded(path: str) -> Iterator[str]:
    """Yield a file's text in parts; DataError names the line that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    done = 1
    for chunk in chunks(path):
        try:
            part = decoder.decode(chunk)
        except UnicodeDecodeError as error:
            utf8(error.object, path, done)
            raise AssertionError("what failed to decode decodes") from None
        done += part.count("\n")
        if part:
            yield part
    pending, _ = decoder.getstate()
    if pending:
        utf8(bytes(pending), path, done)


def _read(unit: Unit, kind: str) -> Iterator[Item]:
    by_line = unit.start > 0 or unit.stop is not None or opening(unit.path)[0]
    if by_line:
        decode = None if kind == "jsonl" else _strict
        for number, line in enumerate(lines(unit.path, unit.start, unit.stop), start=1):
            if line and not line.isspace():
                yield _line(line, number, unit, kind, decode)
    else:
        for number, value in enumerate(values(unit.path, _strict), start=1):
            yield made(kind, value, f"{unit.path} record {number}")


def _line(line: bytes, number: int, unit: Unit, kind: str, decode: Decode | None) -> Item:
    if decode is None:  # one key is of interest, and whether it is there twice is seen faster than asked of each
        decode = _quick if line.count(b'"text"') < 2 else _strict
    try:
        where = place(unit.path, number, unit.start)
        record = _parsed(utf8(line, unit.path, number, unit.start), where, decode)
    except DataError as error:
        return error
    return made(kind, record, where)


def _parsed(line: str, where: str, decode: Decode) -> Any:
    try:
        record, end = decode(line, len(line) - len(line.lstrip(" \t\r")))
        if end < len(line) and line[end:].strip(" \t\r"):
            raise json.JSONDecodeError("Extra data", line, end)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: this is not JSON ({_reason(error)}): every line must be one object like "
            '{"text": "..."}; for a plain text file say --kind text.'
        ) from None
    return record


def _text(record: Any, where: str) -> Text | None:
    if not isinstance(record, dict) or "text" not in record:
        raise DataError(f'{where}: a document needs the field "text", and {_instead(record)}.')
    text = record["text"]
    if not isinstance(text, str):
        raise DataError(f'{where}: "text" must be a string, and is {type(text).__name__}: put it in quotes.')
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(
                f'{where}: "text" holds half of a surrogate pair (\\ud800 to \\udfff), which is no character: remove '
                "it or write the whole pair."
            ) from None
    return Text(text, where) if text.strip() else None


def _instead(record: Any) -> str:
    if not isinstance(record, dict):
        return 'this is no object: write {"text": "..."}'
    other = kind_of_fields(record)
    advice = f"say --kind {other}" if other else "add it, or rename the one that holds the text"
    return f"this is an object with {fields(record)}: {advice}"


def fields(record: dict[str, Any]) -> str:
    """Return the names of a record's fields as an error shows them: the first few, on one line."""
    names = [ascii(name)[:40] for name in list(record)[:8]]
    return ", ".join(names) + (", ..." if len(record) > 8 else "") if names else "nothing in it"


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.colno}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error) if isinstance(error, _KeyTwice) else "it holds a number of more than 4300 digits"
