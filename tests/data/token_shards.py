"""Token shards in memory for tests of what reads them, and windows small enough for few documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import strategies as st

from ostro.data import packing
from ostro.data.shards import FORMAT, Manifest, Shards

Documents = list[list[int]]


def shards(
    documents: Documents,
    file_tokens: int = 10**9,
    name: str = "x",
    untrained: frozenset[int] = frozenset(),
    kind: str = "jsonl",
):
    """Return shards in memory, cut into files of `file_tokens` tokens; some token ids are not learned."""
    stream = np.array([token for document in documents for token in document], dtype=np.uint16)
    ends = np.cumsum([len(document) for document in documents])
    files = [stream[at : at + file_tokens] for at in range(0, len(stream), file_tokens)]
    masks = [~np.isin(file, list(untrained)) for file in files]
    manifest = Manifest(
        format=FORMAT,
        key="",
        tokenizer=f"tokenizer {name}",
        tokenizer_sha256=name,
        vocab_size=2**16,
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
        dtype="uint16",
        num_tokens=len(stream),
        num_documents=len(documents),
        num_bytes=0,
        num_unlearned=0,
        num_repeats=0,
        num_trained=int(sum(mask.sum() for mask in masks)),
        encoder="tokenizers",
        settings={},
        files=[{"name": f"tokens-{at:05}.npy", "num_tokens": len(file)} for at, file in enumerate(files)],
        sources=[{"path": name, "kind": kind}],
    )
    # A file all of which is learned has no mask, though its neighbour may have one.
    trained = [None if mask.all() else mask for mask in masks]
    return Shards(Path(name), manifest, files, np.stack([ends, ends], axis=1), trained)


def small_windows() -> Any:
    """Three documents a window and two windows a pool, so that few documents make many of both."""
    return mock.patch.multiple(packing, WINDOW_PIECES=3, _WINDOW_ROWS=1, _POOL_PIECES=6)


# Every token of the corpus is different, so that a row says by itself where it is from.
@st.composite
def corpora(draw: st.DrawFn, longest: int = 12, most: int = 8) -> list[Documents]:
    lengths = draw(st.lists(st.lists(st.integers(1, longest), min_size=1, max_size=most), min_size=1, max_size=3))
    tokens = iter(range(1, 60_000))
    return [[[next(tokens) for _ in range(length)] for length in part] for part in lengths]
