"""What one rank holds of a model and its optimizer: pieces of tensors, filled from checkpoints of any layout.

Each rank reads its own slices and nothing else, and asks no other rank: files are mapped, and what is not asked for is
not read.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ostro.errors import WeightsError
from ostro.model import layout
from ostro.weights import dcp
from ostro.weights.dcp_file import open_tensors
from ostro.weights.reshard import Box, GatheredFile, whole
from ostro.weights.store import (
    Reader,
    Shape,
    TensorInfo,
    Where,
    cast,
    label,
    match_shapes,
    require_finite,
    stack_sizes,
)

_ADVICE = "resume with the settings it was saved with"


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """A piece of a tensor: the local values on any device, the box of the whole that they are, the whole's shape."""

    tensor: Tensor
    box: Box
    shape: Shape

    @property
    def info(self) -> TensorInfo:
        """Shape and dtype of the whole."""
        return TensorInfo(self.shape, self.tensor.dtype)


def hold(tensors: Mapping[str, Tensor]) -> dict[str, Held]:
    """Return tensors that a rank has as wholes, as held pieces; they share memory."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return {name: Held(tensor.detach(), whole(shapes[name]), shapes[name]) for name, tensor in tensors.items()}


def load_held(folder: Path, held: Mapping[str, Held], names: Collection[str] | None = None) -> dict[str, Any]:
    """Fill held pieces in place from a checkpoint that any layout saved; return its state.

    `names` are those of all ranks' tensors (None: this rank has them all). The checkpoint must hold exactly these, and
    what is held with its shape and dtype: resuming is exact or it is a WeightsError. So is a folder that is not a
    whole, sound checkpoint, and, where hosts share no disk, the folder of a host that lacks what this rank has.
    """
    state = dcp.read_state(folder)
    is_part = "host" in state
    file = open_tensors(folder, "", is_partial=is_part)
    wanted = {name: piece.shape for name, piece in held.items()}
    for name in names or ():  # what only other ranks have is theirs to compare
        wanted.setdefault(name, file.infos[name].shape if name in file.infos else ())
    match_shapes(str(folder), {name: info.shape for name, info in file.infos.items()}, wanted, _ADVICE)
    if is_part:
        _require_own(folder, file, held, state)
    for name, piece in held.items():
        if file.infos[name].dtype != piece.tensor.dtype:
            raise WeightsError(
                f"{folder} holds {name} as {file.infos[name].dtype}, the run has it as {piece.tensor.dtype}: {_ADVICE}."
            )
    with torch.no_grad():
        for name, piece in held.items():
            for box, values in file.parts(name, piece.box):
                piece.tensor[box.within(piece.box).where].copy_(values)
    return state


class Quantized(Protocol):
    """A stack of matrices that are kept in fewer bits: whole ones come in, of which a box stays."""

    shape: tuple[int, ...]
    begins: tuple[int, ...]

    def fill(self, stack: tuple[int, ...], matrix: Tensor) -> None:
        """Take one whole matrix; `stack` is its place among those that are held."""
        ...


def load_quantized(reader: Reader, quantized: Mapping[str, Quantized]) -> None:
    """Fill what is kept in fewer bits from a checkpoint, one whole matrix at a time: its bits depend on no layout."""
    for name, kept in quantized.items():
        num_dims = len(kept.shape) - 2
        for stack in itertools.product(*(range(size) for size in kept.shape[:num_dims])):
            where: Where = tuple(map(int.__add__, stack, kept.begins))
            value = reader.read(name, where)
            require_finite(value, label(name, where))
            kept.fill(stack, value)


def load_weights(reader: Reader, held: Mapping[str, Held], table: Mapping[str, layout.Parameter] | None = None) -> None:
    """Fill pieces of a model's parameters, named as in the parameter table, from a checkpoint of any format.

    `table` is that of the model unless given (an adapter has another). One expert's one matrix at a time, only the
    slice that is held is asked for; it is cast to the piece's dtype. Raises WeightsError for a parameter that the
    checkpoint lacks or has in another shape, and for NaN or infinity.
    """
    table, infos = table or layout.table(reader.model), reader.names()
    shapes = {name: infos[name].shape for name in held if name in infos}
    match_shapes(f"the {reader.format} checkpoint", shapes, {name: piece.shape for name, piece in held.items()})
    with torch.no_grad():
        for name, piece in held.items():
            if not piece.box.num_elements:
                continue
            num_dims = len(stack_sizes(table[name]))
            spans = zip(piece.box.offsets[:num_dims], piece.box.sizes, strict=False)
            for stack in itertools.product(*(range(start, start + size) for start, size in spans)):
                where: Where = (*stack, *piece.box.where[num_dims:])
                value = reader.read(name, where)
                require_finite(value, label(name, where))
                local = tuple(map(int.__sub__, stack, piece.box.offsets))
                piece.tensor[local].copy_(cast(value, piece.tensor.dtype, label(name, where)))


def _require_own(folder: Path, file: GatheredFile, held: Mapping[str, Held], state: Mapping[str, Any]) -> None:
    """Raise WeightsError unless a host's own folder has all that a rank holds."""
    for name, piece in held.items():
        common = (piece.box.overlap(box) for box in file.boxes(name))
        if sum(box.num_elements for box in common if box is not None) != piece.box.num_elements:
            raise WeightsError(
                f"{folder} holds only what host {state['host']} of {state.get('num_hosts')} had, and not all that this "
                f"rank has of {name}: resume at the layout and on the hosts it was saved on, or bring all hosts' "
                "folders together first: ostro convert HOSTDIR… DST --to dcp."
            )
