"""How many tokens a second the loader gives to one process, by packing and length; and how long it takes to start.

The corpus is made on the spot: token files mapped from disk, documents of log-normal lengths. Contenders take turns.
`copy` reads the same number of tokens from one place and widens them twice, with no packing at all: the most there is
to reach. "start" is opening plus the first row; the last table counts rows of `bestfit` alone, by documents.

    python benchmarks/loader.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ostro.data.loader import Loader
from ostro.data.packing import Windows
from ostro.data.shards import FORMAT, Manifest, Shards

LENGTHS = (128, 512, 2048, 4096)
BATCH_TOKENS = 2**17
# name, settings, whether only some tokens are learned
CONTENDERS: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("concat", {"packing": "concat"}, False),
    ("concat, in order", {"packing": "concat", "shuffle": False}, False),
    ("concat, masked", {"packing": "concat"}, True),
    ("bestfit", {"packing": "bestfit"}, False),
    ("bestfit, masked", {"packing": "bestfit"}, True),
    ("none", {"packing": "none"}, False),
    ("records, padded", {"packing": "records", "pad_token_id": 0}, True),
    ("mixture of four", {"packing": "concat", "weights": [4, 3, 2, 1]}, False),
)


def corpus(folder: Path, num_tokens: int, mean_length: int, masked: bool, seed: int) -> Shards:
    """Write token files and map them."""
    draw = np.random.default_rng(seed)
    lengths = draw.lognormal(np.log(mean_length) - 0.5, 1.0, 2 * num_tokens // mean_length + 64).astype(np.int64)
    ends = np.cumsum(lengths.clip(2))
    ends = np.append(ends[ends < num_tokens], num_tokens)
    tokens = np.lib.format.open_memmap(folder / f"tokens-{seed}-{masked:d}.npy", "w+", np.uint16, (num_tokens,))
    for at in range(0, num_tokens, 2**22):
        tokens[at : at + 2**22] = draw.integers(3, 32_000, len(tokens[at : at + 2**22]))
    mask = None
    if masked:
        mask = np.lib.format.open_memmap(folder / f"trained-{seed}.npy", "w+", np.bool_, (num_tokens,))
        mask[:] = np.arange(num_tokens) // 50 % 2
    manifest = Manifest(
        format=FORMAT,
        key="",
        tokenizer="none",
        tokenizer_sha256="",
        vocab_size=32_000,
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
        dtype="uint16",
        num_tokens=num_tokens,
        num_documents=len(ends),
        num_bytes=0,
        num_unlearned=0,
        num_repeats=0,
        num_trained=num_tokens if mask is None else int(mask.sum()),
        encoder="none",
        settings={},
        files=[{"name": "tokens.npy", "num_tokens": num_tokens}],
        sources=[],
    )
    return Shards(folder, manifest, [tokens], np.stack([ends, ends], axis=1), [mask])


def reading(shards: list[Shards], settings: dict[str, Any], length: int) -> tuple[Callable[[int], int], float]:
    """Return a function that reads global batch `step` and counts its tokens, and the seconds it took to start."""
    start = time.perf_counter()
    loader = Loader(shards, seq_length=length, **settings)
    loader.row(0)
    seconds = time.perf_counter() - start
    count = max(1, round(BATCH_TOKENS / (loader.epoch_tokens / loader.num_rows)))
    return lambda step: sum(len(row.tokens_L) for row in loader.rows(step, count)), seconds


def copying(shards: Shards) -> Callable[[int], int]:
    def copy(step: int) -> int:
        at = step * BATCH_TOKENS % (shards.num_tokens - BATCH_TOKENS)
        tokens = shards.tokens(at, at + BATCH_TOKENS)
        widened = tokens.astype(np.int64), tokens.astype(np.int64), np.ones(BATCH_TOKENS, np.float32)
        return len(widened[0])

    return copy


def rates(folder: Path, num_tokens: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return a line for each length and contender: million tokens a second, median and spread over the rounds."""
    plain, masked = (corpus(folder, num_tokens, 400, is_masked, 0) for is_masked in (False, True))
    parts = [corpus(folder, num_tokens // 4, 400, False, seed) for seed in range(1, 5)]
    lines = []
    for length in LENGTHS:
        readers: dict[str, Callable[[int], int]] = {"copy": copying(plain)}
        starts = {"copy": 0.0}
        for name, settings, is_masked in CONTENDERS:
            shards = parts if "weights" in settings else [masked if is_masked else plain]
            readers[name], starts[name] = reading(shards, settings, length)
        measured: dict[str, list[float]] = {name: [] for name in readers}
        steps = dict.fromkeys(readers, 0)
        for _ in range(rounds):
            for name, read in readers.items():
                begin, tokens = time.perf_counter(), 0
                while (now := time.perf_counter() - begin) < seconds:
                    tokens += read(steps[name])
                    steps[name] += 1
                measured[name].append(tokens / now / 1e6)
        lines += [
            {
                "length": length,
                "contender": name,
                "million_tokens_per_second": statistics.median(found),
                "lowest": min(found),
                "highest": max(found),
                "start_seconds": starts[name],
            }
            for name, found in measured.items()
        ]
    return lines


def counting(num_documents: int, rounds: int) -> list[dict[str, Any]]:
    """Return how long it takes to count the rows of many documents, of which no token exists."""
    lines = []
    for length in (512, 4096):
        for packing in ("bestfit", "none"):
            draw = np.random.default_rng(0)
            ends = np.cumsum(draw.lognormal(5.5, 1.0, num_documents).astype(np.int64).clip(2))
            settings: dict[str, Any] = {"packing": packing, "overlong": "split", "shuffle": True, "key": (0,)}
            taken, counted = [], []
            for _ in range(rounds):
                begin = time.perf_counter()
                counted.append(Windows(ends, 0, num_documents, length, where=str, **settings))
                taken.append(time.perf_counter() - begin)
            windows = counted[-1]
            lines.append(
                {
                    "length": length,
                    "packing": packing,
                    "documents": num_documents,
                    "seconds": statistics.median(taken),
                    "rows": windows.num_rows,
                    "fullness": windows.num_tokens / windows.num_rows / length,
                }
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    num_tokens, rounds, seconds = (2**23, 3, 0.1) if options.quick else (2**27, 5, 0.4)
    with tempfile.TemporaryDirectory() as folder:
        found = rates(Path(folder), num_tokens, rounds, seconds)
    print(f"{'length':>6}  {'contender':<18}{'M tokens/s':>11}{'lowest':>9}{'highest':>9}{'start s':>9}")
    for line in found:
        print(
            f"{line['length']:>6}  {line['contender']:<18}{line['million_tokens_per_second']:>11.1f}"
            f"{line['lowest']:>9.1f}{line['highest']:>9.1f}{line['start_seconds']:>9.3f}"
        )
    counted = counting(100_000 if options.quick else 2_000_000, 2)
    print(f"\n{'length':>6}  {'packing':<10}{'documents':>11}{'seconds':>9}{'M docs/s':>10}{'rows':>10}{'full':>8}")
    for line in counted:
        print(
            f"{line['length']:>6}  {line['packing']:<10}{line['documents']:>11,}{line['seconds']:>9.2f}"
            f"{line['documents'] / line['seconds'] / 1e6:>10.2f}{line['rows']:>10,}{line['fullness']:>8.2%}"
        )
    if options.json:
        options.json.write_text(json.dumps({"rates": found, "counting": counted}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
