"""What a rendered conversation is made of, text and control tokens, and how many of them become token ids at once."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ostro.data.records import Chat
from ostro.errors import DataError

if TYPE_CHECKING:
    from ostro.data.tokenizer import Tokenizer


@dataclasses.dataclass(slots=True)
class Piece:
    """A run of a rendered conversation: text, or one control token by its name; never changed once made.

    `whole` is what `text` was cut out of, at character `start`, where the two may share a token; the cut is then made
    between the tokens of the whole.
    """

    text: str
    trained: bool = False
    control: bool = False
    whole: str | None = None
    start: int = 0


@functools.lru_cache(maxsize=256)
def control_piece(name: str, trained: bool = False) -> Piece:
    """Return the piece of a control token, the same object each time: every turn has two or three of them."""
    return Piece(name, trained, control=True)


@dataclasses.dataclass(frozen=True)
class Controls:
    """What a template needs to know of a tokenizer: its BOS and EOS by name, every control token's id.

    `names` are those that a Jinja template may use (bos_token, ...). `pattern` finds control tokens in text as the
    tokenizer itself would, `starts` the first character of each; `prefixed` is whether text after a control token
    begins as at the start of a document, with a space put before it.
    """

    tokenizer: str
    bos: str
    eos: str
    names: Mapping[str, str]
    ids: Mapping[str, int]
    pattern: re.Pattern[str]
    starts: re.Pattern[str]
    prefixed: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as tokens: ids uint32 [n] and trained bool [n], views into what the whole batch became.

    `note` is a sentence on what was left out, empty where nothing was.
    """

    ids: np.ndarray
    trained: np.ndarray
    where: str
    note: str
    parts: Sequence[Piece]

    @property
    def pieces(self) -> list[tuple[str, bool]]:
        """The rendered text as (text, trained), for a preview."""
        return [(piece.text, piece.trained) for piece in self.parts]


Template = Callable[[Chat, Controls], list[Piece]]


@functools.lru_cache(maxsize=4)
def controls_of(tokenizer: Tokenizer) -> Controls:
    """Return what templates need to know of `tokenizer`."""
    added = {at: token for at, token in tokenizer._bpe.get_added_tokens_decoder().items() if token.special}
    ids = {token.content: at for at, token in added.items()}
    bos, eos = (str(tokenizer._bpe.id_to_token(at)) for at in (tokenizer.bos_token_id, tokenizer.eos_token_id))
    ids |= {bos: tokenizer.bos_token_id, eos: tokenizer.eos_token_id}
    longest = sorted(added.values(), key=lambda token: -len(token.content))
    found = [
        r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip for token in longest if token.content
    ]
    plain = [re.escape(token.content) for token in longest if token.content]
    never = ["(?!)"]
    return Controls(
        tokenizer=tokenizer.name,
        bos=bos,
        eos=eos,
        names={f"{role}_token": piece for role, piece in tokenizer._roles.items() if piece is not None},
        ids=ids,
        pattern=re.compile("|".join(found or never)),
        starts=re.compile(f"(?=(?:{'|'.join(plain or never)}))(.)", re.DOTALL),
        prefixed=not re.search(rb'"prepend_scheme"\s*:\s*"first"', tokenizer._files["tokenizer.json"]),
    )


def check(pieces: Sequence[Piece], chat: Chat, controls: Controls) -> None:
    """Raise DataError for text that is no text, and for control tokens that the tokenizer does not have."""
    for piece in pieces:
        if piece.control:
            if piece.text not in controls.ids:
                raise DataError(
                    f"tokenizer {controls.tokenizer} has no control token {piece.text}, which the chat template "
                    "needs: use tokenizer v3 with mistral-v3, or another template."
                )
        elif not piece.text.isascii():
            try:
                piece.text.encode("utf-8")
            except UnicodeEncodeError:
                raise DataError(
                    f"{chat.where}: a text holds half of a surrogate pair, which no UTF-8 can express: remove the "
                    "character."
                ) from None


def assembled(
    planned: Sequence[tuple[Chat, str, list[Piece]]], controls: Controls, tokenizer: Tokenizer
) -> list[Rendered]:
    """Return conversations (each with its note and its pieces) as tokens; every distinct text is encoded once."""
    flat = [piece for _, _, pieces in planned for piece in pieces]
    texts: dict[str, None] = {}  # a set that keeps its order
    single: dict[str, np.ndarray] = {}
    for piece in flat:
        if piece.control:
            if piece.text not in single:
                single[piece.text] = np.array([controls.ids[piece.text]], dtype=np.uint32)
        elif piece.whole is not None:
            texts |= dict.fromkeys(_needed(piece))
        else:
            texts[piece.text] = None
    known = dict(zip(texts, tokenizer.encode_arrays(list(texts)), strict=True))
    parts = [
        single[piece.text] if piece.control else known[piece.text] if piece.whole is None else _part_of(piece, known)
        for piece in flat
    ]
    ids = np.concatenate(parts).astype(np.uint32, copy=False)
    sizes = np.fromiter(map(len, parts), np.int64, len(parts))
    trained = np.repeat(np.array([piece.trained for piece in flat]), sizes)
    last = np.cumsum([len(pieces) for _, _, pieces in planned]) - 1
    ends = np.cumsum(sizes)[last].tolist()
    return [
        Rendered(ids[start:end], trained[start:end], chat.where, note, pieces)
        for (chat, note, pieces), start, end in zip(planned, [0, *ends], ends, strict=False)
    ]


def _needed(piece: Piece) -> tuple[str, str, str]:
    """Return the texts whose ids `_part_of` asks for: the whole, what stands before the part, and that with it."""
    assert piece.whole is not None
    return piece.whole, piece.whole[: piece.start], piece.whole[: piece.start + len(piece.text)]


def _part_of(piece: Piece, known: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the ids of a part: those of the whole, less those that it shares with what stands before."""
    whole, before, until = (known[text] for text in _needed(piece))
    first = _shared(before, whole)
    return whole[first : max(first, _shared(until, whole))]


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many ids two arrays have in common at the front."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def json_or_text(text: str, where: str) -> Any:
    """Return what mistral-common makes of a tool's answer or arguments: JSON where it is such, else the text."""
    try:
        return json.loads(text) if text else {}
    except json.JSONDecodeError:
        return text
    except (ValueError, RecursionError):
        raise DataError(
            f"{where}: JSON that is too deep, or holds too long a number, for Python: shorten it."
        ) from None
