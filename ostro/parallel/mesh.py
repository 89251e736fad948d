"""The ranks of a run as meshes: who stands where, and the process groups along every axis.

Two views of the same ranks (`degrees.Degrees`): dense (pp, dp, fsdp·cp, tp) and sparse (pp, dp, efsdp, ep, etp). A
group of one rank is None: nothing is ever communicated over it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ostro.degrees import Degrees

Group = dist.ProcessGroup


@dataclasses.dataclass(frozen=True, eq=False)
class Copies:
    """The ranks that hold the same part of a parameter: their group (None: this rank alone), and who comes first."""

    group: Group | None
    is_first: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Mesh:
    """Where a rank stands, and whom it talks to.

    tp, ep, cp: the groups along these axes. sequence: the ranks that a sequence is cut over (cp·tp). stage: all that
    hold this rank's layers. edges: groups of its pipeline (`edge`). ends: the first and the last of it, where they
    share an embedding. `dense`, `whole` and `sparse` are the meshes that blocks, words and experts are sharded over
    (replicas first where dp > 1); None where there is but one rank. copies: for LoRA's logical dims, the ranks of the
    stage that have the same part as this one.
    """

    degrees: Degrees
    rank: int
    device: torch.device
    tp: Group | None = None
    ep: Group | None = None
    cp: Group | None = None
    sequence: Group | None = None
    stage: Group | None = None
    edges: Sequence[Group] = ()
    ends: Group | None = None
    dense: DeviceMesh | None = None
    whole: DeviceMesh | None = None
    sparse: DeviceMesh | None = None
    copies: Mapping[tuple[str, ...], Copies] = dataclasses.field(default_factory=dict)

    @property
    def place(self) -> int:
        """This rank's number among those of its pipeline stage."""
        return self.rank % self.num_stage_ranks

    @property
    def pp_rank(self) -> int:
        """Its place in the pipeline."""
        return self.rank // self.num_stage_ranks

    @property
    def num_stage_ranks(self) -> int:
        """How many ranks hold a stage."""
        return self.degrees.num_ranks // self.degrees.pp

    @property
    def tp_rank(self) -> int:
        """Its place in its tensor-parallel group."""
        return self.rank % self.degrees.tp

    @property
    def cp_rank(self) -> int:
        """Its place among the ranks that a sequence is cut over, before tp cuts further."""
        return self.rank // self.degrees.tp % self.degrees.cp

    @property
    def data_rank(self) -> int:
        """Which share of a batch's rows it works on."""
        return self.place // (self.degrees.tp * self.degrees.cp)

    @property
    def num_data_ranks(self) -> int:
        """In how many shares a batch's rows are cut."""
        return self.degrees.dp * self.degrees.fsdp

    def edge(self, is_forward: bool, source: int) -> Group:
        """Return the group for what a place of the pipeline sends forwards or backwards.

        A rank has each group for one direction to or from one neighbour alone: NCCL keeps the order of all that goes
        through a communicator, and a message would wait behind one that waits for it. Edges that share no rank share a
        group: two colours, three where an odd number of ranks stands in a ring.
        """
        colour = 2 if self.degrees.pp % 2 and source == self.degrees.pp - 1 else source % 2
        if not is_forward:  # from source to the place before it: that one's edge, walked back
            before = (source - 1) % self.degrees.pp
            colour = 2 if self.degrees.pp % 2 and before == self.degrees.pp - 1 else before % 2
        return self.edges[2 * colour + is_forward]

    def peer(self, pp_rank: int) -> int:
        """Return the rank that stands at another place of this rank's pipeline."""
        return pp_rank * self.num_stage_ranks + self.place


def num_started() -> int:
    """Return how many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def alone(device: torch.device) -> Mesh:
    """Return the mesh of a run in one process."""
    return Mesh(Degrees(), 0, device)


def open_mesh(
    degrees: Degrees,
    device: torch.device,
    *,
    is_tied: bool = False,
    copied: Iterable[tuple[str, ...]] = (),
) -> Mesh:
    """Build the meshes and groups over the ranks of the process group, which every rank does at the same time.

    `is_tied` says that the first and the last stage share an embedding, `copied` which logical dims are cut by tp, ep
    and etp but not sharded (LoRA's).

    Raises LayoutError where the degrees do not multiply to the number of ranks.
    """
    num_ranks = num_started()
    degrees.require_ranks(num_ranks)
    if num_ranks == 1:
        return alone(device)
    d = degrees
    dense = _mesh(device, pp=d.pp, dp=d.dp, fsdp=d.fsdp * d.cp, tp=d.tp)
    sparse = _mesh(device, pp=d.pp, dp=d.dp, efsdp=d.efsdp, ep=d.ep, etp=d.etp)
    whole = _mesh(device, pp=d.pp, dp=d.dp, whole=d.fsdp * d.cp * d.tp) if d.vocab_emb_dp and d.tp > 1 else dense
    rank = dist.get_rank()
    place = rank % (num_ranks // d.pp)
    return Mesh(
        degrees,
        rank,
        device,
        tp=_group(dense, "tp"),
        ep=_group(sparse, "ep"),
        cp=_line(device, d.cp, inner=d.tp),
        sequence=_line(device, d.cp * d.tp),
        stage=_line(device, d.num_ranks // d.pp),
        edges=[_pipeline_group(d, place) for _ in range(4 + 2 * (d.pp % 2))] if d.pp > 1 else [],
        ends=_ends(d, place) if d.pp > 1 and is_tied else None,
        dense=_sharding(dense, d.dp, "fsdp"),
        whole=_sharding(whole, d.dp, "fsdp" if whole is dense else "whole"),
        sparse=_sharding(sparse, d.dp, "efsdp"),
        copies=_copies(d, place, copied),
    )


@contextlib.contextmanager
def first_of_host() -> Iterator[None]:
    """Let the first rank of each host go through alone, and the others after it; if it fails, so do they."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    has_others = num_started() > 1
    if has_others and not is_first:
        dist.barrier()
    yield
    if has_others and is_first:
        dist.barrier()


def host_group() -> Group | None:
    """Return a group of all ranks that talks through the hosts' memory, for what goes on beside the training."""
    group: Any = dist.new_group(backend="gloo") if num_started() > 1 else None
    return group


def _mesh(device: torch.device, **axes: int) -> DeviceMesh:
    assert prod(axes.values()) == dist.get_world_size()
    return init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def _group(mesh: DeviceMesh, axis: str) -> Group | None:
    if mesh[axis].size() == 1:
        return None
    group: Any = mesh.get_group(axis)
    return group


def _line(device: torch.device, size: int, inner: int = 1) -> Group | None:
    """Return this rank's group of `size` ranks that stand `inner` apart."""
    if size == 1:
        return None
    return _group(_mesh(device, outer=dist.get_world_size() // (size * inner), line=size, inner=inner), "line")


def _sharding(mesh: DeviceMesh, dp: int, axis: str) -> DeviceMesh | None:
    """Return the axes that parameters are replicated and sharded over, or None for a single rank."""
    sharding = mesh["dp", axis] if dp > 1 else mesh[axis]
    return sharding if sharding.size() > 1 else None


def _pipeline_group(degrees: Degrees, place: int) -> Group:
    """Return a group of the ranks at one place of every stage; all ranks make all of them."""
    num_stage_ranks = degrees.num_ranks // degrees.pp
    groups: list[Any] = [
        dist.new_group(list(range(other, degrees.num_ranks, num_stage_ranks))) for other in range(num_stage_ranks)
    ]
    return groups[place]


def _copies(degrees: Degrees, place: int, copied: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], Copies]:
    """Return who has the same part for each of some logical dims; all ranks make all groups, each once."""
    num_stage_ranks, stage = degrees.num_ranks // degrees.pp, dist.get_rank() // (degrees.num_ranks // degrees.pp)
    made: dict[tuple[tuple[int, ...], ...], Copies] = {}
    found = {}
    for dims in sorted(set(copied)):
        parts = tuple(map(tuple, degrees.copies(dims)))
        if parts not in made:
            groups: dict[tuple[int, int], Any] = {}
            for index in range(degrees.pp if len(parts[0]) > 1 else 0):
                for part in parts:
                    groups[index, part[0]] = dist.new_group([index * num_stage_ranks + i for i in part])
            mine = next(part for part in parts if place in part)
            made[parts] = Copies(groups.get((stage, mine[0])), place == mine[0])
        found[dims] = made[parts]
    return found


def _ends(degrees: Degrees, place: int) -> Group | None:
    """Return the group of the first and the last stage's ranks at one place; all ranks make all of them."""
    num_stage_ranks = degrees.num_ranks // degrees.pp
    last = degrees.num_ranks - num_stage_ranks
    groups: list[Any] = [dist.new_group([i, last + i]) for i in range(num_stage_ranks)]
    return groups[place] if not num_stage_ranks <= dist.get_rank() < last else None
