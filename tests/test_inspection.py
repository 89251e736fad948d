"""The verb inspect: what a checkpoint holds, by kind, and every way of being unsound."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save
from safetensors.torch import load_file, save_file
from torch import Tensor

from ostro.cli import main
from ostro.config import preset
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights import FORMATS, RandomReader, convert, dcp, open_reader
from ostro.weights.ckpt_file import CkptFile, write_ckpt
from ostro.weights.mindspore_layout import MindSporeDegrees
from ostro.weights.store import TensorInfo
from ostro.weights.stored import StoredReader

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
Q = "model.layers.1.self_attn.q_proj.weight"
W3 = "model.layers.0.block_sparse_moe.experts.2.w3.weight"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "a bug of Ostro's" not in captured.err
    return code, captured.out, " ".join(captured.err.split())


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A small model that may be altered."""
    convert(RandomReader(SMALL), tmp_path / "hf", to="hf")
    return tmp_path / "hf"


def altered(folder: Path, changes: dict[str, Tensor | None]) -> Path:
    """Replace, add or leave out tensors of a Hugging Face folder."""
    file = folder / "model.safetensors"
    held = load_file(file) | changes
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, file, {"format": "pt"})
    return folder


def rows_of(out: str) -> dict[str, list[str]]:
    """Return the words behind each kind's name."""
    names = {kind.name for kind in layout.KINDS}
    return {
        line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()[:1] and line.split()[0] in names
    }


# Sound


@pytest.mark.parametrize("to", WRITABLE)
def test_a_sound_model_of_any_format(capsys: pytest.CaptureFixture[str], tmp_path: Path, to: str) -> None:
    convert(RandomReader(SMALL), tmp_path / "x", to=to)
    code, out, err = run(capsys, tmp_path / "x")
    assert (code, err) == (0, "")
    assert out.startswith(f"{to}, {layout.num_parameters(SMALL):,} parameters in float32, ")
    for name, value in SMALL.as_fields().items():
        if value is not None and name not in ("initializer_range", "max_position_embeddings"):
            assert f"{name}={value}" in out
    rows = rows_of(out)
    assert list(rows) == [kind.name for kind in layout.KINDS]
    for kind, words in rows.items():
        parameters = [p for p in layout.parameters(SMALL) if p.kind.name == kind]
        largest = max(RandomReader(SMALL).read(p.name).abs().max().item() for p in parameters)
        assert words[:4] == [str(len(parameters)), "×", "×".join(map(str, parameters[0].shape)), "float32"]
        num_bytes = sum(math.prod(p.shape) * 4 for p in parameters)
        assert " ".join(words[4:6]) == (f"{num_bytes / 1e3:.1f} kB" if num_bytes >= 1000 else f"{num_bytes} B")
        assert words[6:] == ["largest", f"{largest:.3g}"]


@pytest.mark.parametrize("to", WRITABLE)
def test_its_files_are_listed_with_their_sizes(capsys: pytest.CaptureFixture[str], tmp_path: Path, to: str) -> None:
    convert(RandomReader(SMALL), tmp_path / "x", to=to)
    path = tmp_path / "x"
    files = [file for file in path.rglob("*") if file.suffix in (".safetensors", ".ckpt", ".distcp", ".gguf")]
    assert files
    _, out, _ = run(capsys, path)
    assert f"{len(files)} file" in out
    for file in files:
        assert f"{file.name}  {file.stat().st_size / 1e3:.1f} kB" in out


def test_types_that_are_mixed_are_all_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    convert(RandomReader(SMALL), tmp_path / "x", to="hf", dtype=torch.bfloat16, keep_fp32=True)
    code, out, _ = run(capsys, tmp_path / "x")
    assert code == 0
    assert "parameters in bfloat16 and float32," in out
    rows = rows_of(out)
    assert rows[layout.GATE.name][3] == "float32"
    assert rows[layout.Q.name][3] == "bfloat16"


def test_the_preset_and_the_step_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    convert(RandomReader(preset("tiny")), tmp_path / "x.ckpt", to="mindspore", dtype=torch.bfloat16)
    code, out, _ = run(capsys, tmp_path / "x.ckpt")
    assert code == 0
    assert "sizes are those of tiny" in out
    reader = RandomReader(SMALL)
    tensors = {dcp.WEIGHTS_PREFIX + name: reader.read(name) for name in reader.names()}
    for step in (1, 30):
        folder = dcp.step_folder(tmp_path / "run" / "checkpoints", step)
        save(folder, tensors, {"step": step, "model": SMALL.as_fields()})
    code, out, _ = run(capsys, tmp_path / "run")
    assert code == 0
    assert "step-00000030" in out
    assert "step-00000001" in run(capsys, tmp_path / "run", "--step", 1)[1]


# Unsound


def test_missing_tensors(capsys: pytest.CaptureFixture[str], hf: Path) -> None:
    altered(hf, {Q: None, W3: None})
    code, out, err = run(capsys, hf)
    assert code == 5
    assert "2 of " in err
    assert "missing: " in err
    assert Q in err
    assert W3 in err
    rows = rows_of(out)
    assert rows[layout.Q.name][0] == "1"  # the other layer's is shown
    assert rows[layout.W13.name][0] == "1"
    assert rows[layout.W2.name][0] == "2"
    assert "not whole" in out


def test_extra_tensors(capsys: pytest.CaptureFixture[str], hf: Path) -> None:
    altered(hf, {"model.layers.0.adapter.weight": torch.ones(3), "score.weight": torch.ones(2)})
    code, out, err = run(capsys, hf)
    assert code == 5
    assert "2 of " in err
    assert "not the model's: " in err
    assert "model.layers.0.adapter.weight" in err
    assert "score.weight" in err
    assert list(rows_of(out)) == [kind.name for kind in layout.KINDS]
    assert f"{layout.num_parameters(SMALL):,} parameters" in out


def test_tensors_of_another_shape(capsys: pytest.CaptureFixture[str], hf: Path) -> None:
    altered(hf, {Q: torch.zeros(15, 16)})
    code, out, err = run(capsys, hf)
    assert code == 5
    assert "1 of " in err
    assert "of another shape: " in err
    assert Q in err
    assert rows_of(out)[layout.Q.name][0] == "1"


def test_everything_that_is_wrong_is_said_at_once(capsys: pytest.CaptureFixture[str], hf: Path) -> None:
    spoiled = torch.full((16,), float("nan"))
    altered(hf, {W3: None, "more": torch.ones(3), Q: torch.zeros(1, 1), "model.norm.weight": spoiled})
    code, _, err = run(capsys, hf)
    assert code == 5
    for words in ("are missing", "not the model's: more", "of another shape", "model.norm.weight holds NaN"):
        assert words in err, words


def test_nan_and_infinity_are_counted_by_kind(capsys: pytest.CaptureFixture[str], hf: Path) -> None:
    q, w3 = RandomReader(SMALL).read(Q), torch.full((10, 16), 2.5)
    q[0, :3] = float("nan")
    q[5, 7] = float("inf")
    w3[9, :2] = float("-inf")
    w3[0, 0] = -70.0
    altered(hf, {Q: q, W3: w3})
    code, out, err = run(capsys, hf)
    assert code == 5
    rows = {name: " ".join(words) for name, words in rows_of(out).items()}
    assert rows[layout.Q.name].endswith("3 NaN, 1 infinite")
    assert rows[layout.W13.name].endswith("largest 70 0 NaN, 2 infinite")
    assert sum("NaN" in words for words in rows.values()) == 2
    assert f"{Q} holds NaN or infinity in 4 values." in err
    assert "model.layers.0.block_sparse_moe.experts.w13 holds NaN or infinity in 2 values." in err


def test_quick_reads_no_values(
    capsys: pytest.CaptureFixture[str], hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    altered(hf, {"model.norm.weight": torch.full((16,), float("nan"))})
    convert(RandomReader(SMALL), tmp_path / "dcp", to="dcp")

    def read(*_: Any) -> Tensor:
        raise AssertionError("read")

    assert run(capsys, hf)[0] == 5
    monkeypatch.setattr(StoredReader, "read", read)
    monkeypatch.setattr(dcp.CheckpointReader, "read", read)
    for path in (hf, tmp_path / "dcp"):
        code, out, err = run(capsys, path, "--quick")
        assert (code, err) == (0, "")
        assert list(rows_of(out)) == [kind.name for kind in layout.KINDS]
        assert "largest" not in out
        assert "NaN" not in out
    altered(hf, {Q: None})
    assert run(capsys, hf, "--quick")[0] == 5  # what is missing is seen all the same


def test_a_configuration_of_another_model(capsys: pytest.CaptureFixture[str], hf: Path) -> None:
    fields = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 3}))
    code, _, err = run(capsys, hf)
    assert code == 5
    assert "holds 2 layers, its configuration says num_hidden_layers=3" in err


def test_a_type_that_is_none_of_a_models(capsys: pytest.CaptureFixture[str], hf: Path) -> None:
    altered(hf, {Q: torch.zeros(16, 16, dtype=torch.int32)})
    code, _, err = run(capsys, hf)
    assert code == 5
    assert "int32" in err
    assert Q in err


@pytest.mark.parametrize("damage", ["nowhere", "nothing", "truncated"])
def test_what_cannot_be_opened(capsys: pytest.CaptureFixture[str], hf: Path, tmp_path: Path, damage: str) -> None:
    if damage == "nothing":
        (tmp_path / "nothing").mkdir()
    if damage == "truncated":
        file = hf / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    code, out, err = run(capsys, hf if damage == "truncated" else tmp_path / damage)
    assert code == 5
    assert err.startswith("ostro: ")
    assert {"nowhere": "does not exist", "nothing": "holds neither", "truncated": "model.safetensors"}[damage] in err
    assert out == ""


def test_hints_that_mean_nothing(capsys: pytest.CaptureFixture[str], hf: Path) -> None:
    code, _, err = run(capsys, hf, "--step", 3)
    assert code == 2
    assert "--step" in err
    code, _, err = run(capsys, hf, "--from", "hff")
    assert code == 2
    assert "Did you mean 'hf'?" in err


# MindSpore's ranks and optimizer


def test_one_ranks_file_alone_is_listed_by_its_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = dataclasses.replace(SMALL, num_local_experts=4)
    convert(RandomReader(model), tmp_path / "ranks", to="mindspore", degrees=MindSporeDegrees(dp=2, ep=2))
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "ranks" / "checkpoint" / "rank_1" / "checkpoint_1.ckpt", tmp_path / "alone" / "x.ckpt")
    code, out, err = run(capsys, tmp_path / "alone" / "x.ckpt")
    assert code == 5
    assert err.startswith("ostro: ")
    assert "x.ckpt" in err
    assert "1 file" in out.splitlines()[0]
    assert "could not be opened as a model" in out.splitlines()[0]
    patterns = {line.split()[0]: line.split()[1:4] for line in out.splitlines() if " × " in line}
    assert patterns["model.layers.N.attention.wq.weight"] == ["2", "×", "16×16"]
    assert patterns["model.layers.N.feed_forward.ffn.w1.weight"] == ["2", "×", "2×10×16"]  # half of the experts
    assert patterns["model.norm_out.weight"] == ["1", "×", "16"]
    assert run(capsys, tmp_path / "ranks")[0] == 0


def with_optimizer(path: Path) -> None:
    """Write a MindSpore checkpoint as training leaves it: weights, both moments, and scalars."""
    convert(RandomReader(SMALL), path.with_name("plain.ckpt"), to="mindspore")
    held = CkptFile(path.with_name("plain.ckpt"))
    tensors = {name: held.tensor(name).clone() for name in held.infos}
    tensors |= {f"{moment}.{name}": tensor * 0.1 for moment in ("adam_m", "adam_v") for name, tensor in tensors.items()}
    tensors["global_step"] = torch.tensor([7], dtype=torch.int32)

    def parts(name: str) -> Iterable[Tensor]:
        return [tensors[name]]

    write_ckpt(path, {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}, parts)


def test_the_optimizer_is_beside_the_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    with_optimizer(tmp_path / "x.ckpt")
    code, out, err = run(capsys, tmp_path / "x.ckpt", "--model", hf / "config.json")
    assert (code, err) == (0, "")
    assert f"{layout.num_parameters(SMALL):,} parameters" in out
    model, _, beside = out.partition("beside the model:\n")
    assert list(rows_of(model)) == [kind.name for kind in layout.KINDS]
    assert "adam" not in model
    patterns = {line.split()[0]: line.split()[1:4] for line in beside.splitlines() if " × " in line}
    assert patterns["adam_m.model.layers.N.attention.wq.weight"] == ["2", "×", "16×16"]
    assert patterns["adam_v.model.layers.N.feed_forward.ffn.w2.weight"] == ["2", "×", "3×16×10"]
    assert patterns["global_step"][0] == "1"
    assert len(patterns) == 2 * len({*(kind.name for kind in layout.KINDS)}) + 2 + 1  # w13 is two there


def test_reading_is_not_disturbed_by_the_optimizer(tmp_path: Path, hf: Path) -> None:
    from ostro.weights import Hints

    with_optimizer(tmp_path / "x.ckpt")
    reader = open_reader(tmp_path / "x.ckpt", Hints(model=SMALL))
    assert all(torch.equal(reader.read(name), RandomReader(SMALL).read(name)) for name in reader.names())
