"""Rank arithmetic: what is parsed, refused and cut, against torch.chunk and DTensor's own rule."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layouts import SMALL, cuts_of, degrees, held_mask, models_for, stages_of

from ostro.degrees import Degrees, host_ranks, parse, stage_of
from ostro.errors import LayoutError
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights.mindspore_layout import MindSporeDegrees

MODEL = ModelConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_local_experts=6,
)


def refusal(text: str, kind: type = Degrees) -> str:
    with pytest.raises(LayoutError) as caught:
        parse(text, kind)
    assert caught.value.exit_code == 2
    return str(caught.value)


# What is written on a command line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dp=8,ep=8,pp=2", Degrees(dp=8, ep=8, pp=2)),
        ("mp=4", Degrees(tp=4)),
        (" fsdp = 16 , cp=2,etp=1 ", Degrees(fsdp=16, cp=2)),
        ("dp=1", Degrees()),
    ],
)
def test_a_layout_is_read(text: str, expected: Degrees) -> None:
    assert parse(text, Degrees) == expected


def test_the_words_of_mindspore_are_its_own() -> None:
    assert parse("dp=8,mp=2,ep=4,pp=2,opt=1,vocab=1", MindSporeDegrees) == MindSporeDegrees(8, 2, 4, 2, 1, 1)
    assert "'fsdp' is no degree here; known: dp, tp, ep, pp, opt, vocab." in refusal("fsdp=2", MindSporeDegrees)
    assert "'opt' is no degree here; known: dp, fsdp, tp, ep, pp, cp, etp, vocab_emb_dp." in refusal("dp=2,opt=1")


def test_a_word_that_is_almost_one_is_named() -> None:
    message = refusal("fsp=4")
    assert message.startswith("layout 'fsp=4': 'fsp' is no degree here; known: ")
    assert message.endswith("Did you mean 'fsdp'?")


@pytest.mark.parametrize("part", ["dp=0", "dp=-1", "dp=1.5", "dp=", "dp", "dp=two", "dp=²", "dp=٣", "dp=1=2"])
def test_a_degree_is_a_number_of_at_least_one(part: str) -> None:
    assert f"'{part}' must be one name=number of at least 1" in refusal(f"ep=2,{part}")


@pytest.mark.parametrize("text", ["dp=2,dp=4", "tp=2,mp=2"])
def test_a_degree_is_given_once(text: str) -> None:
    assert f"{text.split(',')[1]!r} must be one name=number" in refusal(text)


@pytest.mark.parametrize("text", ["", ",", "dp=2,", "dp=2,,ep=2"])
def test_an_empty_part_is_no_degree(text: str) -> None:
    assert "'' is no degree here" in refusal(text)


# Hosts and stages


@given(st.integers(1, 6), st.integers(1, 8))
def test_hosts_share_the_ranks_in_their_order(each: int, num_hosts: int) -> None:
    ranges = [host_ranks(each * num_hosts, host, num_hosts) for host in range(num_hosts)]
    assert [rank for ranks in ranges for rank in ranks] == list(range(each * num_hosts))
    assert {len(ranks) for ranks in ranges} == {each}


@pytest.mark.parametrize("host", [-1, 2, 3])
def test_a_host_that_is_none(host: int) -> None:
    with pytest.raises(LayoutError, match=f"host {host}/2: hosts are counted from 0 to 1"):
        host_ranks(8, host, 2)


def test_hosts_that_cannot_share_evenly() -> None:
    with pytest.raises(LayoutError, match="8 ranks cannot be shared evenly by 3 hosts: use a number that divides"):
        host_ranks(8, 0, 3)


@given(st.integers(1, 6), st.integers(1, 5))
def test_stages_have_equally_many_layers_in_order(each: int, num_stages: int) -> None:
    stages = [stage_of(layer, each * num_stages, num_stages) for layer in range(each * num_stages)]
    assert stages == [stage for stage in range(num_stages) for _ in range(each)]


# What fits a model


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (Degrees(tp=8), "tp=8 does not divide num_key_value_heads=4: use tp 1, 2, 4."),
        (Degrees(fsdp=4, ep=4), "ep=4 does not divide num_local_experts=6: use ep 1, 2, 3, 6."),
        (Degrees(pp=4), "pp=4 does not divide num_hidden_layers=6: use pp 1, 2, 3, 6."),
        (Degrees(fsdp=2, ep=4), "ep·etp=4 does not divide fsdp·cp·tp=2: experts lie within these; change one."),
        (Degrees(tp=2, ep=2, etp=2), "ep·etp=4 does not divide fsdp·cp·tp=2"),
        (Degrees(tp=4, etp=2), "etp=2 must be 1 or tp=4."),
    ],
)
def test_degrees_that_do_not_fit(wrong: Degrees, sentence: str) -> None:
    with pytest.raises(LayoutError) as caught:
        wrong.check(MODEL)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("change", "setting"), [({"vocab_size": 49}, "vocab_size=49"), ({"intermediate_size": 13}, "intermediate_size=13")]
)
def test_what_tp_cuts_must_be_divisible(change: dict[str, int], setting: str) -> None:
    model = dataclasses.replace(MODEL, **change)
    with pytest.raises(LayoutError, match=f"tp=4 does not divide {setting}"):
        Degrees(tp=4, etp=4).check(model)


@pytest.mark.parametrize("fitting", [Degrees(), Degrees(tp=4, etp=4, ep=3, fsdp=3), Degrees(dp=5, fsdp=2, cp=3, pp=3)])
def test_degrees_that_fit(fitting: Degrees) -> None:
    fitting.check(MODEL)
    assert fitting.num_ranks == fitting.pp * fitting.dp * fitting.efsdp * fitting.ep * fitting.etp


# Whose part is which


RAGGED = Degrees(fsdp=4, tp=2, ep=2, etp=2, dp=2, pp=2)


@settings(max_examples=50)
@given(st.data())
def test_the_boxes_of_a_stage_cover_a_parameter_as_often_as_it_is_replicated(data: st.DataObject) -> None:
    d = data.draw(degrees())
    model = data.draw(models_for(d))
    d.check(model)
    for parameter in layout.parameters(model):
        stages = stages_of(parameter, model, d.pp)
        stage = stages[0] if len(stages) == 1 else None
        times = torch.zeros(parameter.shape, dtype=torch.int64)
        held: dict[object, int] = {}
        for rank in range(d.num_ranks):
            box = d.box(rank, parameter.kind.dims, parameter.shape, stage)
            if box is not None:
                held[box] = held.get(box, 0) + 1
                times[tuple(slice(start, start + size) for start, size in zip(*box, strict=True))] += 1
        replicas = d.num_ranks // d.pp if parameter.kind in SMALL else d.dp
        replicas *= d.pp if stage is None else 1
        assert set(held.values()) == {replicas}, parameter.name
        assert torch.equal(times, torch.full_like(times, replicas)), parameter.name


@settings(max_examples=50)
@given(st.data())
def test_a_box_is_what_chunking_in_turn_leaves(data: st.DataObject) -> None:
    d = data.draw(degrees())
    model = data.draw(models_for(d))
    ranks = data.draw(st.lists(st.integers(0, d.num_ranks - 1), min_size=1, max_size=3, unique=True))
    for parameter in layout.parameters(model):
        for rank in ranks:
            mask = torch.zeros(parameter.shape, dtype=torch.bool)
            for stage in stages_of(parameter, model, d.pp):
                box = d.box(rank, parameter.kind.dims, parameter.shape, stage)
                if box is not None:
                    mask[tuple(slice(start, start + size) for start, size in zip(*box, strict=True))] = True
            assert torch.equal(mask, held_mask(d, rank, parameter, model)), (parameter.name, rank)


@settings(max_examples=40)
@given(st.data())
@example(None)
def test_a_box_is_dtensors_own(data: st.DataObject | None) -> None:
    """Against torch.distributed.tensor: tp, ep and etp cut first, FSDP2 cuts what they leave."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as theirs
    from torch.distributed.tensor.placement_types import _StridedShard

    d = RAGGED if data is None else data.draw(degrees())
    model = dataclasses.replace(MODEL, vocab_size=50) if data is None else data.draw(models_for(d))
    rank = d.num_ranks - 1 if data is None else data.draw(st.integers(0, d.num_ranks - 1))
    for parameter in layout.parameters(model):
        stage = stages_of(parameter, model, d.pp)[0]
        own_stage = rank * d.pp // d.num_ranks
        if parameter.kind in SMALL:
            continue
        *inner, (dim, parts, at) = cuts_of(d, rank, parameter)
        split = next((n for other, n, _ in inner if other == dim), 1)
        fsdp = _StridedShard(dim, split_factor=split) if split > 1 else Shard(dim)
        mesh, place = (parts, *(n for _, n, _ in inner)), [at, *(i for _, _, i in inner)]
        sizes, offsets = theirs(parameter.shape, mesh, place, (fsdp, *(Shard(other) for other, _, _ in inner)))
        box = d.box(rank, parameter.kind.dims, parameter.shape, stage)
        expected = (tuple(offsets), tuple(sizes)) if all(sizes) and stage == own_stage else None
        assert box == expected, parameter.name
