"""Training checkpoints: exact, whole or absent, and never a way to run someone's code."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from checkpoints import load, save
from disk import on_a_full_disk
from small_models import TINY, random
from torch import Tensor
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata

from ostro.errors import OutOfMemory, WeightsError
from ostro.weights import convert, dcp, detect, digest, open_reader

STATE = {"step": 3, "model": TINY.as_fields(), "data": {"epoch": 1, "row": 17}, "rng": [1, 2**63], "lr": 0.1}


def tensors(fill: bool = True) -> dict[str, Tensor]:
    """Return what a run keeps: weights, optimizer state, scalars, several dtypes, one a view."""
    names = random().names()
    found = {f"model.{name}": random().read(name) for name in names}
    found |= {f"optim.{name}": random(seed=1).read(name).bfloat16() for name in names}
    found |= {
        "rng": torch.arange(9, dtype=torch.uint8),
        "count": torch.tensor(5),
        "view": torch.rand(6, 4)[::2],
    }
    return found if fill else {name: torch.full_like(tensor, 1) for name, tensor in found.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "step-00000003"
    save(folder, tensors(), STATE)
    return folder


@pytest.fixture
def saved(written: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return Path(shutil.copytree(written, tmp_path / "checkpoints" / "step-00000003"))


def refusal(folder: Path) -> str:
    """Return what both ways into a checkpoint say about it."""
    messages = []
    for enter in (lambda: load(folder, tensors(False)), lambda: digest(open_reader(folder))):
        with pytest.raises(WeightsError) as caught:
            enter()
        messages.append(str(caught.value))
    assert messages[0].endswith(".")
    assert "\n" not in messages[0]
    return messages[0]


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    kept = tensors()
    save(tmp_path / "step-00000003", kept, STATE)
    assert entries(tmp_path) == ["step-00000003"]
    filled = tensors(False)
    places = {name: tensor.data_ptr() for name, tensor in filled.items()}
    assert load(tmp_path / "step-00000003", filled) == STATE
    for name, tensor in kept.items():
        assert torch.equal(filled[name], tensor), name
        assert filled[name].data_ptr() == places[name]
    assert not [warning for warning in recwarn if "distributed" in str(warning.message)]


def test_parameters_are_filled_in_place(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    save(tmp_path / "step-00000001", {"weight": layer.weight, "bias": layer.bias}, {})
    other = torch.nn.Linear(3, 2)
    load(tmp_path / "step-00000001", {"weight": other.weight, "bias": other.bias})
    assert torch.equal(other.weight, layer.weight)
    assert other.weight.requires_grad


def test_saving_again_replaces_the_checkpoint(saved: Path) -> None:
    save(saved, {"a": torch.ones(2)}, {"step": 4})
    assert load(saved, {"a": torch.zeros(2)}) == {"step": 4}
    assert entries(saved.parent) == [saved.name]


def test_saving_never_replaces_something_else(tmp_path: Path) -> None:
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "mine.txt").write_text("precious")
    for write in (
        lambda: save(tmp_path / "step-00000001", {"a": torch.ones(2)}, {}),
        lambda: convert(random(), tmp_path / "step-00000001", to="dcp"),
    ):
        with pytest.raises(WeightsError, match="exists and is not empty"):
            write()
    assert (tmp_path / "step-00000001" / "mine.txt").read_text() == "precious"
    convert(random(), tmp_path / "model", to="dcp")
    with pytest.raises(WeightsError, match="exists and is not empty"):
        convert(random(seed=1), tmp_path / "model", to="dcp")
    assert digest(open_reader(tmp_path / "model")) == digest(random())


# Which one is taken


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    run = tmp_path / "run"
    directory = run / "checkpoints"
    assert dcp.latest(directory) is None
    for step in (5, 40, 123456789):
        save(dcp.step_folder(directory, step), {"a": torch.ones(1)}, {"step": step})
    assert entries(directory) == ["step-00000005", "step-00000040", "step-123456789"]
    assert dcp.latest(directory) == directory / "step-123456789"
    (directory / "step-123456789" / ".metadata").unlink()
    assert dcp.latest(directory) == directory / "step-00000040"
    (directory / "step-00000040" / "state.json").unlink()
    assert dcp.latest(directory) == dcp.find(run) == dcp.find(directory) == directory / "step-00000005"
    (directory / "step-00000005").rename(directory / "step-00000005.partial-0a1b2c3d")
    assert dcp.latest(directory) is None
    assert dcp.find(directory / "step-00000005.partial-0a1b2c3d") is None


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/step-00000003"])
def test_a_run_can_be_given_in_three_ways(saved: Path, inside: str) -> None:
    reader = open_reader(saved.parents[1] / inside)
    assert (reader.format, reader.model) == ("dcp", TINY)
    assert digest(reader) == digest(random())


def test_a_save_that_was_killed_is_never_taken(saved: Path) -> None:
    newer = saved.with_name("step-00000004.partial-00000000")
    shutil.copytree(saved, newer)
    assert dcp.find(saved.parents[1]) == saved
    shutil.rmtree(saved)
    assert detect(saved.parents[1]) == "dcp"
    for path in (saved.parents[1], saved.parent, newer):
        with pytest.raises(WeightsError, match="holds no whole training checkpoint"):
            open_reader(path)
    with pytest.raises(WeightsError, match="is not a whole checkpoint"):
        load(newer, tensors(False))


def test_pruning_keeps_the_newest_and_clears_what_was_interrupted(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(dcp.step_folder(tmp_path, step), {"a": torch.ones(1)}, {"step": step})
    (tmp_path / "step-00000011.partial-12345678").mkdir()
    (tmp_path / "step-00000001.partial-old").mkdir()
    (tmp_path / "notes").mkdir()
    dcp.prune(tmp_path, 2)
    assert entries(tmp_path) == ["notes", "step-00000003", "step-00000010"]
    dcp.prune(tmp_path, 5)
    assert len(entries(tmp_path)) == 3


# Disk full


def test_a_disk_that_fills_up_leaves_the_old_checkpoint(saved: Path) -> None:
    for limit in (2, 9000):  # in state.json, in the tensors
        kind, message = on_a_full_disk(limit, save, saved.with_name("step-00000004"), tensors(), STATE)
        assert (kind, "could not be written whole" in message) == ("OutOfMemory", True), message
        assert entries(saved.parent) == [saved.name]
    assert load(saved, tensors(False)) == STATE


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutOfMemory, match="free some space"):
        save(tmp_path / "checkpoints" / "step-00000001", tensors(), STATE)
    assert entries(tmp_path) == []


# What does not fit or is damaged


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"extra": torch.ones(1)}, "lacks 1 of the model's 46 tensors, first extra"),
        ({"count": None}, "holds 1 tensor that the model does not have, first count"),
        ({"count": torch.ones(2)}, "holds count with shape scalar where the model has 2"),
        ({"count": torch.tensor(5.0)}, "holds count as torch.int64, the run has it as torch.float32"),
    ],
)
def test_resuming_is_exact_or_an_error(written: Path, change: dict, sentence: str) -> None:
    wanted = {name: tensor for name, tensor in (tensors(False) | change).items() if tensor is not None}
    with pytest.raises(WeightsError) as caught:
        load(written, wanted)
    assert sentence in str(caught.value)
    assert "resume with the settings it was saved with." in str(caught.value)


def test_a_truncated_file(saved: Path) -> None:
    file = saved / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    assert "__0_0.distcp is truncated: " in refusal(saved)
    file.unlink()
    assert "lacks __0_0.distcp, which holds" in refusal(saved)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_file_of_noise(saved: Path) -> None:
    file = saved / "__0_0.distcp"
    file.write_bytes(b"\x80\x04noise" * (file.stat().st_size // 7 + 1))
    assert "cannot be read" in refusal(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_state_that_is_none(saved: Path, content: bytes) -> None:
    (saved / "state.json").write_bytes(content)
    assert "state.json" in refusal(saved)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (None, "does not say what model it is of"),
        ({"vocab": 3}, "model.vocab is not a setting of the model"),
        ({**TINY.as_fields(), "sliding_window": "wide"}, "state.json: "),
        ({**TINY.as_fields(), "num_hidden_layers": 10**12}, "holds 2 layers, its configuration says"),
        (
            {**TINY.as_fields(), "vocab_size": 49},
            "embed_tokens.weight with shape 48×16 where the model has 49×16",
        ),
    ],
)
def test_a_state_that_contradicts_the_tensors(saved: Path, model: object, sentence: str) -> None:
    (saved / "state.json").write_text(json.dumps(STATE | {"model": model}))
    with pytest.raises(WeightsError) as caught:
        open_reader(saved)
    assert sentence in str(caught.value)


# Code in .metadata


class Runs:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


RAN: list[str] = []
BOMB = Runs(exec, f"import {__name__} as here; here.RAN.append('x')")


@pytest.fixture
def armed() -> Iterator[None]:
    """Prove that the bomb goes off where nothing holds it back, then that it did not in the test."""
    RAN.clear()
    pickle.loads(pickle.dumps(BOMB))
    assert RAN == ["x"]
    RAN.clear()
    yield
    assert RAN == []


@pytest.mark.usefixtures("armed")
@pytest.mark.parametrize(
    "attack",
    [BOMB, Runs(getattr, str, "join"), Runs(torch.load, "x"), Runs(torch.Tensor), Runs(Path, "x")],
    ids=lambda attack: attack.call[0].__name__,
)
def test_no_code_in_the_metadata_is_run(saved: Path, attack: Runs) -> None:
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.planner_data = attack
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "which no checkpoint needs: it may be an attack; do not use the file." in refusal(saved)


@pytest.mark.usefixtures("armed")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_no_code_in_the_tensors_is_run(saved: Path) -> None:
    file = saved / "__0_0.distcp"
    num_bytes = file.stat().st_size
    torch.save(BOMB, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes().ljust(num_bytes, b"\0"))
    assert "cannot be read" in refusal(saved)


def test_attributes_of_what_is_allowed_are_not(saved: Path) -> None:
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.planner_data = Runs(getattr, torch.Size, "__subclasses__")
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    assert ".metadata cannot be read (KeyError: '__subclasses__')" in refusal(saved)


def test_metadata_of_early_python_3_11_is_read(saved: Path) -> None:
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.planner_data = Runs(getattr, _MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST")  # its way with an enum
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    assert load(saved, tensors(False)) == STATE


@pytest.mark.parametrize("content", [b"", b"noise", b"\x80\x04", pickle.dumps([1, 2]), pickle.dumps({"a": 1})])
def test_metadata_that_is_none(saved: Path, content: bytes) -> None:
    (saved / ".metadata").write_bytes(content)
    assert ".metadata cannot be read" in refusal(saved)


def test_entries_that_would_be_unpickled_are_refused(saved: Path) -> None:
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.state_dict_metadata["count"] = BytesStorageMetadata()
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "holds count, which is not a tensor" in refusal(saved)


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_checkpoint_of_objects_is_refused(tmp_path: Path) -> None:
    torch_dcp.save({"a": torch.ones(2), "b": {"c": object}}, checkpoint_id=tmp_path / "step-00000001", no_dist=True)
    (tmp_path / "step-00000001" / "state.json").write_text("{}")
    with pytest.raises(WeightsError, match="which is not a tensor"):
        load(tmp_path / "step-00000001", {"a": torch.zeros(2)})


@pytest.mark.parametrize("field", ["relative_path", "transform_descriptors", "offset"])
def test_metadata_that_points_elsewhere_is_refused(saved: Path, field: str) -> None:
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        setattr(info, field, {"relative_path": "../x", "transform_descriptors": ["zstd"], "offset": -9}[field])
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    expected = "from byte -9 on" if field == "offset" else "Ostro did not write it"
    assert expected in refusal(saved)


def test_a_tensor_of_which_a_part_is_missing_is_refused(saved: Path) -> None:
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    metadata.state_dict_metadata["model.lm_head.weight"].chunks.pop()
    (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "holds only a part of model.lm_head.weight" in refusal(saved)
