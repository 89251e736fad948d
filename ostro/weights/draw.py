"""Normal values that depend on where they stand, not on what was drawn before: for `store.RandomReader`."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from numpy.typing import NDArray

_PAIRS = 32  # a row takes a whole number of these, so that it starts at a vector's edge wherever it is drawn
_BLOCK_PAIRS = 1 << 17  # worked on at a time: the temporaries stay in the cache


def normal_rows(key: str, start: int, stop: int, num_columns: int, std: float) -> NDArray[np.float32]:
    """Return rows `start` to `stop` [rows, num_columns], fp32, of the endless N(0, std²) matrix named `key`.

    Philox4x64 (Salmon et al., SC'11) gives 64 bits a pair at a counter that follows from the row; the
    Box–Muller transform turns 48 of them into a radius and 16 into one of 65,536 angles, so that every value
    costs the same number of draws. All arithmetic is float64 and rounded once.
    """
    pairs = -(-num_columns // (2 * _PAIRS)) * _PAIRS
    rows = np.empty((stop - start, num_columns), np.float32)
    philox_key = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    cosines, sines = _angles()
    step = max(1, _BLOCK_PAIRS // pairs)
    for first in range(start, stop, step):
        num_rows = min(step, stop - first)
        # A counter stands for four draws of 64 bits.
        philox = np.random.Philox(key=philox_key, counter=first * pairs // 4)
        bits = philox.random_raw(num_rows * pairs)
        radius = np.log(((bits >> np.uint64(16)) + np.uint64(1)) * 2.0**-48)
        radius = np.sqrt(radius * (-2.0 * std * std)).reshape(num_rows, pairs)
        angle = (bits & np.uint64(0xFFFF)).reshape(num_rows, pairs)
        block = rows[first - start : first - start + num_rows]
        half = min(pairs, num_columns)
        block[:, :half] = (radius * cosines[angle])[:, :half]
        block[:, half:] = (radius * sines[angle])[:, : num_columns - half]
    return rows


@functools.cache
def _angles() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    angle = (np.arange(1 << 16) + 0.5) * (2 * np.pi / (1 << 16))
    return np.cos(angle), np.sin(angle)
