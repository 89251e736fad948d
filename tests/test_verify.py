"""The verb verify: whether two checkpoints hold the same model, value by value and by what they compute."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ostro import verify, weights
from ostro.cli import main
from ostro.model import layout
from ostro.model.mixtral import Mixtral
from ostro.model.settings import ModelConfig
from ostro.model.spans import spans_of
from ostro.weights import FORMATS, RandomReader, Reader, Where, convert

SMALL = ModelConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=10,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=3,
    initializer_range=0.3,
)
WRITABLE = [name for name, format in FORMATS.items() if format.write]


class Altered:
    """A reader whose tensors pass through `alter(name, where, tensor)`."""

    format, notes = "altered", ()

    def __init__(self, source: Reader, alter: Callable[[str, Where, Tensor], Tensor]) -> None:
        self.model = source.model
        self._source, self._alter = source, alter

    def names(self) -> Any:
        return self._source.names()

    def read(self, name: str, where: Where = ()) -> Tensor:
        return self._alter(name, where, self._source.read(name, where).clone())


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "a bug of Ostro's" not in captured.err
    return code, captured.out, " ".join(captured.err.split())


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model without a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    convert(RandomReader(SMALL), folder, to="hf")
    return folder


def changed(folder: Path, name: str, amount: float, to: str = "hf") -> Path:
    """Write the small model with one value changed."""

    def alter(found: str, where: Where, tensor: Tensor) -> Tensor:
        first = where[0] if where else 0
        if found == name and (first.start if isinstance(first, slice) else first) == 0:
            tensor[(0,) * tensor.dim()] += amount
        return tensor

    convert(Altered(RandomReader(SMALL), alter), folder, to=to)
    return folder


@pytest.mark.parametrize("to", WRITABLE)
def test_the_same_model_in_two_formats(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path, to: str) -> None:
    convert(hf, tmp_path / "x", to=to)
    code, out, err = run(capsys, "verify", hf, tmp_path / "x")
    assert (code, err) == (0, "")
    assert "differs" not in out
    assert "logits differ by 0" in out
    rows = [line.split() for line in out.splitlines() if line.endswith("equal")]
    assert [row[0] for row in rows] == [kind.name for kind in layout.KINDS]


@pytest.mark.parametrize("kind", layout.KINDS, ids=lambda kind: kind.name.rpartition("layer}.")[2])
def test_one_value_that_differs_is_found(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path, kind: layout.Kind
) -> None:
    other = changed(tmp_path / "x", kind.name.format(layer=1), 0.5)
    code, out, err = run(capsys, "verify", hf, other)
    assert code == 5
    assert "do not hold the same values" in err
    (row,) = (line for line in out.splitlines() if "differs by" in line)
    assert row.split()[0] == kind.name
    assert "differs by 0.5 " in row
    (gap,) = re.findall(r"logits differ by (\S+)", out)
    assert float(gap) > 0 or kind is layout.EMBEDDING  # its first token need not be among those computed


def test_other_models_cannot_be_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    convert(RandomReader(dataclasses.replace(SMALL, rope_theta=1e4)), tmp_path / "x", to="hf")
    code, _, err = run(capsys, "verify", hf, tmp_path / "x")
    assert code == 5
    assert "rope_theta is 1000000.0 in the first and 10000.0 in the second" in err


def test_a_file_without_a_configuration_is_compared_with_a_model_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path
) -> None:
    convert(hf, tmp_path / "x.ckpt", to="mindspore")
    assert run(capsys, "verify", hf, tmp_path / "x.ckpt", "--model", hf / "config.json")[0] == 0
    code, _, err = run(capsys, "verify", hf, tmp_path / "x.ckpt")
    assert code == 5
    assert "--model" in err


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_logits_layer_by_layer_are_those_of_the_whole_model(is_tied: bool, window: int | None) -> None:
    config = dataclasses.replace(SMALL, num_hidden_layers=3, tie_word_embeddings=is_tied, sliding_window=window)
    whole = Mixtral(config)
    weights.load_into(whole, RandomReader(config))
    tokens_T = torch.randint(48, (20,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = whole.logits(whole(tokens_T, spans_of([20])))
    found = verify.logits(RandomReader(config), tokens_T)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.abs().max().item())
