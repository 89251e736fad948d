"""What a checkpoint is to the rest of Ostro: a `Reader` of canonical tensors, and the loops over one.

Names, shapes and order are those of `model/layout.py`. Formats live in files of their own; here are the two
readers that need no file (a live model, random values) and what is done with any reader: load, digest,
compare.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ostro.errors import WeightsError
from ostro.model import layout
from ostro.model.settings import ROUTERS_WITH_BIAS, ModelConfig

Where = tuple[int | slice, ...]
"""Indexes of the leading dims of a canonical tensor; () is all of it."""

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of one tensor."""

    shape: Shape
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Reader(Protocol):
    """A checkpoint: canonical names, and any slice of any tensor, on the CPU."""

    @property
    def format(self) -> str:
        """The name in `FORMATS`, or `module` for a live model."""
        ...

    @property
    def model(self) -> ModelConfig:
        """The architecture the tensors belong to."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What was found and chosen on the way, each a few words for the user."""
        ...

    def names(self) -> Mapping[str, TensorInfo]:
        """Return every tensor of `layout.table(model)`, in its order."""
        ...

    def read(self, name: str, where: Where = ()) -> Tensor:
        """Return `tensor[where]`; only that slice is read where the format allows it. Never write into it."""
        ...


class ModuleReader:
    """A live model as a reader; its parameters carry the canonical names.

    `dtype` is what the tensors are cast to when read; None keeps each one's own.
    """

    format = "module"
    notes = ()

    def __init__(self, module: nn.Module, model: ModelConfig, dtype: torch.dtype | None = None) -> None:
        self.model = model
        self._dtype = dtype
        self._parameters = _parameters(module, model)
        match_shapes("the model in memory", _shapes(self._parameters), _wanted(model))

    def names(self) -> dict[str, TensorInfo]:
        """Return every parameter, in the table's order."""
        held = self._parameters
        return {
            name: TensorInfo(tuple(held[name].shape), self._dtype or held[name].dtype)
            for name in layout.table(self.model)
        }

    def read(self, name: str, where: Where = ()) -> Tensor:
        """Return a slice of a parameter: the live memory itself where no cast or copy is needed."""
        piece = self._parameters[name].detach()[where].cpu()
        return piece if self._dtype is None else cast(piece, self._dtype, label(name, where))


class RandomReader:
    """Fresh weights, fp32: N(0, initializer_range), norms 1, the router's selection bias 0.

    Every value is a pure function of (seed, name, expert, half, row, column), so a slice drawn alone has the
    bits it has in the whole, on any rank of any layout.
    """

    format = "random"
    notes = ()

    def __init__(self, model: ModelConfig, seed: int = 0) -> None:
        self.model = model
        self.seed = seed
        self._table = layout.table(model)

    def names(self) -> dict[str, TensorInfo]:
        """Return every tensor of the table, all fp32."""
        return {name: TensorInfo(p.shape, torch.float32) for name, p in self._table.items()}

    def read(self, name: str, where: Where = ()) -> Tensor:
        """Draw a slice; whole rows are drawn, so slicing the last dim saves nothing."""
        shape = self._table[name].shape
        if self._table[name].kind is layout.SELECTION_BIAS:
            return torch.zeros(shape)[where]
        if len(shape) == 1:
            return torch.ones(shape)[where]
        return drawn(self.seed, self._table[name], self.model.initializer_range, where)


def drawn(seed: int, parameter: layout.Parameter, std: float, where: Where = ()) -> Tensor:
    """Return a slice of a parameter of N(0, std²), fp32, as `RandomReader` draws it."""
    from ostro.weights.draw import normal_rows

    num_rows, num_columns = parameter.shape[-2:]

    def matrix(stack: tuple[int, ...], rest: Where) -> Tensor:
        key = "/".join(map(str, (seed, parameter.name, *stack)))
        index, rest = (rest[0], rest[1:]) if rest else (slice(None), ())
        rows = range(num_rows)[index]
        if isinstance(rows, int):
            return torch.from_numpy(normal_rows(key, rows, rows + 1, num_columns, std))[(0, *rest)]
        values = normal_rows(key, rows.start, max(rows.start, rows.stop), num_columns, std)
        return torch.from_numpy(values)[(slice(None, None, rows.step), *rest)]

    return assemble(stack_sizes(parameter), where, matrix)


class CastReader:
    """Another reader's tensors in `dtype`; with `keep_fp32`, norms and the router in fp32 all the same."""

    def __init__(self, source: Reader, dtype: torch.dtype, *, keep_fp32: bool = False) -> None:
        self.format = source.format
        self.model = source.model
        self.notes = source.notes
        self._source = source
        self._infos = {
            p.name: TensorInfo(p.shape, torch.float32 if keep_fp32 and p.kind.is_small else dtype)
            for p in layout.parameters(source.model)
        }

    def names(self) -> dict[str, TensorInfo]:
        """Return every tensor of the table, with the dtype it is cast to."""
        return self._infos

    def read(self, name: str, where: Where = ()) -> Tensor:
        """Return a slice; WeightsError for a value that the dtype cannot hold."""
        return cast(self._source.read(name, where), self._infos[name].dtype, label(name, where))


OnRead = Callable[[str, int], object]
"""Is told the name of the tensor that is about to be read, and how many bytes were read before."""


class Watched:
    """Another reader, and somebody who is told how far it was read."""

    def __init__(self, source: Reader, on_read: OnRead) -> None:
        self.format, self.model, self.notes = source.format, source.model, source.notes
        self._source, self._on_read, self._num_bytes = source, on_read, 0

    def names(self) -> Mapping[str, TensorInfo]:
        """Return the source's tensors."""
        return self._source.names()

    def read(self, name: str, where: Where = ()) -> Tensor:
        """Tell, and read."""
        self._on_read(name, self._num_bytes)
        value = self._source.read(name, where)
        self._num_bytes += value.nbytes
        return value


@dataclasses.dataclass(frozen=True)
class Hints:
    """What a path does not say by itself and the user did: its format, the model, strategy files, and which step.

    `partial` lets it lack what only other hosts have, where there is no shared disk: reading that raises WeightsError.
    """

    format: str | None = None
    model: ModelConfig | None = None
    strategy: Path | None = None
    step: int | None = None
    partial: bool | None = None


NO_HINTS = Hints()


def assemble(sizes: Shape, where: Where, piece: Callable[[tuple[int, ...], Where], Tensor]) -> Tensor:
    """Stack a tensor from pieces that are kept apart along its leading dims `sizes` (experts, halves).

    `piece(indexes, rest)` gives one of them, already indexed by the part of `where` behind the leading dims.
    Only the pieces that `where` names are asked for; a single one is returned as it is, without a copy.
    """

    def level(stack: tuple[int, ...], rest: Where) -> Tensor:
        if len(stack) == len(sizes):
            return piece(stack, rest)
        index, rest = (rest[0], rest[1:]) if rest else (slice(None), ())
        picked = range(sizes[len(stack)])[index]
        if isinstance(picked, int):
            return level((*stack, picked), rest)
        if not picked:
            one = level((*stack, 0), rest)
            return one.new_empty((0, *one.shape))
        return torch.stack([level((*stack, i), rest) for i in picked])

    return level((), where)


def stack_sizes(parameter: layout.Parameter) -> Shape:
    """Return the leading dims along which a parameter is a stack of matrices: (experts, halves), (experts,) or ()."""
    return parameter.shape[:-2]


def pieces(parameter: layout.Parameter) -> Iterator[tuple[int, ...]]:
    """Yield what is moved at a time: one expert's one matrix, or a whole tensor that is not an expert's."""
    return product(*map(range, stack_sizes(parameter)))


def label(name: str, where: Where) -> str:
    """Return the name of a slice as an error shows it: with the expert and the half, not with the rows."""
    stack = [str(index) for index in where if isinstance(index, int)]
    return name + (f"[{', '.join(stack)}]" if stack else "")


def printable(text: str) -> str:
    """Return text from a file as an error may show it: line ends and what commands a terminal are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cast(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Return `tensor` in `dtype`; WeightsError, naming `what`, for a finite value it cannot hold."""
    if tensor.dtype == dtype:
        return tensor
    out = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not _is_finite(out):
        lost = int((~torch.isfinite(out) & torch.isfinite(tensor)).sum())
        if lost:
            raise WeightsError(
                f"{what} has {lost} of {tensor.numel()} values that {_word(dtype)} cannot hold "
                f"(the largest is {tensor.abs().max().item():.3g}): use bfloat16 or float32."
            )
    return out


def match_shapes(source: str, held: Mapping[str, Shape], wanted: Mapping[str, Shape], advice: str = "") -> None:
    """Raise WeightsError, naming the first and counting, unless `held` has exactly the tensors `wanted`."""
    missing = [name for name in wanted if name not in held]
    extra = [name for name in held if name not in wanted]
    if missing and extra and len(missing) == len(wanted):
        raise WeightsError(
            f"{source} holds none of the model's {len(wanted)} tensors; its first is {extra[0]}, "
            f"the model's is {missing[0]}: this is not a Mixtral checkpoint."
        )
    if missing:
        raise WeightsError(
            f"{source} lacks {len(missing)} of the model's {len(wanted)} tensors, first {missing[0]}: "
            f"{advice or 'it is incomplete or belongs to another model'}."
        )
    if extra:
        raise WeightsError(
            f"{source} holds {len(extra)} {'tensors' if len(extra) > 1 else 'tensor'} that the model does "
            f"not have, first {extra[0]}: {advice or 'it belongs to another model'}."
        )
    differing = [name for name in wanted if tuple(held[name]) != tuple(wanted[name])]
    if differing:
        first = differing[0]
        count = f" ({len(differing)} tensors differ)" if len(differing) > 1 else ""
        raise WeightsError(
            f"{source} holds {first} with shape {_times(held[first])} where the model has "
            f"{_times(wanted[first])}{count}: {advice or 'it belongs to another model'}."
        )


def require_softmax(model: ModelConfig, format: str) -> None:
    """Raise WeightsError for a router that `format` cannot describe: it would be lost, and its bias if it has one."""
    if model.router != "softmax":
        bias = " with a selection bias" if model.router in ROUTERS_WITH_BIAS else ""
        raise WeightsError(
            f"the model's router is {model.router!r}{bias}, and the format {format} has a place only for Mixtral's "
            "softmax router: keep it as dcp, or train with moe.router=softmax to export it."
        )


def depth(names: Iterable[str], layers: str = "model.layers.") -> int:
    """Return the number of layers that names like `model.layers.3.…` have; `layers` is what precedes the number."""
    parts = (name[len(layers) :].partition(".")[0] for name in names if name.startswith(layers))
    return max((int(part) for part in parts if _is_index(part)), default=-1) + 1


def match_depth(source: str, names: Iterable[str], model: ModelConfig, layers: str = "model.layers.") -> None:
    """Raise WeightsError unless the names belong to `num_hidden_layers` layers.

    Comes before `match_shapes`, whose table would be endless for an absurd number of layers.
    """
    held = depth(names, layers)
    if held != model.num_hidden_layers:
        raise WeightsError(
            f"{source} holds {held} layers, its configuration says "
            f"num_hidden_layers={model.num_hidden_layers}: it is incomplete or the configuration belongs to "
            "another model."
        )


def load_into(module: nn.Module, reader: Reader) -> None:
    """Copy every tensor of `reader` into the parameter of the same name, cast to the parameter's dtype.

    Raises WeightsError for a missing, left-over or differently shaped tensor and for NaN or infinity.
    """
    parameters = _parameters(module, reader.model)
    held = {name: info.shape for name, info in reader.names().items()}
    match_shapes(f"the {reader.format} checkpoint", held, _shapes(parameters))
    with torch.no_grad():
        for parameter in layout.parameters(reader.model):
            target = parameters[parameter.name]
            for where in pieces(parameter):
                piece = reader.read(parameter.name, where)
                require_finite(piece, label(parameter.name, where))
                target[where].copy_(cast(piece, target.dtype, label(parameter.name, where)))


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise WeightsError if a value is NaN or infinite."""
    if _is_finite(tensor):
        return
    for word, mask in (("NaN", tensor.isnan()), ("infinity", tensor.isinf())):
        count = int(mask.sum())
        if count:
            raise WeightsError(
                f"{what} holds {word} in {count} of {tensor.numel()} values: the checkpoint is damaged or "
                "its training had diverged; take an earlier one."
            )


def digest(reader: Reader) -> str:
    """Return the sha256 of names, shapes, dtypes and bytes, in the table's order."""
    total = hashlib.sha256()
    infos = reader.names()
    for parameter in layout.parameters(reader.model):
        info = infos[parameter.name]
        total.update(f"{parameter.name} {_times(info.shape)} {_word(info.dtype)}\n".encode())
        for where in pieces(parameter):
            total.update(as_bytes(reader.read(parameter.name, where)))
    return total.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor, row-major; without a copy where it is contiguous."""
    return _raw(tensor).numpy().data


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two CPU tensors agree in dtype, shape and every bit, NaN included."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(_raw(a), _raw(b))


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two checkpoints are apart in one kind of parameter.

    `max_relative` is the largest, over the pieces compared, of max|a - b| / max|b|.
    """

    kind: str
    num_tensors: int
    max_absolute: float
    max_relative: float
    equal_bits: bool

    @property
    def is_same(self) -> bool:
        """Whether the values are equal, in the same dtype or another."""
        return self.equal_bits or self.max_absolute == 0


def compare(a: Reader, b: Reader) -> list[Difference]:
    """Return one row per kind of parameter; WeightsError if the two are of different architectures."""
    differing = architecture_difference(a.model, b.model)
    if differing is not None:
        name, mine, other = differing
        raise WeightsError(
            f"the two checkpoints are of different models: {name} is {mine} in the first and {other} in the second."
        )
    rows: dict[str, Difference] = {}
    for parameter in layout.parameters(a.model):
        name = parameter.kind.name
        row = rows.get(name, Difference(name, 0, 0.0, 0.0, True))
        absolute, relative, equal = row.max_absolute, row.max_relative, row.equal_bits
        for where in pieces(parameter):
            gap, ratio, same = _difference(a.read(parameter.name, where), b.read(parameter.name, where))
            absolute, relative, equal = max(absolute, gap), max(relative, ratio), equal and same
        rows[name] = Difference(name, row.num_tensors + 1, absolute, relative, equal)
    return list(rows.values())


def architecture_difference(a: ModelConfig, b: ModelConfig) -> tuple[str, Any, Any] | None:
    """Return the first setting that makes the same weights compute something else, with both values; None if equal."""
    for field in dataclasses.fields(ModelConfig):
        if field.name not in _NOT_COMPUTED_WITH and getattr(a, field.name) != getattr(b, field.name):
            return field.name, getattr(a, field.name), getattr(b, field.name)
    return None


_NOT_COMPUTED_WITH = (
    "max_position_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def _difference(a: Tensor, b: Tensor) -> tuple[float, float, bool]:
    if same_bits(a, b):
        return 0.0, 0.0, True
    # NaN on one side only would otherwise vanish in max().
    gap = (a.float() - b.float()).abs().nan_to_num(nan=float("inf")).max().item()
    size = b.float().abs().nan_to_num().max().item()
    return gap, gap / size if size else (float("inf") if gap else 0.0), False


def _parameters(module: nn.Module, model: ModelConfig) -> dict[str, Tensor]:
    held: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    if model.tie_word_embeddings and held.get(layout.HEAD.name) is held.get(layout.EMBEDDING.name):
        held.pop(layout.HEAD.name, None)
    return held


def _shapes(parameters: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(parameter.shape) for name, parameter in parameters.items()}


def _wanted(model: ModelConfig) -> dict[str, Shape]:
    return {name: parameter.shape for name, parameter in layout.table(model).items()}


def _raw(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    # One element is contiguous at any stride, but a view as bytes wants 1.
    return (flat.clone() if flat.numel() == 1 else flat).view(torch.uint8)


def _is_finite(tensor: Tensor) -> bool:
    # A sum carries every NaN and infinity with it and needs no mask in memory. It may also overflow by
    # itself, so False only means that it is worth counting.
    return bool(torch.isfinite(tensor.sum(dtype=torch.float32)))


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 7


def _times(shape: Shape) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
