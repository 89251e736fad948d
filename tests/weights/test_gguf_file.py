"""One .gguf file, against the package gguf and against damage."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import struct
import tempfile
from pathlib import Path
from typing import Any

import gguf as theirs
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_models import TINY, random

from ostro.errors import WeightsError
from ostro.weights import gguf
from ostro.weights.gguf_file import KINDS, Q4_0, Q8_0, GgufFile, dequantize, encode
from ostro.weights.store import CastReader

WIDE = dataclasses.replace(TINY, hidden_size=64, intermediate_size=96, head_dim=16)  # rows of whole blocks


def test_we_read_the_header_as_the_package_does(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "anything")
    small = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 1 << 31, "int32": -9}
    for kind, value in small.items():
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.add_uint64("a.uint64", 1 << 63)
    writer.add_int64("a.int64", -(1 << 62))
    writer.add_float32("a.float32", 0.1)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "τέχνη 東")
    writer.add_array("a.words", ["", "two", "τρία"])
    writer.add_array("a.numbers", [1.5, -2.0])
    writer.add_custom_alignment(64)
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones((5,), np.float16),
        "c": np.float32([[[7]]]),
    }
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(path)
    fields = {k: f.contents() for k, f in GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    ours: dict[str, Any] = {**file.metadata, **{key: file.values(key) for key in file.lists()}}
    assert ours["a.float32"] == 0.1  # the shortest decimal, where theirs has the digits of 32 bits
    assert ours == fields | {"a.float32": 0.1}
    assert file.lists() == {"a.words": 3, "a.numbers": 2}
    for name, value in tensors.items():
        assert torch.equal(file.tensor(name), torch.from_numpy(value))


@given(
    values=st.lists(
        st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, -0.0, 1e-40, 6e-8]), min_size=32, max_size=32
    )
)
@example(values=[0.0] * 32)
@example(values=[1e-41] * 32)
@example(values=[-3.0, 3.0] * 16)
def test_blocks_are_ggufs_own_whatever_their_values(values: list[float]) -> None:
    block = torch.tensor(values)[None]
    for kind, limit in ((Q8_0, 1e6), (Q4_0, 5e5)):
        held = block.clamp(-limit, limit)
        number = GGMLQuantizationType(kind.number)
        with np.errstate(all="ignore"):
            expected = theirs.quants.quantize(held.numpy(), number)
        ours = encode(held, kind, "x")
        assert np.array_equal(ours.numpy(), expected)
        assert np.array_equal(dequantize(ours, kind).numpy(), theirs.quants.dequantize(expected, number))


def test_another_type_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    gguf.write(random(WIDE), path, quantization="q8_0")
    content = bytearray(path.read_bytes())
    at = content.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8
    content[at : at + 4] = struct.pack("<I", 14)
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"blk.0.attn_q.weight as Q6_K; Ostro reads F32, BF16, F16, Q8_0, Q4_0"):
        GgufFile(path)


@functools.cache
def sound(quantised: bool) -> tuple[bytes, int]:
    """Return a file's bytes, and where its tensors begin."""
    with tempfile.TemporaryDirectory() as folder:
        source = random(WIDE) if quantised else CastReader(random(), torch.bfloat16)
        path = Path(folder) / "x.gguf"
        gguf.write(source, path, quantization="q4_0" if quantised else None)
        return path.read_bytes(), GgufFile(path)._offsets["token_embd.weight"]


def broken(content: bytes) -> None:
    """Read everything; any exception but WeightsError goes up."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        path.write_bytes(content)
        with contextlib.suppress(WeightsError):
            reader = gguf.open_reader(path)
            reader.check()
            for name in reader.names():
                reader.read(name)


@settings(max_examples=400)
@given(data=st.data(), quantised=st.booleans())
def test_a_changed_header_is_an_error_or_a_sound_file(data: st.DataObject, quantised: bool) -> None:
    content, header = sound(quantised)
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, header - 1))
        new = data.draw(
            st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\0\0\0\0\0\0\0\x80"])
        )
        changed[at : at + len(new)] = new
    broken(bytes(changed))


@settings(max_examples=100)
@given(data=st.data(), quantised=st.booleans())
def test_a_truncated_file_is_an_error(data: st.DataObject, quantised: bool) -> None:
    content, header = sound(quantised)
    end = data.draw(st.integers(0, header) | st.integers(0, len(content) - 32))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        path.write_bytes(content[:end])
        with pytest.raises(WeightsError) as caught:
            GgufFile(path)
        assert str(path) in str(caught.value)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor_of(name: str = "a", shape: tuple[int, ...] = (8,), number: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number, offset)


def file_of(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    more: int = 0,
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs) + more) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


DAMAGED = {
    "empty": (b"", "does not begin with a GGUF header"),
    "another magic": (b"GGML" + bytes(40), "does not begin with a GGUF header"),
    "version 1": (file_of(version=1), "is a GGUF file of version 1; Ostro reads 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "endless pairs": (file_of(more=1 << 62), "where .* takes|an empty key"),
    "a key twice": (file_of((text("a") + struct.pack("<II", 4, 1),) * 2), "has the key a twice"),
    "an endless key": (file_of((struct.pack("<Q", 1 << 60),)), "announces 1152921504606846976 bytes of text"),
    "no UTF-8": (file_of((struct.pack("<Q", 2) + b"\xff\xfe" + bytes(8),)), "text that is no UTF-8"),
    "an unknown type": (file_of((text("a") + struct.pack("<II", 13, 1),)), "unknown type 13 in a"),
    "a list of lists": (file_of((text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(40),)), "unknown type 9 in a"),
    "an endless list": (
        file_of((text("a") + struct.pack("<IIQ", 9, 10, 1 << 61),)),
        "where a takes 18446744073709551616",
    ),
    "endless texts": (
        file_of((text("a") + struct.pack("<IIQ", 9, 8, 1 << 61),)),
        "announces 2305843009213693952 texts",
    ),
    "five dims": (file_of((), (tensor_of(shape=(1,) * 5),), bytes(4)), "gives a 5 dims"),
    "no values": (file_of((), (tensor_of(shape=(1 << 63, 0)),)), "holds a without a single value"),
    "an endless tensor": (file_of((), (tensor_of(shape=(1 << 62, 1 << 62)),)), "is truncated: .* describes"),
    "a type to come": (file_of((), (tensor_of(number=99),), bytes(32)), "holds a as type 99"),
    "half a block": (file_of((), (tensor_of(number=8),), bytes(34)), "holds a as Q8_0 with rows of 8"),
    "a scalar in blocks": (file_of((), (tensor_of(shape=(), number=8),), bytes(34)), "holds a as Q8_0 with rows of 1"),
    "a tensor twice": (file_of((), (tensor_of(), tensor_of(offset=32)), bytes(64)), "has the tensor a twice"),
    "a gap": (file_of((), (tensor_of(offset=32),), bytes(64)), "puts a at byte 32, 0 is its place"),
    "an overlap": (file_of((), (tensor_of(), tensor_of("b")), bytes(64)), "puts b at byte 0, 32 is its place"),
    "truncated": (file_of((), (tensor_of(),), bytes(31)), "describes 32 bytes of tensors, 31 are there"),
    "too long": (file_of((), (tensor_of(),), bytes(33)), "has 1 bytes that no tensor of its header covers"),
    "an odd alignment": (
        file_of((text("general.alignment") + struct.pack("<II", 4, 24),)),
        "has general.alignment=24, no power of two",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_one_sentence(tmp_path: Path, what: str) -> None:
    content, sentence = DAMAGED[what]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=sentence) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value)


def test_a_sound_file_of_the_same_making(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for version in (2, 3):
        path.write_bytes(file_of((text("a") + struct.pack("<II", 4, 7),), (tensor_of(),), bytes(32), version=version))
        assert GgufFile(path).metadata == {"a": 7}
        assert torch.equal(GgufFile(path).tensor("a"), torch.zeros(8))


def test_every_type_is_known_by_the_packages_number() -> None:
    for word, kind in KINDS.items():
        assert GGMLQuantizationType[word] == kind.number
        assert theirs.GGML_QUANT_SIZES[GGMLQuantizationType[word]] == (kind.block_values, kind.block_bytes)
