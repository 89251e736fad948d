"""Counts what a rank sends and what it holds, by looking at every operation torch dispatches.

Both counters work on real tensors and on fake ones, so that a dry run (`plan`) can be held against a real one.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode  # torch has no public name for it

from ostro.optim import Optimizer
from ostro.parallel.apply import World, local
from ostro.parallel.mesh import Mesh

Category = Literal["parameters", "gradients", "optimizer", "gathered", "activations"]
CATEGORIES: tuple[Category, ...] = ("parameters", "gradients", "optimizer", "gathered", "activations")

# c10d's name of a collective: ours, and which of its arguments holds what this rank puts in.
_COLLECTIVES = {
    "_allgather_base_": ("all-gather", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 0),
    "alltoall_base_": ("all-to-all", 1),
    "send": ("send", 0),
    "recv_": ("receive", 0),
    "broadcast_": ("broadcast", 0),
}

# What copies parameters on their way into a product: a cast, and FSDP's ways into and out of its message.
_COPIES = {
    "aten::_foreach_copy_",
    "aten::_to_copy",
    "aten::cat",
    "aten::split_with_sizes_copy",
    "c10d::_allgather_base_",
    "fsdp::all_gather_copy_in",
    "fsdp::split_with_sizes_copy",
}


@dataclasses.dataclass(frozen=True, order=True)
class Sent:
    """One kind of collective over one kind of group: how often a rank takes part, and bytes it puts in (or receives).

    An all-gather's bytes are this rank's part, a reduce-scatter's and an all-reduce's the whole of what is summed.
    """

    kind: str
    group: str
    count: int
    num_bytes: int


class Traffic(TorchDispatchMode):
    """Within it collectives are counted, by kind and group."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self._names = _group_names(mesh)
        self._counts: dict[tuple[str, str], list[int]] = {}

    def sent(self) -> list[Sent]:
        """Return what was counted, sorted."""
        return sorted(Sent(*key, *counts) for key, counts in self._counts.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # what it sends is seen when its parts are computed
            return NotImplemented
        if func.namespace == "c10d":
            self._count(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Any, kwargs: Any) -> None:
        kind, place = _COLLECTIVES.get(func._schema.name.removeprefix("c10d::"), (None, 0))
        if kind is None:
            return
        tensors = args[place] if isinstance(args[place], list | tuple) else [args[place]]
        names = [argument.name for argument in func._schema.arguments]
        boxed = kwargs["process_group"] if "process_group" in kwargs else args[names.index("process_group")]
        group = self._names.get(dist.ProcessGroup.unbox(boxed).group_name, "other")
        counts = self._counts.setdefault((kind, group), [0, 0])
        counts[0] += 1
        counts[1] += sum(t.numel() * t.element_size() for t in tensors)


def _group_names(mesh: Mesh) -> dict[str, str]:
    """Return what each process group is for; torch has one group for all that have the same ranks."""
    found: dict[str, list[str]] = {}
    for shards, what in ((mesh.dense, "fsdp"), (mesh.sparse, "efsdp"), (mesh.whole, "fsdp")):
        if shards is not None:
            for axis, name in zip(reversed(shards.get_all_groups()), (what, "dp"), strict=False):
                found.setdefault(axis.group_name, []).append(name)
    named = [(name, getattr(mesh, name)) for name in ("tp", "ep", "cp", "ends", "sequence", "stage")]
    for name, group in (*named, *(("pp", edge) for edge in mesh.edges)):
        if group is not None:
            found.setdefault(group.group_name, []).append(name)
    if dist.is_initialized():
        assert dist.group.WORLD is not None
        found.setdefault(dist.group.WORLD.group_name, []).append("world")
    return {group: " ".join(dict.fromkeys(names)) for group, names in found.items()}


class Footprint(TorchDispatchMode):
    """Within it memory is counted, storage by storage, as tensors come and go.

    parameters and optimizer: what `world` and the optimizer held at the start. gathered: parameters that were gathered,
    and copies of them in the dtype of the activations. gradients: of parameters, before and after they are reduced.
    activations: everything else. `peak` is the division at the moment of the largest sum; `most` is each one's own.
    """

    def __init__(self, world: World, optimizer: Optimizer) -> None:
        super().__init__()
        self.world = world
        self.live: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        self.most: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        self.peak: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        self._held: dict[int, tuple[weakref.ref[Any], Category, int]] = {}
        self._watched: set[int] = set()
        # Some gradients are written beside autograd, which calls no hook then (ops.leave_for_later, ops.cast).
        self._hookless: list[nn.Parameter] = []
        self._hooks: list[Any] = []
        for p in world.parameters().values():
            self._see(local(p), "parameters")
        for kept in world.quantized().values():
            for buffer in kept.buffers():
                self._see(buffer, "parameters")
        for state in optimizer.state.values():
            for value in state.values():
                self._see(local(value), "optimizer")
        self._sharding = {
            group.group_name
            for shards in (world.mesh.whole, world.mesh.dense, world.mesh.sparse)
            if shards is not None
            for group in shards.get_all_groups()
        }

    def __enter__(self) -> Footprint:
        self._resize_before = _watch_resizing(self._resized)
        for module in (m for stage in self.world.pipeline.stages for m in stage.modules()):
            self._hooks.append(module.register_forward_pre_hook(self._watch_gradients))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resize_before
        for hook in self._hooks:
            hook.remove()

    def gradients(self) -> int:
        """Return the bytes of the gradients that the parameters have now."""
        grads = [local(p.grad) for p in self.world.parameters().values() if p.grad is not None]
        for grad in grads:
            self._see(grad, "gradients")
        return sum({id(g.untyped_storage()): g.untyped_storage().nbytes() for g in grads}.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = _operation(func)
        if operation.makes_nothing:
            return out
        for p in self._hookless:
            self._accumulated(p)
        category: Category = "activations"
        kinds = set()
        for tensor in _tensors((args, kwargs)):
            self._see(tensor, "activations")  # one may come from where no operation is seen
            kinds.add(self._held[_key(tensor)][1])
        if "gradients" in kinds:  # what is made of one is one
            category = "gradients"
        elif kinds & {"parameters", "gathered"} and operation.copies and self._is_of_parameters(func, args):
            category = "gathered"
        if category != "activations":
            for place, name in operation.written:
                for tensor in _tensors(args[place] if place < len(args) else kwargs.get(name)):
                    self._see(tensor, category)
        for tensor in _tensors(out):
            self._see(tensor, category)
        return out

    def _is_of_parameters(self, func: Any, args: Any) -> bool:
        return func.namespace != "c10d" or dist.ProcessGroup.unbox(args[2]).group_name in self._sharding

    def _see(self, tensor: Tensor, category: Category) -> None:
        """Take note of a tensor's memory if it is new; what was an activation so far may turn out to be more."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        held = self._held.get(key)
        if held is None:
            size = storage.nbytes()
            self._held[key] = (weakref.ref(storage, lambda _: self._gone(key)), category, size)
            self._change(category, size)
        elif held[1] == "activations" != category:
            self._held[key] = (held[0], category, held[2])
            self._change("activations", -held[2])
            self._change(category, held[2])

    def _gone(self, key: int) -> None:
        _, category, size = self._held.pop(key)
        self._change(category, -size)

    def _resized(self, storage: torch.UntypedStorage, size: int) -> None:
        # Nothing but what FSDP gathers is ever resized.
        key = storage._cdata
        before = self._held.get(key)
        if before is not None:
            self._change(before[1], -before[2])
        reference = before[0] if before is not None else weakref.ref(storage, lambda _: self._gone(key))
        self._held[key] = (reference, "gathered", size)
        self._change("gathered", size)

    def _change(self, category: Category, num_bytes: int) -> None:
        live = self.live
        live[category] += num_bytes
        if num_bytes <= 0:
            return
        self.most[category] = max(self.most[category], live[category])
        if sum(live.values()) > sum(self.peak.values()):
            self.peak = dict(live)

    def _watch_gradients(self, module: nn.Module, _: Any) -> None:
        # The parameters that a module computes with are there only now, where they are gathered first.
        for p in module.parameters(recurse=False):
            if id(p) not in self._watched and p.requires_grad and not isinstance(p, DTensor):
                self._watched.add(id(p))
                if p.dim() > 1:
                    self._hookless.append(p)
                self._hooks.append(p.register_post_accumulate_grad_hook(self._accumulated))

    def _accumulated(self, p: Tensor) -> None:
        if p.grad is not None:
            self._see(p.grad, "gradients")


@dataclasses.dataclass(frozen=True)
class _Operation:
    """What an operation of torch does to memory: whether it makes or writes anything, and what it copies."""

    makes_nothing: bool
    copies: bool
    written: tuple[tuple[int, str], ...]


@functools.cache
def _operation(func: Any) -> _Operation:
    arguments, returns = func._schema.arguments, func._schema.returns
    is_view = any(r.alias_info is not None for r in returns) and not any(
        a.alias_info is not None and a.alias_info.is_write for a in arguments
    )
    return _Operation(
        makes_nothing=func.namespace == "prim" or is_view,
        copies=func._schema.name in _COPIES,
        written=tuple(
            (place, a.name) for place, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write
        ),
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _watch_resizing(resized: Callable[[torch.UntypedStorage, int], None]) -> Any:
    """Tell `resized` of every storage that is resized, and return what was there before; no dispatch sees it."""
    before = torch.UntypedStorage.resize_

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        out = before(storage, size)
        resized(storage, int(size))
        return out

    torch.UntypedStorage.resize_ = resize  # pyright: ignore[reportAttributeAccessIssue]
    return before
