"""What every format promises, for each one in `FORMATS`; a new one is picked up by itself."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import TINY, models, random

from ostro.errors import WeightsError
from ostro.model import layout
from ostro.weights import FORMATS, ModuleReader, compare, convert, detect, digest, open_reader
from ostro.weights.store import pieces

WRITABLE = [name for name, format in FORMATS.items() if format.write]


@pytest.mark.parametrize("name", WRITABLE)
@settings(max_examples=12)
@given(config=models(), dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]))
def test_what_is_written_reads_the_same(name: str, config, dtype: torch.dtype | None) -> None:
    source = random(config)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        convert(source, path, to=name, dtype=dtype)
        assert name.startswith(detect(path))  # the two of MindSpore's differ in their tensors alone
        reader = open_reader(path)
        assert reader.format == name
        assert dataclasses.replace(reader.model, initializer_range=config.initializer_range) == config
        for parameter in layout.parameters(config):
            info = reader.names()[parameter.name]
            assert (info.shape, info.dtype) == (parameter.shape, dtype or torch.float32)
            expected = source.read(parameter.name).to(info.dtype)
            assert torch.equal(reader.read(parameter.name), expected)
            assert all(torch.equal(reader.read(parameter.name, w), expected[w]) for w in pieces(parameter))
        assert list(reader.names()) == list(layout.table(config))


@pytest.mark.parametrize("second", WRITABLE)
@pytest.mark.parametrize("first", WRITABLE)
def test_going_through_two_formats_changes_nothing(tmp_path: Path, first: str, second: str) -> None:
    convert(random(), tmp_path / "a", to=first)
    convert(tmp_path / "a", tmp_path / "b", to=second)
    convert(tmp_path / "b", tmp_path / "c", to=first)
    assert digest(open_reader(tmp_path / "c")) == digest(random())
    assert all(row.equal_bits for row in compare(open_reader(tmp_path / "b"), random()))


def test_a_format_is_named_by_its_key() -> None:
    assert [format.name for format in FORMATS.values()] == list(FORMATS)
    assert (
        FORMATS["random"].open_reader(TINY, 3).read("lm_head.weight")[0, 0]
        == random(seed=3).read("lm_head.weight")[0, 0]
    )


def test_a_live_model_can_be_exported(tmp_path: Path) -> None:
    from small_models import mixtral

    convert(ModuleReader(mixtral(random()), TINY), tmp_path / "x", to="hf")
    assert digest(open_reader(tmp_path / "x")) == digest(random())


def test_a_path_that_holds_nothing_known(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(WeightsError) as caught:
            open_reader(path)
        message = str(caught.value)
        assert message.startswith(f"{path} holds neither ")
        assert "a Hugging Face checkpoint (config.json with" in message
        assert "nor a " in message
    with pytest.raises(WeightsError, match="absent does not exist"):
        detect(tmp_path / "absent")


@pytest.mark.parametrize("name", ["random", "onnx"])
def test_a_format_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match=f"cannot be written as '{name}': use "):
        convert(random(), tmp_path / "x", to=name)
