"""What lies in the files of a training checkpoint: read only if it is the plain tensor the metadata describe."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import random
from torch import Tensor

from ostro.errors import WeightsError
from ostro.weights import convert, dcp, dcp_file, open_reader
from ostro.weights.dcp_file import read_metadata

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")

PREFIX = dcp.WEIGHTS_PREFIX


def replaced(folder: Path, name: str, item: bytes) -> Path:
    """Let a tensor of one box be kept in another item, appended to the file."""
    file = folder / "__0_0.distcp"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (info,) = (info for index, info in metadata.storage_data.items() if index.fqn == PREFIX + name)
    info.offset, info.length = file.stat().st_size, len(item)
    file.write_bytes(file.read_bytes() + item)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def as_item(tensor: Any) -> bytes:
    out = io.BytesIO()
    torch.save(tensor, out)
    return out.getvalue()


def rezipped(item: bytes, change: Callable[[str, bytes], tuple[str, bytes] | None], method: int) -> bytes:
    """Write an item's archive again, its records changed, in a method of compression."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(item)) as old, zipfile.ZipFile(out, "w", method) as new:
        for name in old.namelist():
            kept = change(name, old.read(name))
            if kept is not None:
                new.writestr(*kept)
    return out.getvalue()


HEAD = "lm_head.weight"


def head() -> Tensor:
    return random().read(HEAD)


def unchanged(name: str, content: bytes) -> tuple[str, bytes]:
    return name, content


def named(suffix: str, content: bytes | None) -> Callable[[str, bytes], tuple[str, bytes] | None]:
    """Return what replaces the record whose name ends so, or leaves it out."""

    def change(name: str, old: bytes) -> tuple[str, bytes] | None:
        if not name.endswith(suffix):
            return name, old
        return None if content is None else (name, content)

    return change


UNFIT: dict[str, Callable[[], bytes]] = {
    "transposed": lambda: as_item(head().T.contiguous().T),
    "every second row": lambda: as_item(head().repeat_interleave(2, 0)[::2]),
    "an offset": lambda: as_item(torch.cat([head(), head()])[48:]),
    "another dtype": lambda: as_item(head().to(torch.float64)),
    "a dtype of the same size": lambda: as_item(head().view(torch.int32)),
    "another shape": lambda: as_item(head().T.contiguous()),
    "one row less": lambda: as_item(head()[:-1].clone()).ljust(head().nbytes + 2048, b"\0"),
    "a list": lambda: as_item([head()]),
    "a state dict": lambda: as_item({"x": head()}),
    "a parameter": lambda: as_item(torch.nn.Parameter(head())),
    "compressed": lambda: rezipped(as_item(head()), unchanged, zipfile.ZIP_DEFLATED) + bytes(head().nbytes),
    "big-endian": lambda: rezipped(as_item(head()), named("byteorder", b"big"), zipfile.ZIP_STORED),
    "no values": lambda: rezipped(as_item(head()), named("data/0", None), zipfile.ZIP_STORED) + bytes(head().nbytes),
    "short values": lambda: rezipped(as_item(head()), named("data/0", b"\0" * 64), 0) + bytes(head().nbytes),
    "no pickle": lambda: rezipped(as_item(head()), named("data.pkl", None), zipfile.ZIP_STORED),
    "a pickle of noise": lambda: rezipped(as_item(head()), named("data.pkl", b"\x80\x04noise"), zipfile.ZIP_STORED),
    "an endless pickle": lambda: rezipped(as_item(head()), named("data.pkl", b"0" * 70_000), zipfile.ZIP_STORED),
    "the old format": lambda: _old_format(head()),
    "noise": lambda: bytes(range(256)) * (head().nbytes // 128),
}


def _old_format(tensor: Tensor) -> bytes:
    out = io.BytesIO()
    torch.save(tensor, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def test_an_item_that_is_what_it_should_be_is_read(tmp_path: Path) -> None:
    """The test of the tests below: the same replacement, of a sound item."""
    convert(random(), tmp_path / "x", to="dcp")
    for item in (as_item(head() + 1), rezipped(as_item(head() + 1), unchanged, zipfile.ZIP_STORED)):
        replaced(tmp_path / "x", HEAD, item)
        assert torch.equal(open_reader(tmp_path / "x").read(HEAD), head() + 1)
    one_row = as_item(torch.ones(1, 4).T.contiguous().T)  # strides of dims of size 1 mean nothing
    assert torch.load(io.BytesIO(one_row)).shape == (1, 4)


@pytest.mark.parametrize("how", UNFIT)
def test_an_item_that_is_something_else_is_refused(tmp_path: Path, how: str) -> None:
    convert(random(), tmp_path / "x", to="dcp")
    replaced(tmp_path / "x", HEAD, UNFIT[how]())
    reader = open_reader(tmp_path / "x")
    for where in ((), (3,)):
        with pytest.raises(WeightsError) as caught:
            reader.read(HEAD, where)
        message = str(caught.value)
        assert message.endswith(".")
        assert "\n" not in message
    others = [name for name in reader.names() if name != HEAD]
    assert all(torch.equal(reader.read(name), random().read(name)) for name in others)


def test_no_code_in_an_item_is_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return marker.touch, ()

    pickle.loads(pickle.dumps(Bomb()))
    marker.unlink()  # it goes off where nothing holds it back
    convert(random(), tmp_path / "x", to="dcp")
    item = rezipped(as_item(head()), named("data.pkl", pickle.dumps(Bomb())), zipfile.ZIP_STORED)
    with pytest.raises(WeightsError, match="it may be an attack; do not use the file"):
        open_reader(replaced(tmp_path / "x", HEAD, item)).read(HEAD)
    assert not marker.exists()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "x"
    convert(random(), folder, to="dcp")
    return folder


@settings(max_examples=100)
@given(st.data())
def test_a_changed_byte_of_a_file_is_an_error_or_another_value(sound: Path, data: st.DataObject) -> None:
    """Whatever one byte of the tensors' file says, reading ends with WeightsError or gives shapes and types as told."""
    file = sound / "__0_0.distcp"
    content = file.read_bytes()
    metadata = read_metadata(sound)
    index, info = data.draw(st.sampled_from(list(metadata.storage_data.items())))
    # The archive's own records lie before and behind the values.
    span = st.integers(0, 900) | st.integers(max(0, info.length - 700), info.length - 1)
    at = info.offset + min(data.draw(span), info.length - 1)
    changed = bytearray(content)
    changed[at] ^= data.draw(st.integers(1, 255))
    tensor = index.fqn.removeprefix(PREFIX)
    try:
        file.write_bytes(changed)
        try:
            reader = open_reader(sound)
            value = reader.read(tensor)
        except WeightsError:
            return
        assert (value.shape, value.dtype) == (random().read(tensor).shape, torch.float32)
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()], ids=["full disk", "interrupt"])
@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_what_stops_a_write_is_not_lost_in_the_archives_writer(tmp_path: Path, error: BaseException, at: int) -> None:
    """torch.save would say RuntimeError: unexpected pos."""
    num_writes = 0

    def write(data: Any) -> None:
        nonlocal num_writes
        num_writes += 1
        if num_writes >= at:
            raise error

    out = dcp_file._Counting(write)
    with pytest.raises(type(error)) as caught:
        out.save(torch.ones(4, 4))
    assert caught.value is error
