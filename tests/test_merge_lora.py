"""The verb merge-lora, and --adapter of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ostro import weights
from ostro.cli import main
from ostro.data.tokenizer import load_tokenizer
from ostro.model import layout
from ostro.model.settings import LoraConfig, ModelConfig
from ostro.serve.load import load_model, torch_dtype
from ostro.weights import CastReader, RandomReader, digest, open_reader
from ostro.weights.adapters import Adapter, read_peft, write_peft
from ostro.weights.merged import Merged

SMALL = ModelConfig(
    vocab_size=32000,
    hidden_size=8,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=2,
    initializer_range=0.3,
)
LORA = LoraConfig(targets=("attention", "experts", "lm_head"), rank=2, alpha=4.0)
EXPERTS = "model.layers.1.block_sparse_moe.experts."


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "a bug of Ostro's" not in captured.err
    return code, captured.out, " ".join(captured.err.split())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "hf"
    save = load_tokenizer("v1").save
    weights.convert(RandomReader(SMALL), folder, to="hf", dtype=torch.bfloat16, tokenizer=save)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of which one expert was never trained, and another matrix so little that bf16 does not feel it."""
    generator = torch.Generator().manual_seed(0)
    table = layout.adapter_table(SMALL, LORA)
    tensors = {name: 0.3 * torch.randn(p.shape, generator=generator) for name, p in table.items()}
    tensors[f"{EXPERTS}w2_lora_B"][1] = 0
    tensors["model.layers.0.self_attn.q_proj.lora_B"] *= 1e-7
    folder = tmp_path_factory.mktemp("run") / "adapter"
    write_peft(folder, Adapter(LORA, tensors), SMALL, "base")
    return folder


def test_merges_and_shows_what_moved(
    base: Path, adapter: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = run(capsys, "merge-lora", base, adapter, tmp_path / "hf", "--verify")
    assert code == 0
    assert "LoRA of rank 2, scale 2, on q_proj, k_proj, v_proj, o_proj, w13, w2, lm_head" in out
    source, read = open_reader(base), read_peft(adapter, SMALL)
    merged = Merged(source, read)
    assert digest(open_reader(tmp_path / "hf")) == digest(merged)
    header, *rows = (line.split() for line in out.splitlines() if "layer " in line or "v_proj  " in line)
    a, b = (read.tensors[f"model.layers.1.self_attn.v_proj.lora_{part}"] for part in "AB")
    expected = (2 * b @ a).norm() / source.read("model.layers.1.self_attn.v_proj.weight").float().norm()
    shown = dict(zip(header[1:], rows[1][2:], strict=True))
    assert float(shown["v_proj"]) == pytest.approx(expected.item(), rel=0.05)
    assert "‖ΔW‖/‖W‖ of lm_head: " in out
    warnings = [line.strip() for line in out.splitlines() if "warning" in line]
    assert warnings == [
        f"warning: the delta of {EXPERTS}w2[1] is 0: B was never trained",
        "warning: the delta of model.layers.0.self_attn.q_proj.weight is lost when rounded, no value changes: a wider "
        "--dtype keeps it",
    ]


def test_a_wider_type_keeps_it(base: Path, adapter: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(
        capsys, "merge-lora", base, adapter.parent, tmp_path / "out", "--to", "mistral", "--dtype", "fp32"
    )
    assert code == 0
    assert "is lost" not in out
    name = "model.layers.0.self_attn.q_proj.weight"
    written, before = open_reader(tmp_path / "out").read(name), open_reader(base).read(name).float()
    assert 0 < (written - before).abs().max() < 1e-6
    # Of a conversion, --adapter is the same.
    code, _, _ = run(capsys, "convert", base, tmp_path / "again", "--dtype", "fp32", "--adapter", adapter)
    assert code == 0
    assert digest(open_reader(tmp_path / "again")) == digest(open_reader(tmp_path / "out"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_loaded_as_if_merged(dtype: str, base: Path, adapter: Path) -> None:
    loaded = load_model(base, dtype, adapter=adapter).state_dict()
    infos = CastReader(open_reader(base), torch_dtype(dtype), keep_fp32=True).names()
    merged = Merged(open_reader(base), read_peft(adapter, SMALL), infos)
    assert loaded.keys() == merged.names().keys()
    # Norms are of the model's type, and as exact in it.
    assert all(torch.equal(value, merged.read(name).to(value.dtype)) for name, value in loaded.items())


def test_used_without_merging(base: Path, adapter: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Hello there, how are you? " * 9)
    for command in (
        ("evaluate", base, tmp_path / "a.txt", "--seq-length", 16),
        ("generate", base, "Hello", "--max-new-tokens", 6),
    ):
        code, out, err = run(capsys, *command, "--dtype", "fp32", "--adapter", adapter)
        assert code == 0, err
        assert out.partition("  (")[0] != run(capsys, *command, "--dtype", "fp32")[1].partition("  (")[0]


def test_what_is_refused(base: Path, adapter: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "merge-lora", base, base, tmp_path / "out")
    assert (code, "holds no adapter_config.json" in err) == (5, True)
    other = tmp_path / "other"
    weights.convert(RandomReader(ModelConfig(**{**SMALL.as_fields(), "intermediate_size": 7})), other, to="hf")
    code, _, err = run(capsys, "merge-lora", other, adapter, tmp_path / "out")
    assert (code, "it belongs to another model" in err) == (5, True)
    options = ("--to", "mindspore", "--optimizer", "--adapter", adapter)
    code, _, err = run(capsys, "convert", base, tmp_path / "out", *options)
    assert (code, "--optimizer keeps the state of weights that an adapter changes" in err) == (2, True)
    assert not (tmp_path / "out").exists()
