"""Tokenizing at memory's speed: gigatoken's arithmetic over our own vocabulary, held against `tokenizers`.

gigatoken is built from a tokenizer.json without special tokens: with them it turns the text "</s>" into the control
token. Its caches grow with every word it has not seen, from 1.5 bytes a byte of prose to 15 of random characters, so
the encoder is made anew now and then.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ostro.data.tokenizer import Tokenizer

_FRESH_BYTES = 1 << 27  # of text that one encoder sees at most: 0.1 s to build another
_LOOK_BYTES, _MOST_BYTES = 1 << 23, 200 << 20  # how often this process' memory is looked at, how much may be added
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
# What tokenizers get wrong: runs of spaces, literal bars, specials as text, controls, bytes that need a fallback.
_PROBES = (
    "",
    " ",
    "  a   b\t\t c \n\n\n d ",
    "▁a▁▁b ▁",
    "<s>a</s> <unk> [INST] x [/INST]",
    "\0\x01\x7f\x85\xa0\u200b\u2028\ufeff",
    "naïve Ångström ½ ﬁ ŀ e\u0301",
    "你好，世界。こんにちは 안녕하세요 Привет مرحبا",
    "😀👨\u200d👩\u200d👧 𝔘𝔫𝔦 \U0010ffff",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # 0x1F\r\n",
    "a" * 300 + " " * 300 + "\n" * 40,
)


class FastEncoder:
    """Encodes one text after another; made by `fast_encoder`."""

    def __init__(self, blob: str) -> None:
        self._blob = blob
        self._seen_bytes = self._looked_at = 0
        self._backend = _build(blob)
        self._memory = _own_bytes()

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text as uint32 [n], without BOS and EOS."""
        self._seen_bytes += len(text)
        if self._seen_bytes > _FRESH_BYTES or (self._seen_bytes - self._looked_at > _LOOK_BYTES and self._is_large()):
            del self._backend
            _trim()
            self._backend, self._seen_bytes, self._looked_at = _build(self._blob), len(text), 0
        return self._backend.encode(text)

    def _is_large(self) -> bool:
        self._looked_at = self._seen_bytes
        return _own_bytes() - self._memory > _MOST_BYTES


def fast_encoder(tokenizer: Tokenizer) -> FastEncoder | None:
    """Return an encoder that gives the tokenizer's ids; None where gigatoken is missing, cannot, or gives others."""
    spec = json.loads(tokenizer.spec)
    spec |= {"added_tokens": [], "post_processor": None}
    try:
        encoder = FastEncoder(json.dumps(spec))
        return encoder if agrees(encoder, tokenizer, _PROBES) else None
    except Exception:  # a library that cannot read a vocabulary says so in many ways
        return None


def agrees(encoder: FastEncoder, tokenizer: Tokenizer, texts: Iterable[str]) -> bool:
    """Whether both give the same ids for every text."""
    texts = list(texts)
    return all(
        np.array_equal(encoder.encode(text), ids)
        for text, ids in zip(texts, tokenizer.encode_slowly(texts), strict=True)
    )


def _build(blob: str) -> Any:
    from gigatoken import Tokenizer as Gigatoken

    return Gigatoken.from_json(blob).backend


def _own_bytes() -> int:
    """Return the memory that is this process' alone; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * _PAGE_BYTES


def _trim() -> None:
    """Give freed memory back to the system, where the C library can."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
