"""GGUF: against the package gguf, which is llama.cpp's own, and against damage. See tests/interop/llama.py too."""

from __future__ import annotations

import dataclasses
import itertools
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf as theirs
import numpy as np
import pytest
import torch
from disk import on_a_full_disk
from gguf import GGMLQuantizationType, GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from small_models import TINY, Altered, models, random

from ostro.data.tokenizer import load_tokenizer
from ostro.errors import ConfigError, WeightsError
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights import gguf
from ostro.weights.gguf_file import GgufFile
from ostro.weights.store import CastReader, Reader, digest, same_bits
from ostro.weights.stored import StoredReader

WIDE = dataclasses.replace(TINY, hidden_size=64, intermediate_size=96, head_dim=16)  # rows of whole blocks
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def opened(path: Path) -> StoredReader:
    reader = gguf.open_reader(path)
    reader.check()
    return reader


def written(path: Path, reader: Reader | None = None, **settings: Any) -> Path:
    gguf.write(reader or random(), path, **settings)
    return path


def everything(path: Path) -> None:
    reader = opened(path)
    for name in reader.names():
        reader.read(name)


# There and back


@settings(max_examples=40)
@given(config=models(), dtype=st.sampled_from(list(DTYPES.values())), keep_fp32=st.booleans(), is_file=st.booleans())
def test_what_is_written_reads_the_same(config: ModelConfig, dtype, keep_fp32: bool, is_file: bool) -> None:
    source = CastReader(random(config), dtype, keep_fp32=keep_fp32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("x.gguf" if is_file else "x")
        gguf.write(source, path)
        assert gguf.detect(path)
        reader = opened(path)
        assert (reader.format, reader.model, reader.names()) == ("gguf", config, source.names())
        assert digest(reader) == digest(source)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("own", DTYPES.values())
def test_a_wider_type_keeps_the_dtype_and_another_casts(tmp_path: Path, own: torch.dtype, kind: str) -> None:
    source = CastReader(random(), own)
    reader = opened(written(tmp_path / "x.gguf", source, quantization=kind))
    q = "model.layers.0.self_attn.q_proj.weight"
    expected = own if kind == "f32" else DTYPES[kind]
    assert {i.dtype for n, i in reader.names().items() if "norm" not in n and "gate" not in n} == {expected}
    assert same_bits(reader.read(q), source.read(q).to(expected))
    norm = "model.norm.weight"
    assert same_bits(reader.read(norm), source.read(norm))


def test_a_nan_keeps_its_bits_where_it_was_widened(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC1, -1, 0x7F81, 0x3F80], dtype=torch.int16)
    odd = Altered(
        CastReader(random(), torch.bfloat16),
        lambda name, where, t: bits.repeat(4).view(torch.bfloat16) if name == "model.norm.weight" else t,
    )
    reader = opened(written(tmp_path / "x.gguf", odd))
    assert same_bits(reader.read("model.norm.weight"), odd.read("model.norm.weight"))


def test_floats_that_32_bits_do_not_hold_come_back(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, rope_theta=123456.789, rms_norm_eps=1.2345678901e-6, sliding_window=5)
    path = written(tmp_path / "x.gguf", random(config))
    assert opened(path).model == config
    # What was changed in the file since holds.
    value = struct.pack("<f", np.float32(config.rope_theta))
    assert path.read_bytes().count(value) == 1
    path.write_bytes(path.read_bytes().replace(value, struct.pack("<f", 5e5)))
    assert opened(path).model == dataclasses.replace(config, rope_theta=5e5)


@pytest.mark.parametrize(("kind", "number"), [("q8_0", GGMLQuantizationType.Q8_0), ("Q4_0", GGMLQuantizationType.Q4_0)])
def test_quantised_weights_are_ggufs_own(tmp_path: Path, kind: str, number: GGMLQuantizationType) -> None:
    source = CastReader(random(WIDE), torch.bfloat16)
    reader = opened(written(tmp_path / "x", source, quantization=kind))
    assert reader.notes == (f"{kind.upper()} weights are read as float32",)
    for parameter in layout.parameters(WIDE):
        held, original = reader.read(parameter.name), source.read(parameter.name)
        if not parameter.kind.is_matrix or parameter.kind is layout.GATE:
            assert same_bits(held, original)
            continue
        expected = theirs.quants.dequantize(theirs.quants.quantize(original.float().numpy(), number), number)
        assert same_bits(held, torch.from_numpy(expected)), parameter.name
        assert not torch.equal(held, original.float())
        wheres = [(1,), (-1,), (slice(1, 3),), (slice(None), slice(2, 9)), (0, slice(3, None))]
        for where in [*wheres, (slice(None),) * (held.ndim - 1) + (slice(5, 40),)]:
            assert torch.equal(reader.read(parameter.name, where), held[where]), (parameter.name, where)


def test_rows_that_are_no_multiple_of_32_fall_back_to_f16(tmp_path: Path) -> None:
    config = dataclasses.replace(WIDE, intermediate_size=80)  # w2 has rows of 80
    notes = gguf.write(random(config), tmp_path / "x.gguf", quantization="q4_0")
    kinds = {name: held.kind.word for name, held in GgufFile(tmp_path / "x.gguf").stored.items()}
    assert {name for name, word in kinds.items() if word == "F16"} == {f"blk.{i}.ffn_down_exps.weight" for i in (0, 1)}
    assert kinds["output.weight"] == kinds["blk.0.ffn_up_exps.weight"] == "Q4_0"
    assert notes[-1].startswith("2 of 23 tensors are F16 instead of Q4_0, first blk.0.ffn_down_exps.weight")
    assert opened(tmp_path / "x.gguf").read("model.layers.0.block_sparse_moe.experts.w2").dtype == torch.float16


# What llama.cpp sees


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_the_package_reads_what_we_write(tmp_path: Path, kind: str) -> None:
    config = dataclasses.replace(WIDE, num_hidden_layers=1, rope_theta=5e5)
    source = random(config)
    reader = GGUFReader(written(tmp_path / "x.gguf", source, quantization=kind))
    word = kind.upper()
    expected = {
        "token_embd.weight": ((64, 48), word),
        "blk.0.attn_norm.weight": ((64,), "F32"),
        "blk.0.attn_q.weight": ((64, 64), word),
        "blk.0.attn_k.weight": ((64, 32), word),
        "blk.0.attn_v.weight": ((64, 32), word),
        "blk.0.attn_output.weight": ((64, 64), word),
        "blk.0.ffn_norm.weight": ((64,), "F32"),
        "blk.0.ffn_gate_inp.weight": ((64, 3), "F32"),
        "blk.0.ffn_gate_exps.weight": ((64, 96, 3), word),
        "blk.0.ffn_up_exps.weight": ((64, 96, 3), word),
        "blk.0.ffn_down_exps.weight": ((96, 64, 3), word),
        "output_norm.weight": ((64,), "F32"),
        "output.weight": ((64, 48), word),
    }
    found = {t.name: (tuple(int(n) for n in t.shape), t.tensor_type.name) for t in reader.tensors}
    assert found == expected
    assert list(found) == list(expected)
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    held = by_name["blk.0.ffn_up_exps.weight"]
    up = torch.tensor(theirs.quants.dequantize(held.data, held.tensor_type))
    original = source.read("model.layers.0.block_sparse_moe.experts.w13")[:, 1]
    assert (up - original).abs().max() < {"f32": 1e-9, "f16": 1e-3, "bf16": 1e-2, "q8_0": 1e-2, "q4_0": 2e-1}[kind]
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert {key: value for key, value in metadata.items() if not key.startswith("ostro.")} == {
        "general.architecture": "llama",
        "general.alignment": 32,
        "general.type": "model",
        "general.file_type": {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}[kind],
        "general.quantization_version": 2,
        "llama.vocab_size": 48,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.block_count": 1,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5e5,
        "llama.expert_count": 3,
        "llama.expert_used_count": 2,
        "tokenizer.ggml.model": "no_vocab",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def test_rotary_rows_stand_in_pairs(tmp_path: Path) -> None:
    file = GgufFile(written(tmp_path / "x.gguf"))
    for ours, name in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
        rows = random().read(f"model.layers.1.self_attn.{ours}.weight")
        held = file.tensor(f"blk.1.{name}.weight")
        for head in range(len(rows) // 4):
            half = [head * 4 + row for row in (0, 2, 1, 3)]  # the pairs of a head of 4 are (0, 2) and (1, 3)
            assert torch.equal(held[head * 4 : head * 4 + 4], rows[half])
    assert torch.equal(file.tensor("blk.1.attn_v.weight"), random().read("model.layers.1.self_attn.v_proj.weight"))


def test_an_expert_at_a_time_is_read(tmp_path: Path) -> None:
    asked = []

    def note(name, where, tensor):
        asked.append((name, where))
        return tensor

    gguf.write(Altered(random(), note), tmp_path / "x.gguf", quantization="bf16")
    depth = {"w13": 2, "w2": 1}
    stacks = [(name, where[: depth[kind]]) for name, where in asked if (kind := name.rpartition(".")[2]) in depth]
    assert all(isinstance(index, int) for _, where in stacks for index in where)
    assert set(stacks) == {
        (f"model.layers.{layer}.block_sparse_moe.experts.{kind}", where)
        for layer in range(2)
        for kind, sizes in (("w13", (3, 2)), ("w2", (3,)))
        for where in itertools.product(*map(range, sizes))
    }


def test_tied_embeddings_stand_there_once(tmp_path: Path) -> None:
    tied = dataclasses.replace(TINY, tie_word_embeddings=True)
    path = written(tmp_path / "x.gguf", random(tied))
    assert "output.weight" not in GgufFile(path).stored
    assert opened(path).model.tie_word_embeddings


# The vocabulary


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_the_vocabulary_is_sentencepieces(tmp_path: Path, version: str) -> None:
    words = load_tokenizer(version)
    config = dataclasses.replace(TINY, vocab_size=words.vocab_size + 16)
    assert gguf.write(random(config), tmp_path / "x.gguf", tokenizer=words.save) == ()
    file = GgufFile(tmp_path / "x.gguf")
    words.save(tmp_path / "words")
    processor = SentencePieceProcessor(model_file=str(tmp_path / "words" / "tokenizer.model"))
    count = processor.GetPieceSize()
    tokens, scores, types = (file.values(f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type"))
    assert tokens[:count] == [processor.IdToPiece(i) for i in range(count)]
    assert np.array_equal(np.float32(scores[:count]), np.float32([processor.GetScore(i) for i in range(count)]))
    assert [i for i, type in enumerate(types) if type == 6] == [i for i in range(count) if processor.IsByte(i)]
    assert [i for i, type in enumerate(types) if type == 2] == [processor.unk_id()]
    controls = {i for i, type in enumerate(types) if type == 3}
    assert controls >= {i for i in range(count) if processor.IsControl(i)}
    assert all(tokens[i][0] in "<[" for i in controls)
    assert tokens[count:] == [f"[PAD{i}]" for i in range(count, count + 16)]
    assert set(types[count:]) == {5}
    assert set(types[:count]) <= {1, 2, 3, 6}
    found = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    assert found == {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
    }
    assert opened(tmp_path / "x.gguf").model == config


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", "{{ 'é' }}"),
        ("tokenizer_config.json", '{"chat_template": "{{ \'é\' }}"}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default", "template": "{{ \'é\' }}"}]}'),
    ],
)
def test_a_chat_template_comes_along(tmp_path: Path, file: str, content: str) -> None:
    def save(folder: Path) -> None:
        load_tokenizer("v1").save(folder)
        (folder / file).write_text(content, "utf-8")

    written(tmp_path / "x.gguf", random(dataclasses.replace(TINY, vocab_size=32000)), tokenizer=save)
    assert GgufFile(tmp_path / "x.gguf").metadata["tokenizer.chat_template"] == "{{ 'é' }}"


def test_a_vocabulary_that_does_not_fit_is_left_out_and_said(tmp_path: Path) -> None:
    words = load_tokenizer("v1")
    assert gguf.write(random(), tmp_path / "a.gguf", tokenizer=words.save) == (
        "there is no tokenizer in it: the one given has 32000 pieces, the model 48",
    )
    assert GgufFile(tmp_path / "a.gguf").metadata["tokenizer.ggml.model"] == "no_vocab"
    words.save(tmp_path / "words")
    (tmp_path / "words" / "tokenizer.model").write_bytes(b"no model")
    (note,) = gguf.write(random(), tmp_path / "b.gguf", tokenizer=tmp_path / "words")
    assert "no tokenizer in it: tokenizer.model is not a sentencepiece model" in note
    (tmp_path / "words" / "tokenizer.model").unlink()
    (note,) = gguf.write(random(), tmp_path / "c.gguf", tokenizer=tmp_path / "words")
    assert "has no tokenizer.model" in note
    (note,) = gguf.write(random(), tmp_path / "d.gguf")
    assert "there is no tokenizer in it: llama.cpp takes and gives token ids alone" in note
    with pytest.raises(WeightsError, match="holds no tokenizer file"):
        gguf.write(random(), tmp_path / "e.gguf", tokenizer=tmp_path)


def test_values_that_are_no_longer_what_they_were_are_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "x.gguf", CastReader(random(), torch.bfloat16))
    content = bytearray(path.read_bytes())
    file = GgufFile(path)
    at = file._offsets["output_norm.weight"]
    content[at] = 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"values in output_norm.weight that are no bfloat16.*remove that key"):
        opened(path).read("model.norm.weight")


def test_a_folder_of_several_models(tmp_path: Path) -> None:
    assert not gguf.detect(tmp_path)
    written(tmp_path / "a.gguf")
    assert opened(tmp_path).model == TINY
    written(tmp_path / "b.gguf")
    with pytest.raises(WeightsError, match=r"holds 2 GGUF models .a.gguf, b.gguf.: give the file itself"):
        opened(tmp_path)
    (tmp_path / "a.gguf").rename(tmp_path / "sha256-1234")
    assert gguf.detect(tmp_path / "sha256-1234")
    assert opened(tmp_path / "sha256-1234").model == TINY
    (tmp_path / "notes").write_text("GGU")
    assert not gguf.detect(tmp_path / "notes")


# Writing that fails


def test_targets_that_exist_are_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "x.gguf")
    before = path.read_bytes()
    with pytest.raises(WeightsError, match=r"x.gguf exists: choose another name or remove it"):
        written(path)
    assert path.read_bytes() == before
    with pytest.raises(WeightsError, match="exists and is not empty"):
        written(tmp_path)


@pytest.mark.parametrize("name", ["new/x", "new/x.gguf"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, name: str) -> None:
    kind, message = on_a_full_disk(20_000, gguf.write, random(), tmp_path / name)
    assert kind == "OutOfMemory"
    assert "could not be written whole (File too large) and nothing of it was kept" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["new/x", "new/x.gguf"])
def test_a_reader_that_fails_leaves_nothing(tmp_path: Path, name: str) -> None:
    def fail(name, where, tensor):
        if name == "model.norm.weight":
            raise KeyboardInterrupt
        return tensor

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / name, Altered(random(), fail))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "value", "sentence"),
    [
        ("q8_0", float("nan"), r"experts.w13 .blk.1.ffn_gate_exps.weight. holds NaN in 1 of"),
        ("q8_0", float("inf"), r"experts.w13 .blk.1.ffn_gate_exps.weight. holds infinity in 1 of"),
        ("q8_0", 1e7, r"experts.w13 .blk.1.ffn_gate_exps.weight. has values up to 1e\+07 and Q8_0 holds 8.32e\+06"),
        ("q4_0", 6e5, r"experts.w13 .blk.1.ffn_gate_exps.weight. has values up to 6e\+05 and Q4_0 holds 5.24e\+05"),
        ("f16", 1e6, r"experts.w13 .blk.1.ffn_gate_exps.weight. has 1 of .* values that float16 cannot hold"),
    ],
)
def test_values_that_a_type_cannot_hold(tmp_path: Path, kind: str, value: float, sentence: str) -> None:
    def spoil(name, where, tensor):
        if name.endswith("layers.1.block_sparse_moe.experts.w13") and where[:2] == (1, 0):
            tensor[3, 5] = value
        return tensor

    with pytest.raises(WeightsError, match=sentence):
        written(tmp_path / "x.gguf", Altered(random(WIDE), spoil), quantization=kind)
    assert not list(tmp_path.iterdir())


def test_float64_is_written_when_asked_for_as_something_else(tmp_path: Path) -> None:
    source = CastReader(random(), torch.float64)
    with pytest.raises(WeightsError, match=r"embed_tokens.weight is float64, which llama.cpp does not compute"):
        written(tmp_path / "x.gguf", source)
    assert digest(opened(written(tmp_path / "x.gguf", source, quantization="f32"))) == digest(random())


def test_an_unknown_quantization(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'q4_k' is not one of f32, bf16, f16, q8_0, q4_0. Did you mean 'q4_0'"):
        written(tmp_path / "x.gguf", quantization="q4_k")


def test_without_the_package_reading_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "x.gguf", random(WIDE), quantization="q4_0")
    monkeypatch.setitem(sys.modules, "gguf", None)
    everything(path)
    with pytest.raises(WeightsError, match=r"not installed: pip install 'ostro\[gguf\]'"):
        written(tmp_path / "y.gguf")


def test_a_sliding_window_is_said_to_be_ignored(tmp_path: Path) -> None:
    notes = gguf.write(random(dataclasses.replace(TINY, sliding_window=7)), tmp_path / "x.gguf")
    assert "llama.cpp ignores the sliding window of 7" in notes[-1]
