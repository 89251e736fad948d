"""A sentencepiece `.model` file, read without sentencepiece, as the dict of a standard `tokenizer.json`."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ostro.errors import DataError

# Field numbers and values of sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BPE = 2


class _Piece(NamedTuple):
    text: str
    score: float
    type: int


class _PieceModel(NamedTuple):
    pieces: list[_Piece]
    trainer: dict[int, int | bytes]
    normalizer: dict[int, int | bytes]


def read_piece_model(path: Path) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Read a sentencepiece BPE model as (`tokenizer.json` as a dict, special pieces by role).

    The dict carries everything: vocabulary, merges, normalizer, decoder, the control pieces as special
    added tokens, and a template that puts BOS first, as in the official Mixtral file. The roles: bos, eos,
    unk, pad. User-defined pieces written like marks ("[REFERENCE_DOC_1]" in v3) count as control pieces:
    text stays text.

    Raises DataError for a file that is no such model, and for rules that a `tokenizer.json` cannot repeat.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        model = _parse(data)
    except (IndexError, struct.error, UnicodeDecodeError, ValueError):
        raise DataError(
            f"{path} is not a sentencepiece model (truncated, or another format): fetch it again, or name a "
            "tokenizer.json."
        ) from None
    _refuse_other_rules(path, model)
    return _as_json(path, model)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of one protobuf message: whole numbers, or raw bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(wire, -1)
        if size < 0 or at + size > len(data) or number == 0:
            raise ValueError("not a protobuf message")
        yield number, data[at : at + size]
        at += size


def _parse(data: bytes) -> _PieceModel:
    pieces: list[_Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if not isinstance(value, bytes):
            continue
        if number == 1:
            text, score, kind = "", 0.0, _NORMAL
            for inner, content in _fields(value):
                if inner == 1 and isinstance(content, bytes):
                    text = content.decode("utf-8")
                elif inner == 2 and isinstance(content, bytes):
                    score = struct.unpack("<f", content)[0]
                elif inner == 3 and isinstance(content, int):
                    kind = content
            pieces.append(_Piece(text, score, kind))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("no pieces")
    return _PieceModel(pieces, trainer, normalizer)


def _is_mark(piece: str) -> bool:
    return len(piece) > 2 and (piece[0], piece[-1]) in {("<", ">"), ("[", "]")}


def _refuse_other_rules(path: Path, model: _PieceModel) -> None:
    """Raise DataError unless the model is what Mixtral's is: BPE, identity normalizer, byte fallback."""
    problem = None
    num_bytes = sum(piece.type == _BYTE for piece in model.pieces)
    odd = [piece.text for piece in model.pieces if piece.type == _USER_DEFINED and not _is_mark(piece.text)]
    if model.trainer.get(3, 1) != _BPE:
        problem = "it is not a BPE model"
    elif num_bytes != 256:
        problem = f"it has {num_bytes} of the 256 byte pieces"
    elif model.normalizer.get(2) or model.normalizer.get(4, 1) or not model.normalizer.get(5, 1):
        problem = "it rewrites characters or spaces before it splits"
    elif model.trainer.get(24, 0):
        problem = "it puts spaces at the ends of words"
    elif odd:
        problem = f"it has the user-defined piece {odd[0]!r}"
    elif any(piece.type not in (_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE) for piece in model.pieces):
        problem = "it has pieces marked as unused"
    elif len({piece.text for piece in model.pieces}) != len(model.pieces):
        problem = "two of its pieces are the same"
    if problem:
        raise DataError(
            f"{path} cannot be read as Mixtral's kind of tokenizer: {problem}. Name the tokenizer.json that "
            "belongs to it instead."
        )


def _merges(pieces: list[_Piece]) -> list[tuple[str, str]]:
    """Return every way to join two normal pieces into a third, best score first.

    sentencepiece takes the leftmost pair among equal scores, and only runs of spaces have equal ones: longer
    left halves first repeats its choice there.
    """
    score = {piece.text: piece.score for piece in pieces if piece.type == _NORMAL}
    merges = []
    for text, value in score.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in score and right in score:
                merges.append((-value, -cut, cut - len(text), left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _as_json(path: Path, model: _PieceModel) -> tuple[dict[str, Any], dict[str, str | None]]:
    pieces = model.pieces
    ids = {"bos": model.trainer.get(41, 1), "eos": model.trainer.get(42, 2), "pad": model.trainer.get(43, -1)}
    roles: dict[str, str | None] = {
        role: pieces[at].text if isinstance(at, int) and 0 <= at < len(pieces) else None for role, at in ids.items()
    }
    roles["unk"] = next((piece.text for piece in pieces if piece.type == _UNKNOWN), None)
    bos = roles["bos"]
    if bos is None or roles["eos"] is None or roles["unk"] is None:
        raise DataError(f"{path} lacks a BOS, EOS or unknown piece: use a tokenizer that has all three.")
    vocab = {piece.text: at for at, piece in enumerate(pieces)}
    specials = (_UNKNOWN, _CONTROL, _USER_DEFINED)
    prepend = [{"type": "Prepend", "prepend": "▁"}] if model.normalizer.get(3, 1) else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prepend else []
    to_bar = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    to_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(at, piece.text) for at, piece in enumerate(pieces) if piece.type in specials],
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, to_bar]},
        "pre_tokenizer": None,
        "post_processor": _bos_template(bos, vocab[bos]),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": roles["unk"],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(pieces),
        },
    }, roles


def _bos_template(bos: str, at: int) -> dict[str, Any]:
    def mark(type_id: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": bos, "type_id": type_id}}

    a, b = ({"Sequence": {"id": name, "type_id": type_id}} for type_id, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [mark(0), a],
        "pair": [mark(0), a, mark(1), b],
        "special_tokens": {bos: {"id": bos, "ids": [at], "tokens": [bos]}},
    }


def _added(at: int, text: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": at, "content": text, **flags}
