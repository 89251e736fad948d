"""Readers, loading, digest and comparison."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import TINY, Altered, mixtral, models, random
from torch import nn

from ostro.errors import WeightsError
from ostro.model import layout
from ostro.model.mixtral import Mixtral
from ostro.weights import ModuleReader, RandomReader, compare, digest, load_into
from ostro.weights.store import assemble, cast, pieces, require_finite

W13 = "model.layers.1.block_sparse_moe.experts.w13"
EMBEDDING = "model.embed_tokens.weight"


@st.composite
def slices(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int | slice, ...]:
    where = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        start = draw(st.integers(0, size - 1))
        stop = draw(st.integers(start, size))
        step = draw(st.sampled_from([None, 1, 2]))
        where.append(draw(st.sampled_from([start, start - size, slice(start, stop, step), slice(None)])))
    return tuple(where)


@settings(max_examples=60)
@given(st.data())
def test_a_slice_of_random_weights_equals_the_same_slice_of_the_whole(data: st.DataObject) -> None:
    reader = random(data.draw(models()), seed=3)
    parameter = data.draw(st.sampled_from(list(layout.parameters(reader.model))))
    where = data.draw(slices(parameter.shape))
    whole = reader.read(parameter.name)
    assert tuple(whole.shape) == parameter.shape
    assert torch.equal(reader.read(parameter.name, where), whole[where])


def test_random_rows_beyond_one_block_equal_those_drawn_alone() -> None:
    config = dataclasses.replace(TINY, vocab_size=9000, hidden_size=100)
    whole = random(config).read(EMBEDDING)
    for row in (0, 2047, 2048, 2049, 4095, 4096, 8999):
        assert torch.equal(random(config).read(EMBEDDING, (row,)), whole[row])
    assert torch.equal(random(config).read(EMBEDDING, (slice(2000, 5000),)), whole[2000:5000])


def test_random_weights_are_normal_and_independent() -> None:
    config = dataclasses.replace(TINY, vocab_size=5000, hidden_size=200, initializer_range=0.02)
    x = random(config).read(EMBEDDING).double() / 0.02
    assert abs(x.mean()) < 0.004
    assert abs(x.std() - 1) < 0.003
    assert abs((x**4).mean() - 3) < 0.03
    assert 4.5 < x.abs().max() < 7
    assert abs((x[:, :100] * x[:, 100:]).mean()) < 0.005  # the two of a Box–Muller pair
    assert abs((x[1:] * x[:-1]).mean()) < 0.004  # neighbouring rows


def test_random_weights_differ_by_seed_name_expert_and_half() -> None:
    drawn = [
        random().read(W13, (0, 0)),
        random().read(W13, (0, 1)),
        random().read(W13, (1, 0)),
        random(seed=1).read(W13, (0, 0)),
        random().read(W13.replace(".1.", ".0."), (0, 0)),
    ]
    firsts = [tensor[0, 0].item() for tensor in drawn]
    assert len(set(firsts)) == len(firsts)
    assert torch.equal(random().read("model.norm.weight"), torch.ones(16))


def test_random_weights_follow_their_rule_and_never_change() -> None:
    """A run that is repeated with another version of Ostro starts from the same weights."""
    drawn = random(seed=7).read(W13, (2, 1, 4))
    key = int.from_bytes(hashlib.sha256(f"7/{W13}/2/1".encode()).digest()[:16], "little")
    # A row of up to 64 values takes 32 draws of 64 bits, which are 8 counts.
    draws = [int(bits) for bits in np.random.Philox(key=key, counter=4 * 8).random_raw(len(drawn))]
    radius = [0.3 * math.sqrt(-2 * math.log(((bits >> 16) + 1) / 2**48)) for bits in draws]
    angle = [2 * math.pi * ((bits & 0xFFFF) + 0.5) / 2**16 for bits in draws]
    expected = torch.tensor([r * math.cos(a) for r, a in zip(radius, angle, strict=True)])
    torch.testing.assert_close(drawn, expected, rtol=1e-6, atol=0)
    recorded = torch.tensor([-0.1954864263534546, 0.2254994511604309, -0.41179725527763367])
    torch.testing.assert_close(drawn[:3], recorded, rtol=1e-6, atol=0)


@settings(max_examples=10)
@given(models())
def test_a_loaded_module_reads_as_what_it_was_loaded_from(config) -> None:
    reader = random(config)
    back = ModuleReader(mixtral(reader), config)
    assert digest(back) == digest(reader)
    assert list(back.names()) == list(layout.table(config))


def test_a_module_reader_casts() -> None:
    model = mixtral(random())
    back = ModuleReader(model, TINY, torch.bfloat16)
    assert {info.dtype for info in back.names().values()} == {torch.bfloat16}
    assert torch.equal(back.read(W13, (1, 0)), random().read(W13, (1, 0)).bfloat16())


def test_loading_casts_into_the_parameters_dtype() -> None:
    model = mixtral(random(), torch.bfloat16)
    assert torch.equal(model.get_parameter(EMBEDDING), random().read(EMBEDDING).bfloat16())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_hidden_layers": 1}, "holds 9 tensors that the model does not have, first model.layers.1."),
        ({"num_hidden_layers": 3}, "lacks 9 of the model's 30 tensors, first model.layers.2.input_layernorm"),
        (
            {"vocab_size": 50},
            "embed_tokens.weight with shape 48×16 where the model has 50×16 (2 tensors differ)",
        ),
        ({"tie_word_embeddings": True}, "holds 1 tensor that the model does not have, first lm_head.weight"),
    ],
)
def test_loading_refuses_weights_of_another_model(change: dict, sentence: str) -> None:
    module = Mixtral(dataclasses.replace(TINY, **change))
    with pytest.raises(WeightsError) as caught:
        load_into(module, random())
    assert sentence in str(caught.value)


def test_a_module_that_is_no_mixtral_is_refused() -> None:
    with pytest.raises(WeightsError, match="none of the model's 21 tensors; its first is weight"):
        ModuleReader(nn.Linear(2, 2), TINY)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_loading_refuses_what_is_not_finite(value: float, word: str) -> None:
    def spoil(name, where, tensor):
        if name == W13 and where == (2, 0):
            tensor[4, 1:4] = value
        return tensor

    with pytest.raises(WeightsError) as caught:
        mixtral(Altered(random(), spoil))
    assert str(caught.value).startswith(f"{W13}[2, 0] holds {word} in 3 of 160 values: ")


def test_large_finite_values_are_not_taken_for_infinity() -> None:
    require_finite(torch.full((1000,), 3e38), "x")
    require_finite(torch.full((1000,), 65504.0, dtype=torch.float16), "x")


def test_a_cast_that_would_overflow_is_refused() -> None:
    assert cast(torch.tensor([6e4, 1e-3]), torch.float16, "x").dtype == torch.float16
    with pytest.raises(WeightsError, match=r"x has 2 of 3 values that float16 cannot hold \(the largest is 9e\+04\)"):
        cast(torch.tensor([7e4, -9e4, 1.0]), torch.float16, "x")


def test_the_digest_sees_a_single_bit_and_the_dtype() -> None:
    def flip(name, where, tensor):
        if name == W13 and where == (1, 1):
            tensor.view(torch.int32)[3, 3] ^= 1
        return tensor

    plain = digest(random())
    assert digest(Altered(random(), lambda name, where, tensor: tensor)) == plain
    assert digest(Altered(random(), flip)) != plain
    assert digest(ModuleReader(mixtral(random()), TINY, torch.bfloat16)) != plain


def test_comparing_equal_weights() -> None:
    rows = compare(random(), ModuleReader(mixtral(random()), TINY))
    assert [row.kind for row in rows] == [kind.name for kind in layout.KINDS]
    assert all(row.equal_bits and row.max_absolute == row.max_relative == 0 for row in rows)
    assert [row.num_tensors for row in rows] == [1, *[2] * 9, 1, 1]


def test_comparing_finds_the_kind_that_differs() -> None:
    def shift(name, where, tensor):
        if name == W13 and where == (2, 1):
            tensor[0, 0] += 0.5
        return tensor

    rows = {row.kind: row for row in compare(Altered(random(), shift), random())}
    row = rows.pop(layout.W13.name)
    largest = random().read(W13, (2, 1)).abs().max().item()
    assert row.max_absolute == pytest.approx(0.5, rel=1e-5)
    assert row.max_relative == pytest.approx(0.5 / largest, rel=1e-5)
    assert not row.equal_bits
    assert all(other.equal_bits for other in rows.values())


def test_comparing_does_not_lose_nan_nor_a_lower_precision() -> None:
    def spoil(name, where, tensor):
        return tensor.fill_(float("nan")) if name == "model.norm.weight" else tensor

    rows = {row.kind: row for row in compare(random(), Altered(random(), spoil))}
    assert rows["model.norm.weight"].max_absolute == float("inf")
    rounded = ModuleReader(mixtral(random()), TINY, torch.bfloat16)
    row = compare(rounded, random())[0]
    assert not row.equal_bits
    assert 0 < row.max_relative < 2**-8


def test_comparing_different_models_is_refused() -> None:
    other = RandomReader(dataclasses.replace(TINY, rope_theta=1e4))
    with pytest.raises(WeightsError, match=r"rope_theta is 1000000\.0 in the first and 10000\.0 in the second"):
        compare(random(), other)
    assert compare(random(), RandomReader(dataclasses.replace(TINY, max_position_embeddings=1)))


def test_assembling_asks_only_for_the_pieces_named() -> None:
    asked = []

    def piece(stack, rest):
        asked.append(stack)
        return torch.full((2, 3), 10.0 * stack[0] + stack[1])[rest]

    assert assemble((4, 2), (2, 1, 0), piece).tolist() == [21.0] * 3
    assert asked == [(2, 1)]
    assert assemble((4, 2), (slice(1, 3), 0), piece)[:, 0, 0].tolist() == [10.0, 20.0]
    assert assemble((4, 2), (), piece).shape == (4, 2, 2, 3)
    assert assemble((4, 2), (slice(3, 3),), piece).shape == (0, 2, 2, 3)


def test_the_pieces_of_a_parameter_cover_it_once() -> None:
    for parameter in layout.parameters(TINY):
        seen = torch.zeros(parameter.shape)
        for where in pieces(parameter):
            seen[where] += 1
        assert torch.equal(seen, torch.ones(parameter.shape))
