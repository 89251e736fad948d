"""WikiText's token files: articles found again, and what its tokenizer did to the text undone.

The files hold one paragraph a line, headings as ` = Title = ` and ` = = Section = = `, every mark a word of its own,
and marks inside a word or number written ` @-@ `, ` @,@ ` and ` @.@ ` (Merity et al. 2016, arXiv 1609.07843). What
was lost for good stays lost: `<unk>`, and whether a dash or three dots stood between spaces.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from ostro.data.records import Text
from ostro.errors import DataError

# Each pattern's groups are kept and the rest of it dropped: "".join(pattern.split(text)) is twice as fast as sub.
_INSIDE = re.compile(" @([-,.])@ ")
_CONTRACTED = re.compile(r" (?='[^\W\d_])")  # 's, 't, O 'Neil, d 'état
_CLOSING = re.compile(r""" ([,.;:!?%)\]}′″♭♯°”’])(?=[ "'])""")
_AMOUNT = re.compile(r"( [$#]) (?=\d|<unk>)")
_DOLLAR = re.compile(r"(?<= US| NZ| HK| AU| CA) (?=\$\d)")
_DEGREES = re.compile(r"( °) (?=[CF][ ,.])")
_INITIALS = re.compile(r"(?<= [A-Z]) (&) (?=[A-Z] )")  # R & B
_YEAR = re.compile(r" \d\ds? ")
_OPENING = tuple((f"{mark} ", mark) for mark in "([{£€¥₤“‘¿¡")
_JOINING = tuple((f" {mark} ", mark) for mark in "/⁄\N{NON-BREAKING HYPHEN}")
# What a quote stands before when it closes, and after when it opens.
_ENDS, _STARTS = frozenset(",.;:!?)]}"), frozenset("([{—–")
_TOKENIZED = re.compile(r" @[-,.]@ |[^\W_] [,.] ")
_UNKNOWN = "<unk>"


@dataclasses.dataclass
class WikiTextReport:
    """What was read so far: articles, and the words in them that are `<unk>`."""

    articles: int = 0
    unknown: int = 0


def read_wikitext(
    source: str | Path | Iterable[str], name: str | None = None, report: WikiTextReport | None = None
) -> Iterator[Text]:
    """Yield one Text an article, its title first, headings as MediaWiki writes them (`== Section ==`).

    `source` is a file, or the lines of one, which `name` then names. What stands before the first title is a text of
    its own. One article is in memory at a time; `report` counts along. Raises DataError, with the line, for bytes
    that are no UTF-8.
    """
    report = WikiTextReport() if report is None else report
    if isinstance(source, str | Path):
        name, source = name or str(source), _lines(Path(source))
    for number, lines in _articles(source):
        text = "\n".join(lines)
        report.articles += 1
        report.unknown += text.count(_UNKNOWN)
        yield Text(text, f"{name} line {number}" if name else f"line {number}")


def looks_like_wikitext(head: str) -> bool:
    """Return whether `head`, the beginning of a file, is of this format: spaced headings and spaced marks."""
    lines = [line for line in head.removeprefix("\ufeff").split("\n") if line.strip()]
    body = [line for line in lines if not _heading(line)]
    return len(body) < len(lines) and (not body or any(_TOKENIZED.search(line) for line in body))


def detokenize(line: str) -> str:
    """Return one line as it stood before it was cut into words: marks close up, quotes are paired within it.

    A heading keeps its level: ` = = Early life = = ` becomes `== Early life ==`.
    """
    text = line.strip()
    if "  " in text:
        text = " ".join(text.split())
    if text.startswith("=") and (level := _heading(text)):
        bars = "=" * level
        return f"{bars} {_closed_up(' '.join(text.split()[level:-level]))} {bars}"
    return _closed_up(text)


def _closed_up(text: str) -> str:
    text = f" {text} "
    if "'" in text:
        text = "".join(_CONTRACTED.split(text))
    if " ' " in text:
        text = _pair_single(text)
    if '"' in text:
        text = _pair_double(text)
    text = _closed_by_neighbours(text)
    if "@" in text:
        text = "".join(_INSIDE.split(text))
    for spaced, mark in (*_JOINING, *_OPENING):
        if mark in text:
            text = text.replace(spaced, mark)
    return "".join(_CLOSING.split(text)).strip()


def _closed_by_neighbours(text: str) -> str:
    for spaced in (" – ", " : "):
        if spaced in text:
            text = _ranges_closed(text, spaced)
    if "$" in text or "#" in text:
        text = "".join(_DOLLAR.split("".join(_AMOUNT.split(text))))
    if "°" in text:
        text = "".join(_DEGREES.split(text))
    if "&" in text:
        text = "".join(_INITIALS.split(text))
    return text.replace(" ’ s ", "’s ") if "’" in text else text


def _ranges_closed(text: str, spaced: str) -> str:
    """Close up the mark between digits: 1904 – 05, 3 : 30."""
    first, *others = text.split(spaced)
    parts = [first]
    for part in others:
        between = parts[-1][-1:].isdigit() and part[:1].isdigit()
        parts += [spaced.strip() if between else spaced, part]
    return "".join(parts)


def _pair_double(text: str) -> str:
    """Close up each quote on one side: by turns, put right where what stands beside it leaves no doubt."""
    parts = text.split('"')
    inside = False
    for at in range(1, len(parts)):
        before, after = parts[at - 1], parts[at]
        if before[-1:] == " " and after[:1] == " ":
            ends = after == " " or (after[1:2] in _ENDS and after[2:3] == " ")
            starts = before == " " or before[-2:-1] in _STARTS
            inside = not ends and (not inside or starts)
            if inside:
                parts[at] = after[1:]
            else:
                parts[at - 1] = before[:-1]
    return '"'.join(parts)


def _pair_single(text: str) -> str:
    """Close up each lone ' as a quote, a plural's apostrophe (`the visitors ' room`) or a year's (`' 60s`)."""
    parts = text.split("'")
    lone = [at for at in range(1, len(parts)) if parts[at - 1][-1:] == " " and parts[at][:1] == " "]
    inside = False
    for at in lone:
        before, after = parts[at - 1], parts[at]
        ends = after == " " or (after[1:2] in _ENDS and after[2:3] == " ")
        plural = before[-2:-1] in ("s", "S", "z") or before.endswith(f"{_UNKNOWN} ")
        opens = not (inside or ends or plural or at == lone[-1])
        if opens or (not inside and _YEAR.match(after)):
            parts[at] = after[1:]
        else:
            parts[at - 1] = before[:-1]
        inside = opens
    return "'".join(parts)


def _heading(text: str) -> int:
    """Return the level of a heading, 0 for any other line."""
    words = text.split()
    if len(words) < 3 or words[0] != "=" or words[-1] != "=":
        return 0
    before = next((at for at, word in enumerate(words) if word != "="), 0)
    after = next((at for at, word in enumerate(reversed(words)) if word != "="), 0)
    return before if before == after else 0


def _articles(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield each article's first line number and its lines, detokenized; blank lines come one at a time, inside.

    A title stands between blank lines; formulas (`= x =`) do not.
    """
    article: list[str] = []
    first, joins = 1, False  # joins: the line before is not blank
    for number, line, after in _with_next(lines):
        if line.isspace() or not line:
            joins = False
            continue
        if not joins and not after.strip() and _heading(line) == 1:
            if article:
                yield first, article
            article = []
        if not article:
            first = number
        elif not joins:
            article.append("")
        article.append(detokenize(line))
        joins = True
    if article:
        yield first, article


def _with_next(lines: Iterable[str]) -> Iterator[tuple[int, str, str]]:
    """Yield each line's number, the line and the one after it, "" where there is none."""
    held: str | None = None
    number = 0
    for following in lines:
        if held is not None:
            yield number, held, following
        held = following
        number += 1
    if held is not None:
        yield number, held, ""


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode()
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path} line {number}: byte {error.start + 1} of the line (0x{line[error.start]:02x}) is not "
                        "UTF-8: convert the file, for instance with iconv -t UTF-8, or leave it out."
                    ) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise DataError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
