"""How documents become rows: cut every so many tokens, packed whole, or one a row.

A row is a list of pieces of the token stream. Which pieces, is arithmetic on where documents end; no token is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import numpy as np

from ostro.data.order import epoch_order, permuted
from ostro.errors import DataError

Packing = Literal["concat", "bestfit", "none", "records"]
Overlong = Literal["split", "drop", "truncate", "error"]
PACKINGS: tuple[str, ...] = get_args(Packing)
OVERLONG: tuple[str, ...] = get_args(Overlong)

WINDOW_PIECES = 2**14
# A window may waste most of one row; of this many that is under one percent.
_WINDOW_ROWS = 128
# Rows are shuffled within so many pieces, whose windows are drawn from everywhere: their plans take about 9 MB.
_POOL_PIECES = 2**19


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Rows, as pieces of the stream.

    Piece p is the tokens from starts_P[p] on, lengths_P[p] of them (int64). goes_on_P: whether the token after it
    is its last one's label; else that has none. Row r is pieces bounds[r] to bounds[r + 1] (int64 [rows + 1]).
    """

    starts_P: np.ndarray
    lengths_P: np.ndarray
    goes_on_P: np.ndarray
    bounds: np.ndarray

    def rows(self, chosen: np.ndarray) -> Pieces:
        """Return the rows of these numbers, in their order."""
        counts = self.bounds[chosen + 1] - self.bounds[chosen]
        at = _ragged(self.bounds[chosen], counts)
        return Pieces(self.starts_P[at], self.lengths_P[at], self.goes_on_P[at], _summed(counts))

    def between(self, first: int, last: int) -> Pieces:
        """Return the rows from `first` up to `last`, as views."""
        low, high = self.bounds[first], self.bounds[last]
        return Pieces(
            self.starts_P[low:high],
            self.lengths_P[low:high],
            self.goes_on_P[low:high],
            self.bounds[first : last + 1] - low,
        )


def gathered(groups: np.ndarray, rows_of: Callable[[int, np.ndarray], Pieces]) -> Pieces:
    """Return one row for each entry of `groups`; `rows_of` is asked once a group, with the places of its entries."""
    order = np.argsort(groups, kind="stable")
    names, firsts = np.unique(groups[order], return_index=True)
    parts = [rows_of(name, at) for name, at in zip(names.tolist(), np.split(order, firsts[1:]), strict=True)]
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return Pieces(
        np.concatenate([part.starts_P for part in parts]),
        np.concatenate([part.lengths_P for part in parts]),
        np.concatenate([part.goes_on_P for part in parts]),
        _summed(np.concatenate([np.diff(part.bounds) for part in parts])),
    ).rows(back)


def cut(starts: np.ndarray, stops: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut runs [start, stop) at the rising `edges`; return the pieces' stops, their edges' numbers, and bounds.

    All int64; run r became pieces bounds[r] to bounds[r + 1]. A piece lies below the edge of its number, and the
    last edge is not below any stop.
    """
    firsts = edges.searchsorted(starts, side="right")
    counts = edges.searchsorted(stops, side="left") - firsts + 1
    numbers = _ragged(firsts, counts)
    return np.minimum(edges[numbers], np.repeat(stops, counts)), numbers, _summed(counts)


def best_fit(counts_L: np.ndarray, capacity: int) -> tuple[list[int], int]:
    """Pack things into bins of `capacity`, longest first, each into the fullest bin that has room for it.

    counts_L[n] is how many have length n, 1 ≤ n ≤ capacity. Returns the bin of each thing, longest things first,
    and the number of bins. Equal things are placed together: the fullest bin with room takes one after another of
    them, since with each it only gets fuller. Best-fit decreasing uses at most 11/9 of the fewest bins, plus 4
    (Johnson et al., Worst-case performance bounds for simple one-dimensional packing algorithms, 1974).
    """
    lengths = np.flatnonzero(counts_L)[::-1]
    bins: list[int] = []
    num_bins = 0
    open_bins: dict[int, list[int]] = {}  # by the room that they have left
    rooms = 0  # bit r: whether there are bins with room r; the next one up is found in a few operations on words
    for length, number in zip(lengths.tolist(), counts_L[lengths].tolist(), strict=True):
        count = number
        while count:
            above = rooms >> length
            room = length + (above & -above).bit_length() - 1 if above else capacity
            each = room // length
            taken = -(-count // each)
            if above:
                group = open_bins[room]
                taken = min(taken, len(group))
                chosen = group[-taken:]
                del group[-taken:]
                if not group:
                    rooms ^= 1 << room
            else:
                chosen = list(range(num_bins, num_bins + taken))
                num_bins += taken
            placed = min(count, each * taken)
            count -= placed
            bins += chosen if each == 1 else [bin_ for bin_ in chosen for _ in range(each)][:placed]
            last = room - (placed - each * (taken - 1)) * length
            for left, with_it in ((last, chosen[-1:]), (room - each * length, chosen[:-1])):
                if left and with_it:
                    open_bins.setdefault(left, []).extend(with_it)
                    rooms |= 1 << left
    return bins, num_bins


class Concat:
    """The stream from `start` to `stop` cut every `length` tokens; the last row is short, or left out.

    `ends` are the rising ends of all documents of the stream, int64.
    """

    def __init__(
        self,
        ends: np.ndarray,
        start: int,
        stop: int,
        length: int,
        *,
        drop_last: bool,
        shuffle: bool,
        key: tuple[int | str, ...],
    ) -> None:
        self._ends, self._start, self._stop, self._length = ends, start, stop, length
        self._shuffle, self._key = shuffle, key
        self.num_rows = (stop - start) // length if drop_last else -(-(stop - start) // length)
        self.num_tokens = min(self.num_rows * length, stop - start)
        self.num_overlong = 0

    def overlong(self) -> Iterator[Pieces]:
        """Yield nothing: no document is too long for rows that are cut anywhere."""
        return iter(())

    def pieces(self, positions: np.ndarray) -> Pieces:
        """Return the rows at these positions, counted over all epochs."""
        if self._shuffle:
            rows = epoch_order(positions, self.num_rows, *self._key)
        else:
            rows = positions % self.num_rows
        starts = self._start + rows * self._length
        stops, numbers, bounds = cut(starts, np.minimum(starts + self._length, self._stop), self._ends)
        firsts = np.empty_like(stops)
        firsts[1:] = stops[:-1]
        firsts[bounds[:-1]] = starts
        return Pieces(firsts, stops - firsts, stops < self._ends[numbers], bounds)


class Windows:
    """Documents `first` to `last` of the stream, in rows of at most `length` tokens, planned a window at a time.

    A window is 16,384 neighbouring documents, fewer where each makes several rows, and more of short ones, so that
    it makes about 128 rows at least. Its rows depend on (key, epoch, window) alone, and their number not even on the
    epoch: packing looks at lengths, and the epoch decides which of the documents of one length comes where. So the
    rows are counted once, in one pass over the lengths, and a window is planned when its turn comes.

    Shuffled, an epoch takes the windows in a random order and shuffles the rows of each 2**19 pieces together.
    `bestfit` packs documents, `none` gives each a row, and `records` gives each a row without its last token, which
    is a label only. `overlong` says what becomes of a document that does not fit into a row: `split` into rows that
    are full and the rest, `drop`, `truncate` to its beginning, or `error`, a DataError, which calls the document what
    `where` does. num_overlong counts them; num_rows and num_tokens are the rows of an epoch and their tokens.
    """

    def __init__(
        self,
        ends: np.ndarray,
        first: int,
        last: int,
        length: int,
        *,
        packing: Packing,
        overlong: Overlong,
        shuffle: bool,
        key: tuple[int | str, ...],
        where: Callable[[int], str],
    ) -> None:
        self._ends, self._first, self._last, self._length = ends, first, last, length
        self._packing, self._overlong, self._shuffle, self._key = packing, overlong, shuffle, key
        mean = (int(ends[last - 1]) - self._start_of(first)) // (last - first)
        each = 1 + mean // length  # pieces of a document
        self._window = max(1, WINDOW_PIECES // each, -(-_WINDOW_ROWS * length // mean))
        self._pool = max(2, _POOL_PIECES // (self._window * each))  # windows
        self.num_tokens = self.num_overlong = 0
        counts = []
        for window in range(-(-(last - first) // self._window)):
            starts, lengths = self._documents(window)
            too_long = np.flatnonzero(lengths > length)
            self.num_overlong += len(too_long)
            if len(too_long) and overlong == "error":
                at = int(too_long[0])
                raise DataError(
                    f"{where(first + window * self._window + at)} makes a row of {lengths[at]} tokens, more than "
                    f"data.seq_length={length}: use a longer one, or data.overlong split, drop or truncate."
                )
            lengths = self._fitted(starts, lengths)[1]
            self.num_tokens += int(lengths.sum())
            counts.append(best_fit(np.bincount(lengths), length)[1] if packing == "bestfit" else len(lengths))
        self._counts = np.asarray(counts, dtype=np.int64)
        self.num_rows = int(self._counts.sum())
        self._plans: dict[tuple[int, int], Pieces] = {}
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def pieces(self, positions: np.ndarray) -> Pieces:
        """Return the rows at these positions, counted over all epochs."""
        epochs, places = np.divmod(positions, self.num_rows)
        windows, rows = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            windows[here], rows[here] = self._placed(epoch, places[here])
        num_windows = len(self._counts)
        return gathered(
            epochs * num_windows + windows, lambda group, at: self._plan(*divmod(group, num_windows)).rows(rows[at])
        )

    def overlong(self) -> Iterator[Pieces]:
        """Yield what became of the documents that do not fit into a row, some thousands at a time, a piece a row."""
        if self.num_overlong:
            for window in range(len(self._counts)):
                starts, lengths = self._documents(window)
                is_long = lengths > self._length
                if is_long.any():
                    fitted = self._fitted(starts[is_long], lengths[is_long])
                    yield Pieces(*fitted, np.arange(len(fitted[0]) + 1))

    def _placed(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the window of each place in this epoch, and which of its rows."""
        windows, firsts = self._order(epoch)
        if self._shuffle:
            edges = firsts[:: self._pool]
            pools = edges.searchsorted(places, side="right") - 1
            for pool in np.unique(pools).tolist():
                here = pools == pool
                low = edges[pool]
                high = firsts[min((pool + 1) * self._pool, len(windows))]
                places[here] = low + permuted(places[here] - low, int(high - low), *self._key, epoch, "rows", pool)
        slots = firsts.searchsorted(places, side="right") - 1
        return windows[slots], places - firsts[slots]

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the windows in this epoch's order, and before each how many rows there are (one more at the end)."""
        if epoch not in self._orders:
            windows = np.arange(len(self._counts))
            if self._shuffle:
                windows = permuted(windows, len(windows), *self._key, epoch, "windows")
            _keep(self._orders, epoch, (windows, _summed(self._counts[windows])), 2)
        return self._orders[epoch]

    def _plan(self, epoch: int, window: int) -> Pieces:
        key = (epoch, window)
        if key not in self._plans:
            _keep(self._plans, key, self._packed(epoch, window), 2 * self._pool)
        return self._plans[key]

    def _packed(self, epoch: int, window: int) -> Pieces:
        starts, lengths, goes_on = self._fitted(*self._documents(window))
        if self._packing != "bestfit":
            return Pieces(starts, lengths, goes_on, np.arange(len(starts) + 1))
        order = np.arange(len(lengths))
        if self._shuffle:
            order = permuted(order, len(order), *self._key, epoch, "window", window)
        order = order[np.argsort(-lengths[order], kind="stable")]
        bins, num_bins = best_fit(np.bincount(lengths), self._length)
        order = order[np.argsort(bins, kind="stable")]
        return Pieces(starts[order], lengths[order], goes_on[order], _summed(np.bincount(bins, minlength=num_bins)))

    def _documents(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where each document of a window starts and how many inputs it has."""
        first = self._first + window * self._window
        ends = self._ends[first : min(first + self._window, self._last)]
        starts = np.empty_like(ends)
        starts[0] = self._start_of(first)
        starts[1:] = ends[:-1]
        lengths = ends - starts - (self._packing == "records")
        return starts, lengths

    def _start_of(self, document: int) -> int:
        return int(self._ends[document - 1]) if document else 0

    def _fitted(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return pieces of at most `length` tokens by the policy: starts, lengths, and whether a label follows."""
        is_record = self._packing == "records"
        if self._overlong == "drop":
            keep = (lengths > 0) & (lengths <= self._length)
            starts, lengths = starts[keep], lengths[keep]
        elif self._overlong == "truncate":
            keep = lengths > 0
            starts, lengths = starts[keep], np.minimum(lengths[keep], self._length)
        else:
            counts = -(-lengths // self._length)
            ends = np.repeat(starts + lengths, counts)
            starts = np.repeat(starts, counts) + self._length * _ragged(np.zeros_like(counts), counts)
            lengths = np.minimum(ends - starts, self._length)
            return starts, lengths, is_record | (starts + lengths < ends)
        return starts, lengths, np.full(len(starts), is_record)


def _keep(cache: dict, key: object, value: object, most: int) -> None:
    """Remember a value, and forget the oldest beyond `most`: it can be made again."""
    while len(cache) >= most:
        del cache[next(iter(cache))]
    cache[key] = value


def _ragged(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return first, first + 1, …, `count` of them for each pair, one after another."""
    before = np.cumsum(counts) - counts
    return np.repeat(firsts - before, counts) + np.arange(counts.sum())


def _summed(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the sums of the first 0, 1, … counts, as int64 [counts + 1]."""
    sums = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=sums[1:])
    return sums
