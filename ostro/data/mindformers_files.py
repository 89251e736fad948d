"""What MindFormers' llama_preprocess.py writes: its records, as MindRecord, and which flag of its is which of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ostro.data import sources
from ostro.data.mindformers import QaReport, alpaca_to_conversations, qa_records, wiki_records
from ostro.data.mindrecord import MindRecordWriter
from ostro.data.tokenizer import Tokenizer
from ostro.errors import DataError


def mode_of(paths: Sequence[str | Path]) -> str:
    """Return `qa` for conversations and Alpaca records, `wiki` for texts; DataError where they are mixed."""
    kinds = {"qa" if sources.detect(path) in ("sharegpt", "alpaca", "messages") else "wiki" for path in paths}
    if len(kinds) != 1:
        raise DataError("MindFormers' preprocessing takes texts or conversations, not both: prepare them apart.")
    return kinds.pop()


def _conversations(file: Path) -> Path | list[dict[str, Any]]:
    """Return what MindFormers' qa mode reads: the file, or what its alpaca_converter.py makes of an Alpaca file."""
    return alpaca_to_conversations(file) if sources.detect(file) == "alpaca" else file


def write_mindrecord(
    paths: Sequence[str | Path],
    out: Path,
    tokenizer: Tokenizer,
    *,
    seq_length: int,
    repeat: int = 1,
    partitions: int = 1,
    report: Callable[[int], None] | None = None,
) -> tuple[int, list[str]]:
    """Write the records that MindFormers would, and return how many and what to say about them.

    `out` is the file; its .db lies beside it. Rows hold seq_length + 1 tokens. `report` is called with the bytes of
    the rows written.
    """
    files = sources.expand(paths)
    mode = mode_of(files)
    reports = [QaReport() for _ in files]
    columns = ("input_ids",) if mode == "wiki" else ("input_ids", "labels")
    makers: dict[str, Callable[[], Iterator[dict[str, np.ndarray]]]] = {
        "wiki": lambda: (
            {"input_ids": ids} for file in files for ids in wiki_records(file, tokenizer, seq_length, repeat)
        ),
        "qa": lambda: (
            {"input_ids": ids, "labels": labels}
            for file, found in zip(files, reports, strict=True)
            for ids, labels in qa_records(_conversations(file), tokenizer, seq_length, found)
        ),
    }
    count = 0
    with MindRecordWriter(out, columns, mode, partitions=partitions) as writer:
        for row in makers[mode]():
            writer.append({name: values.astype(np.int32) for name, values in row.items()})
            count += 1
            if report:
                report(count * len(columns) * 4 * (seq_length + 1))
        if not count:
            raise DataError(
                f"{files[0]}: no record of {seq_length + 1} tokens comes out of it: use a shorter --seq-length."
            )
    useless = sum(found.useless for found in reports)
    truncated = sum(found.truncated for found in reports)
    notes = [f"{useless} of {count} records train nothing, as in MindFormers"] if useless else []
    return count, notes + ([f"{truncated} records were cut at {seq_length + 1} tokens"] if truncated else [])
