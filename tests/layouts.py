"""Which slice of a parameter a rank holds, derived a second time: by cutting index ranges with torch.chunk.

Slow and obvious, to hold `ostro.degrees` and the training checkpoints of a layout against.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from ostro.degrees import Degrees
from ostro.model import layout
from ostro.model.settings import ModelConfig

EXPERTS = (layout.W13, layout.W2)
SMALL = (layout.INPUT_NORM, layout.POST_NORM, layout.NORM, layout.GATE, layout.SELECTION_BIAS)


@st.composite
def degrees(draw: st.DrawFn) -> Degrees:
    """Draw degrees that do not contradict each other."""
    small = st.integers(1, 3)
    tp, fsdp, cp = draw(small), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    etp = draw(st.sampled_from([1, tp]))
    within = fsdp * cp * tp // etp
    ep = draw(st.sampled_from([n for n in range(1, within + 1) if within % n == 0]))
    dp, pp, uncut = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(0, 1))
    return Degrees(dp=dp, fsdp=fsdp, tp=tp, ep=ep, pp=pp, cp=cp, etp=etp, vocab_emb_dp=uncut)


@st.composite
def models_for(draw: st.DrawFn, degrees: Degrees) -> ModelConfig:
    """Draw a model that the degrees divide; what fsdp cuts may be ragged, what efsdp cuts along ffn may not."""
    kv_heads = degrees.tp * draw(st.integers(1, 2))
    return ModelConfig(
        vocab_size=degrees.tp * draw(st.integers(3, 7)),
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=degrees.etp * degrees.efsdp * draw(st.integers(1, 7)),
        num_hidden_layers=degrees.pp * draw(st.integers(1, 2)),
        num_attention_heads=kv_heads * draw(st.integers(1, 2)),
        num_key_value_heads=kv_heads,
        head_dim=2,
        num_local_experts=degrees.ep * draw(st.integers(1, 3)),
        num_experts_per_tok=1,
        tie_word_embeddings=draw(st.booleans()),
    )


def stages_of(parameter: layout.Parameter, model: ModelConfig, pp: int) -> tuple[int, ...]:
    """Return the pipeline stages that hold a parameter: two for a tied embedding, which is the head as well."""
    if parameter.layer is not None:
        cuts = torch.arange(model.num_hidden_layers).view(pp, -1)
        return tuple((cuts == parameter.layer).nonzero()[0, :1].tolist())
    if parameter.kind is layout.EMBEDDING:
        return tuple(sorted({0, pp - 1})) if model.tie_word_embeddings else (0,)
    return (pp - 1,)


def coordinates(degrees: Degrees, rank: int, is_expert: bool) -> dict[str, int]:
    """Return where a rank stands in the dense or in the sparse mesh."""
    d = degrees
    sizes = {"pp": d.pp, "dp": d.dp}
    sizes |= {"efsdp": d.efsdp, "ep": d.ep, "etp": d.etp} if is_expert else {"fsdp": d.fsdp, "cp": d.cp, "tp": d.tp}
    ranks = torch.arange(d.num_ranks).view(*sizes.values())
    return dict(zip(sizes, (ranks == rank).nonzero()[0].tolist(), strict=True))


def cuts_of(degrees: Degrees, rank: int, parameter: layout.Parameter) -> list[tuple[int, int, int]]:
    """Return (dim, parts, which part) of every cut, the outermost first; FSDP's is the last."""
    d, dims = degrees, parameter.kind.dims
    at = coordinates(d, rank, parameter.kind in EXPERTS)
    if parameter.kind in EXPERTS:
        ffn = dims.index("ffn")
        fits = parameter.shape[0] // d.ep % d.efsdp == 0
        return [(0, d.ep, at["ep"]), (ffn, d.etp, at["etp"]), (0 if fits else ffn, d.efsdp, at["efsdp"])]
    if parameter.kind in SMALL:
        return []
    if "vocab" in dims and d.vocab_emb_dp:
        within = d.fsdp * d.cp * d.tp
        return [(0, within, rank % within)]
    cuts = [(dim, d.tp, at["tp"]) for dim, name in enumerate(dims) if name in ("vocab", "heads", "kv_heads")]
    return [*cuts, (0, d.fsdp * d.cp, at["fsdp"] * d.cp + at["cp"])]


def held_indexes(degrees: Degrees, rank: int, parameter: layout.Parameter) -> list[Tensor]:
    """Return, for each dim, the indexes of the whole parameter that a rank of its stage holds."""
    indexes = [torch.arange(size) for size in parameter.shape]
    for dim, parts, which in cuts_of(degrees, rank, parameter):
        chunks = indexes[dim].chunk(parts)
        indexes[dim] = chunks[which] if which < len(chunks) else indexes[dim][:0]
    return indexes


def held_mask(degrees: Degrees, rank: int, parameter: layout.Parameter, model: ModelConfig) -> Tensor:
    """Return which elements of a parameter a rank holds, stages considered."""
    mask = torch.zeros(parameter.shape, dtype=torch.bool)
    if coordinates(degrees, rank, is_expert=False)["pp"] in stages_of(parameter, model, degrees.pp):
        grids = torch.meshgrid(*held_indexes(degrees, rank, parameter), indexing="ij")
        mask[tuple(grids)] = True
    return mask
