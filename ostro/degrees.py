"""Rank arithmetic: degrees of parallelism, whether they fit a model, and which part of a parameter is whose.

Pure Python: the planner and the converter ask here as well as the ranks of a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ostro.errors import LayoutError, nearest
from ostro.model.settings import ModelConfig

D = TypeVar("D")

_ALIASES = {"mp": "tp"}  # MindSpore's word


def parse(text: str, degrees: type[D]) -> D:
    """Return degrees (a dataclass of whole numbers) from a text like `dp=8,ep=8,pp=2`; the others are their defaults.

    MindSpore's `mp` is taken for `tp`. Raises LayoutError for anything else.
    """
    assert dataclasses.is_dataclass(degrees)
    known = [field.name for field in dataclasses.fields(degrees)]
    switches = [field.name for field in dataclasses.fields(degrees) if field.default == 0]
    values: dict[str, Any] = {}
    for part in text.replace(" ", "").split(","):
        name, _, number = part.partition("=")
        name = _ALIASES.get(name, name)
        if name not in known:
            raise LayoutError(
                f"layout {text!r}: {name!r} is no degree here; known: {', '.join(known)}.{nearest(name, known)}"
            )
        least = 0 if name in switches else 1
        if not (number.isascii() and number.isdigit() and len(number) < 8) or int(number) < least or name in values:
            raise LayoutError(f"layout {text!r}: {part!r} must be one name=number of at least {least}.")
        values[name] = int(number)
    return degrees(**values)


@dataclasses.dataclass(frozen=True)
class Degrees:
    """Ostro's own degrees. Ranks are the row-major coordinates of (pp, dp, fsdp, cp, tp).

    `dp` replicates, `fsdp` shards, `cp` cuts the sequence and shards parameters as fsdp does, `tp` cuts heads,
    vocabulary (unless `vocab_emb_dp`: MindFormers' word) and (with `etp` = tp) the experts' inner dim, `pp` cuts
    layers. Experts see the same ranks as (pp, dp, efsdp, ep, etp).
    """

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    ep: int = 1
    pp: int = 1
    cp: int = 1
    etp: int = 1
    vocab_emb_dp: int = 0

    @property
    def num_ranks(self) -> int:
        return self.pp * self.dp * self.fsdp * self.cp * self.tp

    @property
    def efsdp(self) -> int:
        """How many ranks share the shards of an expert."""
        return self.fsdp * self.cp * self.tp // (self.ep * self.etp)

    def require_ranks(self, num_ranks: int) -> None:
        """Raise LayoutError where the degrees do not multiply to the number of ranks that were started."""
        if self.num_ranks != num_ranks:
            names = ("dp", "fsdp", "cp", "tp", "pp")
            given = "·".join(f"{name}{getattr(self, name)}" for name in names if getattr(self, name) > 1)
            raise LayoutError(
                f"the layout {given or 'of one rank'} is for {self.num_ranks} ranks and {num_ranks} were started: "
                "change --nproc-per-node and --nnodes, or parallel.fsdp so that "
                f"{'·'.join(names)} = {num_ranks}."
            )

    def check(self, model: ModelConfig, *, for_run: bool = False) -> None:
        """Raise LayoutError for degrees that contradict each other or do not divide the model's sizes.

        In a run pipeline stages need not have equally many layers, and experts of which each rank would have less than
        one must be cut evenly: FSDP2 cuts no dim but the first unevenly.
        """
        if self.etp not in (1, self.tp):
            raise LayoutError(f"etp={self.etp} must be 1 or tp={self.tp}.")
        if self.fsdp * self.cp * self.tp % (self.ep * self.etp):
            raise LayoutError(
                f"ep·etp={self.ep * self.etp} does not divide fsdp·cp·tp={self.fsdp * self.cp * self.tp}: experts lie "
                "within these; change one."
            )
        sizes = {
            "tp": "num_key_value_heads",
            "ep": "num_local_experts",
            "pp": "num_hidden_layers",
            "etp": "intermediate_size",
        }
        if for_run:
            del sizes["pp"]
        named = {name: (setting, getattr(model, setting)) for name, setting in sizes.items()}
        require_divides(dataclasses.asdict(self), named)
        each, ffn = model.num_local_experts // self.ep, model.intermediate_size // self.etp
        if for_run and each % self.efsdp and ffn % self.efsdp:
            raise LayoutError(
                f"{self.efsdp} ranks (fsdp·cp·tp over ep·etp) share {each} experts of inner size {ffn}, and neither "
                "number can be divided by that: change ep or fsdp."
            )
        if not self.vocab_emb_dp:
            require_divides({"tp": self.tp}, {"tp": ("vocab_size", model.vocab_size)})

    def box(
        self, rank: int, dims: Sequence[str], shape: Sequence[int], stage: int | None
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return offsets and sizes of what a rank holds of a parameter of a stage (None: any); None if nothing.

        `dims` are the parameter's logical dims. Where fsdp does not divide dim 0 the last ranks hold less, as FSDP2
        has it; experts of which each rank would have less than one are cut along `ffn` instead. Norms and the router
        are whole on every rank.
        """
        if stage is not None and stage != rank // (self.num_ranks // self.pp):
            return None
        offsets, sizes = [0] * len(shape), list(shape)
        for name, index, parts in (*self._cuts(rank, dims), *self._shards(rank, dims, shape)):
            dim = dims.index(name)
            each = -(-sizes[dim] // parts)
            start = min(index * each, sizes[dim])
            offsets[dim] += start
            sizes[dim] = min(each, sizes[dim] - start)
        return (tuple(offsets), tuple(sizes)) if all(sizes) else None

    def cut(self, rank: int, dims: Sequence[str], shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return offsets and sizes of what tp, ep and etp leave of a parameter to a rank, before it is sharded."""
        sizes, offsets = self.part(dims, shape), [0] * len(shape)
        for name, index, _ in self._cuts(rank, dims):
            offsets[dims.index(name)] = index * sizes[dims.index(name)]
        return tuple(offsets), sizes

    def copies(self, dims: Sequence[str]) -> list[list[int]]:
        """Return which places of a stage hold the same part of a parameter that is cut and not sharded."""
        found: dict[tuple[int, ...], list[int]] = {}
        for place in range(self.num_ranks // self.pp):
            found.setdefault(tuple(index for _, index, _ in self._cuts(place, dims)), []).append(place)
        return list(found.values())

    def part(self, dims: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape that is left of a parameter where tp, ep and etp have cut it, before it is sharded."""
        sizes = list(shape)
        for name, _, parts in self._cuts(0, dims):
            sizes[dims.index(name)] //= parts
        return tuple(sizes)

    def _cuts(self, rank: int, dims: Sequence[str]) -> list[tuple[str, int, int]]:
        """Return (dim, which part, of how many) that tp, ep and etp make of a parameter."""
        if _is_expert(dims):
            place = rank % (self.ep * self.etp)
            cuts = [("expert", place // self.etp, self.ep), ("ffn", place % self.etp, self.etp)]
            return [cut for cut in cuts if cut[0] in dims]
        cut = ("heads", "kv_heads") if self.vocab_emb_dp else ("vocab", "heads", "kv_heads")
        return [(name, rank % self.tp, self.tp) for name in cut if name in dims]

    def _shards(self, rank: int, dims: Sequence[str], shape: Sequence[int]) -> list[tuple[str, int, int]]:
        """Return (dim, which part, of how many) that is made of it besides: fsdp and cp, and efsdp."""
        place = rank % (self.fsdp * self.cp * self.tp)
        if "rank" in dims:  # LoRA's
            return []
        if _is_expert(dims):
            is_whole = shape[0] // self.ep % self.efsdp == 0
            return [("expert" if is_whole else "ffn", place // (self.ep * self.etp), self.efsdp)]
        if len(dims) == 1 or "expert" in dims:  # norms and the router
            return []
        if "vocab" in dims and self.vocab_emb_dp:
            return [("vocab", place, self.fsdp * self.cp * self.tp)]
        return [(dims[0], place // self.tp, self.fsdp * self.cp)]


def _is_expert(dims: Sequence[str]) -> bool:
    return "expert" in dims and len(dims) > 2


def num_micro_batches(degrees: Degrees, global_sequences: int, micro_sequences: int, given: int | None = None) -> int:
    """Return how many micro-batches a rank works through in a step.

    Raises LayoutError where the batch does not divide over the data ranks (dp·fsdp) and, over several ranks, where a
    micro-batch would be smaller than the others, or where a pipeline's number is not the `given` one.
    """
    data_ranks = degrees.dp * degrees.fsdp
    each = data_ranks * micro_sequences
    if degrees.num_ranks > 1 and global_sequences % each:
        raise LayoutError(
            f"train.global_batch_sequences={global_sequences} is no multiple of dp·fsdp·micro_batch_sequences="
            f"{degrees.dp}·{degrees.fsdp}·{micro_sequences}={each}: use {-(-global_sequences // each) * each}, or "
            "other degrees."
        )
    found = -(-global_sequences // each)
    if given is not None and given != found and degrees.pp > 1:
        raise LayoutError(
            f"parallel.micro_batch_num={given} and train.global_batch_sequences={global_sequences} over dp·fsdp·"
            f"micro_batch_sequences={each} make {found}: set train.global_batch_sequences={given * each}, or leave "
            "micro_batch_num out."
        )
    return found


def require_divides(degrees: Mapping[str, int], sizes: Mapping[str, tuple[str, int]]) -> None:
    """Raise LayoutError unless each named degree divides the (setting, size) it cuts, saying which would."""
    for name, (setting, size) in sizes.items():
        degree = degrees[name]
        if size % degree:
            fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0 and n <= 64)
            raise LayoutError(f"{name}={degree} does not divide {setting}={size}: use {name} {fitting}.")


def host_ranks(num_ranks: int, host: int, num_hosts: int) -> range:
    """Return the ranks of a host, counted from 0, where all hosts have equally many."""
    if not 0 <= host < num_hosts:
        raise LayoutError(f"host {host}/{num_hosts}: hosts are counted from 0 to {num_hosts - 1}.")
    if num_ranks % num_hosts:
        raise LayoutError(
            f"{num_ranks} ranks cannot be shared evenly by {num_hosts} hosts: use a number that divides them."
        )
    each = num_ranks // num_hosts
    return range(host * each, (host + 1) * each)


def stage_layers(num_layers: int, num_stages: int, given: Sequence[int] | None = None) -> list[range]:
    """Return each pipeline stage's layers: `given` many, or equally many, the first stages one more where they must.

    Raises LayoutError where `given` is not one number of at least 1 a stage, or does not add up.
    """
    if num_stages > num_layers:
        raise LayoutError(
            f"pp·virtual_stages={num_stages} is more than num_hidden_layers={num_layers}: each stage needs a layer."
        )
    more = num_layers % num_stages
    counts = list(given or [num_layers // num_stages + (stage < more) for stage in range(num_stages)])
    if len(counts) != num_stages or min(counts) < 1 or sum(counts) != num_layers:
        raise LayoutError(
            f"parallel.stage_layers={counts} must be {num_stages} numbers of at least 1 that add up to "
            f"num_hidden_layers={num_layers}."
        )
    firsts = [sum(counts[:stage]) for stage in range(num_stages)]
    return [range(first, first + count) for first, count in zip(firsts, counts, strict=True)]


def stage_of(layer: int, num_layers: int, num_stages: int) -> int:
    """Return the pipeline stage of a layer, where all stages have equally many."""
    return layer * num_stages // num_layers
