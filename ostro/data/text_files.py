"""Bytes of files in chunks and lines, gzip and Zstandard undone by content, and the texts that they hold."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from ostro.data.records import Record, Text, Unit
from ostro.errors import DataError

LARGEST = 1 << 25  # bytes of one document or line; its tokens take ten times the memory
BOM = b"\xef\xbb\xbf"
PACKED = (".gz", ".zst")
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_CHUNK, _PACKED_CHUNK = 1 << 18, 1 << 14  # what is packed may become a thousand times as much
_INSIDE = re.compile(r"(.+?) line (\d+) after byte (\d+)", re.DOTALL)

Item = Record | DataError | None  # what a record became: itself, what is wrong with it, or nothing to learn


def place(path: str, line: int, start: int = 0) -> str:
    """Return how a record names its place: its line, counted from byte `start` of the file (see `exact`)."""
    return f"{path} line {line}" if start == 0 else f"{path} line {line} after byte {start}"


def exact(text: str) -> str:
    """Return a place, or a message that begins with one, with its line counted from the start of the file.

    A span in the middle of a file does not know how many lines come before it, and counting them costs a pass over
    the file: it is done here, for what is shown to somebody.
    """
    found = _INSIDE.match(text)
    if found is None:
        return text
    path, line, start = found[1], int(found[2]), int(found[3])
    try:
        before = sum(chunk.count(b"\n") for chunk in chunks(path, 0, start))
    except DataError:  # it is gone: the place is right as it stands
        return text
    return f"{path} line {before + line}{text[found.end() :]}"


def packing(path: str, head: bytes) -> str | None:
    """Return ".gz" or ".zst" for a file that begins with `head`, None for a plain one.

    Raises DataError where the name says packed and the content does not.
    """
    suffix = os.path.splitext(path)[1]
    found = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if found is None and suffix in PACKED:
        raise _not_whole(path, suffix)
    return found


def chunks(path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield the bytes [start, stop) of a file, unpacked, a piece at a time.

    Raises DataError for a file that cannot be read, is not whole, or became shorter than `stop`.
    """
    try:
        with open(path, "rb") as file:
            packed = packing(path, file.read(4))
            file.seek(start)
            yield from _plain(file, path, start, stop) if packed is None else _unpacked(file, path, packed)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise unreadable(path, error) from None


def unreadable(path: str, error: Exception) -> DataError:
    """Return the sentence for what the operating system says of a file."""
    return DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.")


def head(path: str, size: int = 1 << 16) -> bytes:
    """Return the first bytes of a file, unpacked and without byte order mark; fewer where it is shorter."""
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # a corpus has a million files
        try:
            found = os.read(file, size + len(BOM))
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if packing(path, found[:4]) is None:
        return found.removeprefix(BOM)[:size]
    found = b""
    for chunk in chunks(path):
        found += chunk[: size + len(BOM)]
        if len(found) >= size:
            break
    return found.removeprefix(BOM)[:size]


def lines(path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    r"""Yield the lines of a span without their `\n`, nor the file's byte order mark.

    Raises DataError as `chunks` does, and for a line of more than LARGEST bytes.
    """
    held: list[bytes] = []
    size = number = 0
    for chunk in chunks(path, start, stop):
        first, *rest = chunk.split(b"\n")
        held.append(first)
        size += len(first)
        if size > LARGEST:
            raise too_long(exact(place(path, number + 1, start)), "the line")
        if rest:
            line = b"".join(held)
            yield line.removeprefix(BOM) if start == number == 0 else line
            yield from rest[:-1]
            number += len(rest)
            held, size = [rest[-1]], len(rest[-1])
    if line := b"".join(held):
        yield line.removeprefix(BOM) if start == number == 0 else line


def too_long(where: str, what: str) -> DataError:
    """Return the sentence for a document or line that would not fit into memory."""
    return DataError(
        f"{where}: {what} is longer than {LARGEST >> 20} MiB: cut it into documents, or say --documents line or blank."
    )


def utf8(data: bytes | bytearray, path: str, line: int = 1, start: int = 0) -> str:
    """Return `data`, which begins at `line` of the span from byte `start`, as text; DataError names the bad byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
    where = place(path, line + data.count(b"\n", 0, at), start)
    if start == 0 and line == 1 and data.startswith(_UTF16):
        raise DataError(f"{where}: the file is UTF-16: convert it, for instance with iconv -f UTF-16 -t UTF-8.")
    column = at - data.rfind(b"\n", 0, at)
    raise DataError(
        f"{where}: byte {column} of the line (0x{data[at]:02x}) is not UTF-8: convert the file, for instance with "
        "iconv -t UTF-8, or leave it out."
    )


def read_whole(unit: Unit) -> Iterator[Item]:
    """Yield the file as one text, kept as it is but for a byte order mark; nothing where it is blank."""
    text = utf8(_whole(unit.path).removeprefix(BOM), unit.path)
    if text and not text.isspace():
        yield Text(text, unit.path)


def _whole(path: str) -> bytes:
    """Return all bytes of a file, unpacked; a small plain one, of which there may be a million, in few calls."""
    with contextlib.suppress(OSError, ValueError):  # which `chunks` puts into words
        with open(path, "rb", buffering=0) as file:
            data = file.read(_CHUNK)
        if len(data) < _CHUNK and packing(path, data[:4]) is None:
            return data
    found = bytearray()
    for chunk in chunks(path):
        found += chunk
        if len(found) > LARGEST:
            raise too_long(path, "the file")
    return bytes(found)


def read_lines(unit: Unit) -> Iterator[Item]:
    """Yield each line that is not blank as a text."""
    for number, line in enumerate(lines(unit.path, unit.start, unit.stop), start=1):
        if line and not line.isspace():
            yield _text(line, unit, number)


def read_blocks(unit: Unit) -> Iterator[Item]:
    """Yield what blank lines separate as texts."""
    block: list[bytes] = []
    size = 0
    number = 0
    for number, line in enumerate(lines(unit.path, unit.start, unit.stop), start=1):
        if not is_blank(line):
            block.append(line)
            size += len(line) + 1
            if size > LARGEST:
                raise too_long(exact(place(unit.path, number, unit.start)), "the block of lines")
        elif block:
            yield _text(b"\n".join(block), unit, number - len(block))
            block, size = [], 0
    if block:
        yield _text(b"\n".join(block), unit, number - len(block) + 1)


def read_articles(unit: Unit) -> Iterator[Item]:
    """Yield the articles of a WikiText file."""
    from ostro.data.wikitext import read_wikitext

    numbered = enumerate(lines(unit.path, unit.start, unit.stop), start=1)
    for text in read_wikitext((utf8(line, unit.path, number, unit.start) for number, line in numbered), unit.path):
        yield text if unit.start == 0 else Text(text.text, f"{text.where} after byte {unit.start}")


def is_blank(line: bytes) -> bool:
    """Return whether a line separates blocks."""
    return not line or line.isspace()


def _text(data: bytes, unit: Unit, number: int) -> Item:
    try:
        text = utf8(data.removesuffix(b"\r"), unit.path, number, unit.start)
    except DataError as error:
        return error
    return Text(text, place(unit.path, number, unit.start)) if text.strip() else None  # other blanks than ASCII's


def _plain(file: IO[bytes], path: str, start: int, stop: int | None) -> Iterator[bytes]:
    at = start
    while stop is None or at < stop:
        chunk = file.read(_CHUNK if stop is None else min(_CHUNK, stop - at))
        if not chunk:
            if stop is not None:
                raise DataError(f"{path} became shorter while it was read: prepare it again when nobody writes to it.")
            return
        at += len(chunk)
        yield chunk


def _unpacked(file: IO[bytes], path: str, packed: str) -> Iterator[bytes]:
    new, failure = _unpacker(packed, path)
    part = new()
    try:
        while data := file.read(_PACKED_CHUNK):
            while data:
                if part.eof:
                    if not (data := data.lstrip(b"\0")):  # archives on tape are padded with zeros
                        break
                    part = new()
                yield part.decompress(data)
                data = part.unused_data if part.eof else b""
        if not part.eof:
            raise EOFError
    except (EOFError, failure):
        raise _not_whole(path, packed) from None


def _unpacker(packed: str, path: str) -> tuple[Callable[[], Any], type[Exception]]:
    """Return what makes an unpacker of one stream (`decompress`, `eof`, `unused_data`), and what it raises."""
    if packed == ".gz":
        return functools.partial(zlib.decompressobj, wbits=31), zlib.error
    try:
        from compression import zstd  # pyright: ignore[reportMissingImports]  # Python 3.14

        return zstd.ZstdDecompressor, zstd.ZstdError
    except ImportError:
        pass
    try:
        import zstandard  # pyright: ignore[reportMissingImports]

        return lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
    except ImportError:
        raise DataError(
            f"{path} is packed with Zstandard, which needs Python 3.14 or a package: pip install 'ostro[zstd]', or "
            "unpack it with zstd -d."
        ) from None


def _not_whole(path: str, packed: str) -> DataError:
    name = {".gz": "gzip", ".zst": "Zstandard"}[packed]
    return DataError(f"{path} is not a whole {name} file: fetch it again, or take away {packed} if it is plain.")
