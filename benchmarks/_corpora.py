"""Real text for `prepare.py`, gathered from the machine that it runs on: what its packages say, each content once.

Nothing is downloaded and no file is repeated: a content counts once, by its SHA-256.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import site
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_SUFFIXES = (".py", ".pyi", ".txt", ".md", ".rst", ".html", ".pod", ".pm", ".h", ".xml", ".tex", ".js", ".css", ".po")
_SYSTEM = ("/usr/share", "/usr/lib/python3", "/usr/lib", "/usr/local/lib", "/usr/include", "/etc")
_FILE_BYTES = (200, 4 << 20)


def gather(folder: Path, num_bytes: int) -> tuple[int, int]:
    """Write distinct text files of at least `num_bytes` in all, or all there are; return how many, and their bytes."""
    seen: set[bytes] = set()
    total = 0
    for text in _texts():
        key = hashlib.sha256(text).digest()
        if key in seen:
            continue
        place = folder / f"{len(seen) // 500:04d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{len(seen):06d}.txt").write_bytes(text)
        seen.add(key)
        total += len(text)
        if total >= num_bytes:
            break
    return len(seen), total


def _texts() -> Iterator[bytes]:
    standard = sysconfig.get_paths()["stdlib"]
    for place in dict.fromkeys((standard, *site.getsitepackages(), *_SYSTEM)):
        for base, folders, names in os.walk(place):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            for name in sorted(names):
                text = _text(os.path.join(base, name))
                if text is not None:
                    yield text


def _text(path: str) -> bytes | None:
    """Return the UTF-8 text that a file holds, unpacked; None where it is no text, a link, or of an odd size."""
    plain = path.removesuffix(".gz")
    named = plain.endswith(_SUFFIXES) or "/doc/" in path or "/man/" in path
    try:
        if not named or os.path.islink(path) or not _FILE_BYTES[0] <= os.path.getsize(path) <= _FILE_BYTES[1]:
            return None
        data = Path(path).read_bytes()
        data = gzip.decompress(data) if path.endswith(".gz") else data
        data.decode("utf-8")
    except (OSError, EOFError, ValueError):
        return None
    return None if b"\0" in data or not data.strip() else data


def as_wikitext(folder: Path, file: Path, num_bytes: int) -> int:
    """Reshape gathered files into one file of WikiText's token format, up to `num_bytes`; return its bytes.

    Every file becomes an article; marks stand between spaces, hyphens and marks within numbers become ` @-@ ` and its
    kin, a paragraph is a line.
    """
    with file.open("w", encoding="utf-8") as out:
        for at, path in enumerate(sorted(folder.rglob("*.txt"))):
            if out.tell() > num_bytes:
                break
            out.write(f" \n = Article {at} = \n \n")
            for paragraph in re.split(r"\n\s*\n", path.read_text("utf-8")):
                words = _tokens(paragraph)
                if words:
                    out.write(f" {words} \n")
    return file.stat().st_size


def _tokens(text: str) -> str:
    text = re.sub(r"(?<=\d)([.,])(?=\d)", r" @\1@ ", text)
    text = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", text)
    text = re.sub(r"(?<![@\w])([.,;:!?()\"'\[\]{}])|(?<=\w)([.,;:!?()\"'\[\]{}])(?!@)", r" \1\2 ", text)
    return " ".join(text.split()).strip("= ")


def permuted(folder: Path, out: Path, num_bytes: int, seed: int) -> int:
    """Write a corpus that differs everywhere, in several files and kinds: the words of the gathered text, permuted.

    Text files of some 16 MB, a document each, and files of some 64 MB of JSON Lines and of ShareGPT conversations.
    Returns the bytes.
    """
    draw = np.random.default_rng(seed)
    paths = sorted(folder.rglob("*.txt"))[:3000]
    words = np.array([word for path in paths for word in path.read_text("utf-8").split(" ") if word], object)
    out.mkdir(parents=True, exist_ok=True)
    total = number = 0
    while total < num_bytes:
        kind = ("text", "jsonl", "sharegpt")[number % 3]
        path = out / f"{number:04d}-{kind}.{'txt' if kind == 'text' else 'jsonl'}"
        with path.open("w", encoding="utf-8") as file:
            while file.tell() < min((16 if kind == "text" else 64) << 20, num_bytes):
                text = " ".join(words[draw.integers(0, len(words), 20_000)].tolist())
                file.write(_record(kind, text))
        total += path.stat().st_size
        number += 1
    return total


def _record(kind: str, text: str) -> str:
    if kind == "text":
        return text + "\n"
    if kind == "jsonl":
        return json.dumps({"text": text}, ensure_ascii=False) + "\n"
    cut = len(text) // 40
    said = [text[at : at + cut] + "." for at in range(0, len(text) - cut, cut)]
    turns = [{"from": ("human", "gpt")[at % 2], "value": one} for at, one in enumerate(said[: len(said) // 2 * 2])]
    pairs = [turns[at : at + 4] for at in range(0, len(turns) // 4 * 4, 4)]
    return "".join(json.dumps({"conversations": pair}, ensure_ascii=False) + "\n" for pair in pairs)


def part_of(files: list[Path], out: Path, num_bytes: int) -> int:
    """Write JSON Lines, a `text` each, of evenly spread files until there are `num_bytes`; return the text's bytes."""
    total = 0
    step = max(1, sum(file.stat().st_size for file in files) // max(1, num_bytes))
    with out.open("w", encoding="utf-8") as file:
        for path in files[::step]:
            text = path.read_text("utf-8")
            file.write(json.dumps({"text": text}) + "\n")
            total += len(text.encode())
    return total


def chats(path: Path) -> list[Any]:
    """Return the conversations of a sample file as our own sources read them."""
    from ostro.data import sources
    from ostro.data.records import Chat

    return [one for unit in sources.units([str(path)], "auto") for one in sources.read(unit) if isinstance(one, Chat)]
