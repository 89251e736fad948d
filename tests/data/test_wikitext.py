"""WikiText: articles, headings and marks against what is known of the real file, and nothing but spaces lost."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ostro.data.wikitext import WikiTextReport, detokenize, looks_like_wikitext, read_wikitext
from ostro.errors import DataError

SMALL = (
    " \n = First = \n \n A line , of 1 @,@ 000 words . \n Another ( one ) . \n \n = = Part = = \n \n Its text . \n"
    ' \n = Second = \n \n <unk> said " no " . \n \n'
)
WORDS = [
    *".,;:!?%()[]{}\"'/$#&°–—",
    "'s",
    "'t",
    "@-@",
    "@,@",
    "@.@",
    "=",
    "word",
    "is",
    "1904",
    "05",
    "<unk>",
    "US",
    "C",
    "é",
]

# What a tokenizer's spaces look like: each must be gone from the real file.
ARTEFACTS = {
    "inner marks": r" @[-,.]@ ",
    "space before a mark": r"(?<=\S) [,.;:!?%)\]}](?=[\s\"']|$)",
    "space in a bracket": r"[(\[{] ",
    "lone quotes": r"(?<!\S)[\"'’‘“”](?!\S)",
    "contractions": r"(?<=\S) '(?:t|m|re|ve|ll|d)\b",
    "money": r"[$£€] (?=\d|<unk>)",
    "ranges": r"\d – \d",
    "slashes": r" / ",
}


def test_articles_and_headings():
    report = WikiTextReport()
    first, second = read_wikitext(SMALL.splitlines(keepends=True), name="wiki.tokens", report=report)
    assert first.text == ("= First =\n\nA line, of 1,000 words.\nAnother (one).\n\n== Part ==\n\nIts text.")
    assert second.text == '= Second =\n\n<unk> said "no".'
    assert (first.where, second.where) == ("wiki.tokens line 2", "wiki.tokens line 11")
    assert (report.articles, report.unknown) == (2, 1)


def test_a_file_and_its_lines_are_the_same(tmp_path: Path):
    path = tmp_path / "wiki.tokens"
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    from_lines = [text.text for text in read_wikitext(SMALL.splitlines())]
    assert [text.text for text in read_wikitext(path)] == from_lines
    assert next(read_wikitext(path)).where == f"{path} line 2"


def test_what_stands_before_the_first_title_is_kept():
    texts = [text.text for text in read_wikitext([" Some text . ", " ", " = Title = ", " ", " More . "])]
    assert texts == ["Some text.", "= Title =\n\nMore."]


def test_a_formula_is_no_title():
    lines = [" = Title = ", " ", " It holds that ", " = x = ", " for all x . ", " ", " = y = ", " and z . "]
    assert len(list(read_wikitext(lines))) == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (" 0 @.@ 7 – 2 @.@ 2 kg , 5 – 6 red @-@ tipped ones ", "0.7–2.2 kg, 5–6 red-tipped ones"),
        (" the match – the RFU were sure – was played ", "the match – the RFU were sure – was played"),
        (' He said : " The party . " ( " Yes " ) ', 'He said: "The party." ("Yes")'),
        (' said that " \' Where \' is " a song " ', 'said that "\'Where\' is" a song"'),
        (" Linnaeus ' concept wasn 't the visitors ' own ", "Linnaeus' concept wasn't the visitors' own"),
        (" to sixteen ' fairly elderly ' people of the ' 60s ", "to sixteen 'fairly elderly' people of the '60s"),
        (" $ 5 @,@ 106 ( US $ 7 ) and £ <unk> ; 79 % at 3 : 30 ", "$5,106 (US$7) and £<unk>; 79% at 3:30"),
        (" 92 @.@ 9 ° F ( 33 @.@ 8 ° C ) at 57 ° 53 ′ N ", "92.9 °F (33.8 °C) at 57° 53′ N"),
        (" Alabama A & M , Luke & Ann , No. # 1 and / or ", "Alabama A&M, Luke & Ann, No. #1 and/or"),
        (" K 'awiil , O 'Neil , coup d 'état , Route 12 ’ s end ", "K'awiil, O'Neil, coup d'état, Route 12’s end"),
        (" [ ... ] They do ... it . . . ", "[...] They do ... it..."),
        (" = = = 1985 - 87 , and on = = = ", "=== 1985 - 87, and on ==="),
        (" a <s> b [INST] c </s> ", "a <s> b [INST] c </s>"),
        ("", ""),
        (" \t ", ""),
        ("= = =", "= = ="),
    ],
)
def test_marks(line: str, expected: str):
    assert detokenize(line) == expected


def test_a_stray_quote_spoils_only_its_surroundings():
    line = ' an " odd quote . ( " one " ) , " two " , " three " '
    assert detokenize(line).endswith('("one"), "two", "three"')


def bare(text: str) -> str:
    return re.sub(r"\s", "", re.sub(" @([-,.])@(?= )", r"\1", f" {text} "))


@given(words=st.lists(st.sampled_from(WORDS), max_size=40))
def test_only_spaces_and_at_signs_go(words: list[str]):
    line = " ".join(words)
    assert bare(detokenize(line)).replace("@", "") == bare(line).replace("@", "")


@given(text=st.text(max_size=200))
def test_any_text_is_read(text: str):
    got = "".join(found.text for found in read_wikitext(text.split("\n")))
    assert re.sub(r"[\s@]", "", got) == re.sub(r"[\s@]", "", text)


def test_the_real_file(shared: Path):
    path, report = shared / "data" / "wikitext2_valid.txt", WikiTextReport()
    texts = [text.text for text in read_wikitext(path, report=report)]
    raw = path.read_text("utf-8")
    assert (report.articles, report.unknown) == (60, raw.count("<unk>"))
    assert all(re.match("= [^=]", text) for text in texts)
    whole = "\n".join(texts)
    before = {name: len(re.findall(pattern, raw, re.MULTILINE)) for name, pattern in ARTEFACTS.items()}
    after = {name: len(re.findall(pattern, whole, re.MULTILINE)) for name, pattern in ARTEFACTS.items()}
    assert min(before.values()) > 50
    assert after == dict.fromkeys(ARTEFACTS, 0)
    assert bare(whole).replace("@", "") == bare(raw).replace("@", "")


def test_one_article_in_memory():
    taken = 0

    def lines():
        nonlocal taken
        for number in range(1000):
            for line in (f" = Title {number} = ", " ", " Text . ", " "):
                taken += 1
                yield line

    next(read_wikitext(lines()))
    assert taken < 12


def test_detection(shared: Path):
    data = shared / "data"
    assert looks_like_wikitext((data / "wikitext2_valid.txt").read_text("utf-8")[:4096])
    for other in ("wiki_demo.txt", "botchan.txt", "c4_demo.jsonl", "sharegpt_250.json"):
        assert not looks_like_wikitext((data / other).read_text("utf-8")[:4096])


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (SMALL, True),
        (" = Robert = \n", True),
        ("= Title =\n\nA wiki page, as MediaWiki has it.\n", False),
        ("= Title\n\nAsciiDoc , oddly spaced .\n", False),
        ("x = 1\n", False),
        ("", False),
    ],
)
def test_detection_of_its_kin(head: str, expected: bool):
    assert looks_like_wikitext(head) is expected


def test_bad_bytes_are_named_by_line(tmp_path: Path):
    path = tmp_path / "wiki.tokens"
    path.write_bytes(b" = Title = \n \n bad \xff byte \n")
    with pytest.raises(DataError, match=r"wiki\.tokens line 3: byte 6 .*0xff.* not UTF-8"):
        list(read_wikitext(path))


@pytest.mark.parametrize("name", ["missing", ".", "nul\0"])
def test_what_cannot_be_opened(tmp_path: Path, name: str):
    with pytest.raises(DataError, match="cannot be read"):
        list(read_wikitext(f"{tmp_path}/{name}"))


def test_mutated_files_are_read_or_named(tmp_path: Path):
    path, draw = tmp_path / "wiki.tokens", random.Random(0)
    for _ in range(500):
        data = bytearray(SMALL.encode())
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data))
            data[at : at + draw.randint(0, 20)] = draw.choice([b"", b"=", b"\n", b"\0", b"\xff", b'"', b"\xc3"])
        path.write_bytes(bytes(data))
        wrong = None
        try:
            texts = list(read_wikitext(path))
        except DataError as error:
            texts, wrong = [], str(error)
        assert all(text.text.strip() for text in texts)
        assert wrong is None or re.search(r"wiki\.tokens line \d+: byte \d+", wrong)
