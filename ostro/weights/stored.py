"""Where a format keeps the pieces of a model: a map from the parameter table to the tensors of its files.

A piece is one expert's one matrix, or a whole parameter that is not an expert's (`store.pieces`). A format says
with one function in which tensor of its files each piece stands, where in it, and in what order its values
are. Reading, checking and writing follow from that.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ostro.errors import WeightsError
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights.mapped import Parts, TensorFile
from ostro.weights.reshard import Box
from ostro.weights.store import (
    Reader,
    Shape,
    TensorInfo,
    Where,
    assemble,
    match_depth,
    match_shapes,
    pieces,
    same_bits,
    stack_sizes,
)

_BLOCK_BYTES = 16 << 20  # read at a time where the order stays: small enough for memory to be used again
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class Order:
    """How a piece's values stand in a file.

    `load` gives the piece from the file's tensor, `save` the file's tensor from the piece; views where they can be.
    """

    load: Callable[[Tensor], Tensor]
    save: Callable[[Tensor], Tensor]
    is_transposed: bool = False


AS_IT_IS = Order(lambda held: held, lambda piece: piece)
TRANSPOSED = Order(lambda held: held.transpose(-2, -1), lambda piece: piece.transpose(-2, -1), is_transposed=True)


def interleaved(head_dim: int) -> Order:
    """Return the order of rotary rows in pairs (0, 1), (2, 3), …, where Hugging Face pairs a head's two halves.

    It is Meta's and Mistral's own; transformers' conversion scripts of Llama permute the same way.
    """

    def load(held: Tensor) -> Tensor:
        return held.view(-1, head_dim // 2, 2, held.shape[-1]).transpose(1, 2).reshape(held.shape)

    def save(piece: Tensor) -> Tensor:
        return piece.reshape(-1, 2, head_dim // 2, piece.shape[-1]).transpose(1, 2).reshape(piece.shape)

    return Order(load, save)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a piece is kept: in the tensor `name` of this `shape`, at `index` of it.

    `split` is the shape the tensor is viewed as before it is indexed, where that is another.
    """

    name: str
    shape: Shape
    index: tuple[int, ...] = ()
    split: Shape | None = None
    order: Order = AS_IT_IS


SourceOf = Callable[[layout.Parameter, tuple[int, ...]], Source]
"""A format's map: the source of the piece of a parameter at an index of its stack (expert, half)."""


class StoredReader:
    """Files of a format as a reader of canonical tensors.

    `files` has the file of every tensor that is the model's, `others` of those that are known not to be; `notes` are
    sentences on what was found and chosen.
    Until `check` was called, reading may fail.
    """

    def __init__(
        self,
        format: str,
        path: Path,
        model: ModelConfig,
        files: Mapping[str, TensorFile],
        source: SourceOf,
        *,
        layers: str = "model.layers.",
        notes: Sequence[str] = (),
        advice: str = "",
        certify: Callable[[], object] | None = None,
        others: Mapping[str, TensorFile] = types.MappingProxyType({}),
    ) -> None:
        self.format = format
        self.path = path
        self.model = model
        self.files = files
        self.notes = tuple(notes)
        self._source = source
        self._layers = layers
        self._advice = advice
        self._certify = certify
        self.others = others
        self._parameters: dict[str, layout.Parameter] = {}

    def names(self) -> dict[str, TensorInfo]:
        """Return every tensor of the table that is there, with the dtype it has on disk."""
        there = (p for p in self._table.values() if next(self._sources(p)).name in self.files)
        return {p.name: TensorInfo(p.shape, self._dtype(p)) for p in there}

    def read(self, name: str, where: Where = ()) -> Tensor:
        """Return a slice: a view of the mapped file, copied only where pieces have to be stacked or reordered."""
        parameter = self._table[name]

        def piece(stack: tuple[int, ...], rest: Where) -> Tensor:
            source = self._source(parameter, stack)
            file = self.files[source.name]
            if source.order is AS_IT_IS and source.split is None:
                return file.tensor(source.name, (*source.index, *rest))
            if source.split is None:
                held = file.tensor(source.name, source.index)
            else:
                held = file.tensor(source.name).view(source.split)[source.index]
            return source.order.load(held)[rest]

        return assemble(stack_sizes(parameter), where, piece)

    def check(self) -> None:
        """Raise WeightsError for a tensor that is missing, left over, or has another shape or an unfit dtype."""
        held = self.held()
        match_depth(str(self.path), held, self.model, self._layers)
        self._match_experts(held)
        for parameter in self._table.values():
            found = {held[source.name].dtype for source in self._sources(parameter) if source.name in held}
            if not found <= set(FLOATS) or len(found) > 1:
                words = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
                raise WeightsError(
                    f"{self.path} holds {parameter.name} as {words}: every tensor must have one floating-point type."
                )
        self._check_tied(held)
        shapes = {name: info.shape for name, info in held.items()}
        match_shapes(str(self.path), shapes, self.wanted(), self._advice)

    def faults(self) -> list[str]:
        """Return what `check` would raise, and beyond its first word: a sentence for each way of being unfit."""
        try:
            match_depth(str(self.path), self.held(), self.model, self._layers)
            self._match_experts(self.held())
        except WeightsError as error:
            return [str(error)]
        wanted, held = self.wanted(), self.held()
        if self.model.tie_word_embeddings:
            held.pop(self._source(layout.Parameter(layout.HEAD.name, (), layout.HEAD, None), ()).name, None)
        groups = {
            "missing": [name for name in wanted if name not in held],
            "not the model's": [name for name in held if name not in wanted],
            "of another shape": [name for name in held if name in wanted and held[name].shape != wanted[name]],
        }
        faults = [
            f"{len(names)} of {len(wanted)} tensors are {word}: {', '.join(names[:4])}{', …' * (len(names) > 4)}"
            for word, names in groups.items()
            if names
        ]
        try:
            self.check()
        except WeightsError as error:
            return faults or [str(error)]
        return faults

    def sound(self) -> Iterator[layout.Parameter]:
        """Yield the parameters that are there whole, with their shapes."""
        held = self.held()
        for parameter in self._table.values():
            infos = [(held.get(source.name), source.shape) for source in self._sources(parameter)]
            if all(info is not None and info.shape == shape for info, shape in infos):
                yield parameter

    def info(self, parameter: layout.Parameter) -> TensorInfo:
        """Return shape and dtype of a parameter that is there."""
        return TensorInfo(parameter.shape, self._dtype(parameter))

    def certify(self) -> None:
        """Read what proves the files sound beyond the tensors (checksums, the copies on other ranks): WeightsError if
        it does not agree."""
        if self._certify is not None:
            self._certify()

    def held(self) -> dict[str, TensorInfo]:
        """Return the tensors of the files."""
        return {name: file.infos[name] for name, file in self.files.items()}

    def wanted(self) -> dict[str, Shape]:
        """Return the tensors that the model should have in this format, and their shapes."""
        return {source.name: source.shape for p in self._table.values() for source in self._sources(p)}

    @property
    def _table(self) -> dict[str, layout.Parameter]:
        # Late: a configuration with an absurd number of layers would make it endless, and `check` comes first.
        if not self._parameters:
            self._parameters = layout.table(self.model)
        return self._parameters

    def _sources(self, parameter: layout.Parameter) -> Iterator[Source]:
        for stack in pieces(parameter):
            yield self._source(parameter, stack)

    def _dtype(self, parameter: layout.Parameter) -> torch.dtype:
        first = next(self._sources(parameter)).name
        return self.files[first].infos[first].dtype

    def _match_experts(self, held: Mapping[str, TensorInfo]) -> None:
        """Compare the number of experts first: with an absurd one the table of names would be endless."""
        gate = layout.Parameter(layout.GATE.name.format(layer=0), (), layout.GATE, 0)
        name = self._source(gate, ()).name
        shape = held[name].shape if name in held else None
        if shape is not None and shape[:1] != (self.model.num_local_experts,):
            raise WeightsError(
                f"the configuration of {self.path} says num_local_experts={self.model.num_local_experts}, "
                f"{name} has the shape {'×'.join(map(str, shape))}: it belongs to another model."
            )

    def _check_tied(self, held: dict[str, TensorInfo]) -> None:
        """Let a tied model bring its head along, as some do, if it is the embedding indeed."""
        if not self.model.tie_word_embeddings:
            return
        head, embedding = (
            self._source(layout.Parameter(kind.name, (), kind, None), ()).name
            for kind in (layout.HEAD, layout.EMBEDDING)
        )
        if held.pop(head, None) is None or embedding not in held:
            return
        if not same_bits(self.files[head].tensor(head), self.files[embedding].tensor(embedding)):
            raise WeightsError(
                f"{self.path} holds a {head} that differs from {embedding}, but its configuration ties the "
                "two: set tie_word_embeddings to false."
            )


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a file's tensor takes from a parameter: the piece at an index of its stack, or some rows of it."""

    name: str
    stack: tuple[int, ...]
    rows: slice
    source: Source


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """One tensor to write, and the pieces of `reader` that make it up, in the order in which they stand in it."""

    name: str
    info: TensorInfo
    reader: Reader
    pieces: tuple[Piece, ...]

    def parts(self, box: Box | None = None) -> Iterator[Tensor]:
        """Yield the tensor, or a box of it, in blocks of rows; what changes its order comes a piece at a time."""
        for piece in self.pieces:
            index, rows, rest = piece.source.index, piece.rows, ()
            if box is not None:
                if any(not 0 <= i - o < n for i, o, n in zip(index, box.offsets, box.sizes, strict=False)):
                    continue
                rows, *rest = box.where[len(index) :]
            if piece.source.order is not AS_IT_IS:
                yield piece.source.order.save(self.reader.read(piece.name, piece.stack))[(rows, *rest)]
                continue
            row_bytes = math.prod(self.info.shape[len(index) + 1 :]) * self.info.dtype.itemsize
            step = max(1, _BLOCK_BYTES // row_bytes)
            for start in range(rows.start, rows.stop, step):
                block = slice(start, min(start + step, rows.stop))
                yield self.reader.read(piece.name, (*piece.stack, block, *rest))


def file_tensors(reader: Reader, source: SourceOf) -> dict[str, FileTensor]:
    """Return the tensors that a model has in a format, in the order of the parameter table."""
    infos = reader.names()
    found: dict[str, list[Piece]] = {}
    for parameter in layout.parameters(reader.model):
        for stack in pieces(parameter):
            at = source(parameter, stack)
            num_rows = (at.split or at.shape)[len(at.index)]
            found.setdefault(at.name, []).append(Piece(parameter.name, stack, slice(0, num_rows), at))
    return {
        name: FileTensor(name, TensorInfo(held[0].source.shape, infos[held[0].name].dtype), reader, tuple(held))
        for name, held in found.items()
    }


def streamed(tensors: Iterable[FileTensor], boxes: Mapping[str, Box] | None = None) -> Parts:
    """Return what gives the parts of each tensor, which must be asked for in this order, read one ahead.

    A part is good until the next one is asked for: what has to be copied is copied into two buffers, by turns.
    """

    def every() -> Iterator[tuple[str, Tensor]]:
        buffers = itertools.cycle((_Buffer(), _Buffer()))
        for tensor in tensors:
            for part in tensor.parts(boxes[tensor.name] if boxes else None):
                yield tensor.name, part if part.is_contiguous() else next(buffers).filled(part)

    groups = itertools.groupby(_ahead(every()), key=lambda pair: pair[0])

    def parts(name: str) -> Iterator[Tensor]:
        found, group = next(groups)
        assert found == name, (found, name)
        return (part for _, part in group)

    return parts


class _Buffer:
    """Memory that is used again: fresh pages for every copy would cost as much as the copy."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def filled(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy."""
        if len(self._bytes) < tensor.nbytes:
            self._bytes = torch.empty(tensor.nbytes, dtype=torch.uint8)
        return self._bytes[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield the items, the next of which is made by a thread meanwhile."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = pool.submit(next, items, end)
            yield item
