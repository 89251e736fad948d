"""A checkpoint with a LoRA adapter merged into it, as another Reader: W + scale·B·A, made as it is read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ostro.errors import WeightsError
from ostro.model import layout
from ostro.model.layout import LORA_A, LORA_B, LORA_MAGNITUDE
from ostro.weights.adapters import Adapter
from ostro.weights.store import Reader, TensorInfo, Where, assemble, cast, label, stack_sizes

# Rows made at a time, always the same ones together: a product's bits may depend on its shape, and a slice must have
# those of the whole. It also keeps them in the processor's cache.
_ROWS = 64
_OTHER_BASE = 0.02  # how far rounding can bring apart two copies of a matrix, of its largest value


@dataclasses.dataclass
class Change:
    """What an adapter has done to one matrix, over all of it that was read: sums of squares, and whether any value of
    what came out is another."""

    delta: float = 0.0
    weight: float = 0.0
    is_felt: bool = False

    @property
    def relative(self) -> float:
        """‖ΔW‖ / ‖W‖."""
        return math.sqrt(self.delta / self.weight) if self.weight else math.inf if self.delta else 0.0


class Merged:
    """Another reader's tensors with an adapter's corrections, computed in fp32 and rounded once, to what `infos` say.

    `infos` None keeps the source's own types. One matrix of one expert is in memory at a time, and of it what was asked
    for. An adapter of a tied embedding corrects what is looked up and not the head, so the merged model is not tied.
    `changes` has what was done, by parameter and index of its stack. Raises WeightsError for an adapter that was saved
    with another embedding or head.
    """

    def __init__(self, source: Reader, adapter: Adapter, infos: Mapping[str, TensorInfo] | None = None) -> None:
        self.format, self.model, self.notes = source.format, source.model, (*source.notes, *adapter.notes)
        self.changes: dict[tuple[str, tuple[int, ...]], Change] = {}
        self._source, self._adapter = source, adapter
        self._infos = dict(infos or source.names())
        self.is_untied = self.model.tie_word_embeddings and layout.EMBEDDING.target in adapter.lora.matrices
        if self.is_untied:
            self.model = dataclasses.replace(self.model, tie_word_embeddings=False)
            self._infos[layout.HEAD.name] = self._infos[layout.EMBEDDING.name]
        self._table = layout.table(self.model)
        self._factors: tuple[tuple[str, tuple[int, ...]], Tensor, Tensor] | None = None
        for name, copy in adapter.copies.items():
            _require_same(source, name, copy)

    def names(self) -> dict[str, TensorInfo]:
        """Return every tensor of the table, with the type it is rounded to."""
        return self._infos

    def read(self, name: str, where: Where = ()) -> Tensor:
        """Return a slice; WeightsError for a value that its type cannot hold."""
        parameter = self._table[name]
        if parameter.kind.target in self._adapter.lora.matrices:
            return assemble(stack_sizes(parameter), where, lambda stack, rest: self._matrix(parameter, stack, rest))
        held = layout.EMBEDDING.name if self.is_untied and name == layout.HEAD.name else name
        return cast(self._source.read(held, where), self._infos[name].dtype, label(name, where))

    def _matrix(self, parameter: layout.Parameter, stack: tuple[int, ...], where: Where) -> Tensor:
        """Return a slice of one matrix."""
        index, *columns = where or (slice(None),)
        rows = range(parameter.shape[-2])[index]
        if isinstance(rows, int):
            return self._rows(parameter, stack, rows, rows + 1, columns)[0]
        stop = rows[-1] + 1 if rows else rows.start
        return self._rows(parameter, stack, rows.start, stop, columns)[:: rows.step]

    def _rows(
        self, parameter: layout.Parameter, stack: tuple[int, ...], start: int, stop: int, columns: list[int | slice]
    ) -> Tensor:
        """Return consecutive rows, or columns of them, of one matrix."""
        name, dtype, dora = parameter.name, self._infos[parameter.name].dtype, self._adapter.lora.dora
        left, right = self._left_right(parameter, stack)
        cut = (slice(None), *columns)
        # The norm of a row is that of all its columns.
        base = self._source.read(name, (*stack, slice(start, stop), *([] if dora else columns)))
        out = torch.empty(base.shape, dtype=dtype)
        change = self.changes.setdefault((name, stack), Change())
        for tile in range(start // _ROWS * _ROWS, stop, _ROWS):
            first, last = max(start, tile), min(stop, tile + _ROWS)
            delta = (left[tile : tile + _ROWS] @ right)[first - tile : last - tile]
            before, after = base[first - start : last - start].float(), out[first - start : last - start]
            if dora:
                merged = before + delta
                merged *= _factor(self._magnitude(name)[first:last], merged)
                delta = merged - before
            else:
                delta = delta[cut]
                merged = before + delta
            after.copy_(cast(merged, dtype, label(name, stack)))
            change.delta += torch.linalg.vector_norm(delta).item() ** 2
            change.weight += torch.linalg.vector_norm(before).item() ** 2
            change.is_felt = change.is_felt or not torch.equal(after, before.to(dtype))
        return out[cut] if dora else out

    def _left_right(self, parameter: layout.Parameter, stack: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return what the correction is the product of, [rows, rank] with the scale in it, and [rank, columns]."""
        key = (parameter.name, stack)
        if self._factors is None or self._factors[0] != key:
            prefix = _prefix(parameter.name)
            a = self._adapter.tensors[prefix + LORA_A][stack[:1]].float()
            b = self._adapter.tensors[prefix + LORA_B][stack].float() * self._adapter.lora.scale
            left, right = (a.T, b.T) if parameter.kind is layout.EMBEDDING else (b, a)
            self._factors = (key, left.contiguous(), right.contiguous())
        return self._factors[1:]

    def _magnitude(self, name: str) -> Tensor:
        return self._adapter.tensors[_prefix(name) + LORA_MAGNITUDE].float()


def report(merged: Merged) -> list[str]:
    """Return lines that show what was merged: ‖ΔW‖/‖W‖ by layer and matrix, and by name what was lost."""
    squares: dict[tuple[str, int | None], Change] = {}
    table, lost = layout.table(merged.model), {"": [], "rounded": []}
    for (name, stack), change in merged.changes.items():
        parameter = table[name]
        total = squares.setdefault((parameter.kind.target, parameter.layer), Change())
        total.delta, total.weight = total.delta + change.delta, total.weight + change.weight
        if not change.is_felt:
            lost["rounded" if change.delta else ""].append(label(name, stack))
    targets = list(dict.fromkeys(target for target, layer in squares if layer is not None))
    lines = ["‖ΔW‖/‖W‖  " + "  ".join(f"{target:>8}" for target in targets)] if targets else []
    for layer in sorted({layer for _, layer in squares if layer is not None}):
        cells = (squares[target, layer].relative for target in targets)
        lines.append(f"layer {layer:>3}  " + "  ".join(f"{cell:8.1e}" for cell in cells))
    if merged.is_untied:
        lines.append("the head is no longer tied to the embedding, which alone is corrected")
    lines += [f"‖ΔW‖/‖W‖ of {target}: {one.relative:.1e}" for (target, layer), one in squares.items() if layer is None]
    for kind, why in (
        ("", "is 0: B was never trained"),
        ("rounded", "is lost when rounded, no value changes: a wider --dtype keeps it"),
    ):
        if lost[kind]:
            more = f" and {len(lost[kind]) - 8} more" if len(lost[kind]) > 8 else ""
            lines.append(f"warning: the delta of {', '.join(lost[kind][:8])}{more} {why}")
    return lines


def _prefix(name: str) -> str:
    return name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"


def _factor(magnitude: Tensor, rows: Tensor) -> Tensor:
    """Return what brings each row to its magnitude; a row of zeros has no direction and stays."""
    norm = torch.linalg.vector_norm(rows, dim=1)
    return torch.where(norm > 0, magnitude / norm, 0.0)[:, None]


def _require_same(source: Reader, name: str, copy: Tensor) -> None:
    info = source.names().get(name)
    if info is None or info.shape != tuple(copy.shape):
        raise WeightsError(
            f"the adapter was saved with a {name} of {tuple(copy.shape)}, the base has "
            f"{info.shape if info else 'none'}: give the base it was trained on."
        )
    for start in range(0, len(copy), _ROWS):
        rows = slice(start, start + _ROWS)
        mine, other = source.read(name, (rows,)).float(), copy[rows].float()
        if (mine - other).abs().max() > _OTHER_BASE * mine.abs().max():
            raise WeightsError(
                f"the adapter was saved with another {name} than the base's, from row {start} on: give the base it was "
                "trained on."
            )
