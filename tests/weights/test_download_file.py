"""The parts of `download` that need no hub: what is chosen, how a file grows, what a listing may hold."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import huggingface_hub.hf_api
import pytest
from hub_server import COMMIT, REPO
from hypothesis import given
from hypothesis import strategies as st

from ostro.errors import Error, WeightsError
from ostro.weights import download as module
from ostro.weights.download import HubFile

# What `_fetch` needs of huggingface_hub where a test answers for the network.
NO_HUB = types.SimpleNamespace(
    errors=huggingface_hub.errors, utils=types.SimpleNamespace(hf_raise_for_status=lambda response: None)
)


def test_an_error_in_one_file_stops_the_others(tmp_path: Path):
    data, waited = b"x" * 100, threading.Event()

    @contextlib.contextmanager
    def stream(file: HubFile, start: int) -> Iterator[Any]:
        if file.name == "bad":
            waited.wait(10)
            raise WeightsError("bad")

        def blocks() -> Iterator[bytes]:
            yield data[:10]
            waited.set()
            for at in range(10, 100):
                time.sleep(0.05)
                yield data[at : at + 1]

        yield types.SimpleNamespace(status_code=200, iter_bytes=blocks)

    files = [HubFile(name, 100, hashlib.sha256(data).hexdigest()) for name in ("bad", "good")]
    with pytest.raises(WeightsError, match="bad"):
        module._fetch_all(NO_HUB, tmp_path, files, stream)
    assert 10 < files[1].partial(tmp_path).stat().st_size < 100


def test_ctrl_c_stops_at_the_next_block(tmp_path: Path):
    stop, data = threading.Event(), b"x" * 100

    @contextlib.contextmanager
    def stream(file: HubFile, start: int) -> Iterator[Any]:
        def blocks() -> Iterator[bytes]:
            yield data[:10]
            stop.set()
            yield data[10:20]
            raise AssertionError("it goes on")

        yield types.SimpleNamespace(status_code=200, iter_bytes=blocks)

    file = HubFile("a", 100, hashlib.sha256(data).hexdigest())
    module._fetch(NO_HUB, tmp_path, file, stream, lambda _: None, stop)
    assert file.partial(tmp_path).read_bytes() == data[:20]
    assert not (tmp_path / "a").exists()


def test_a_write_that_falls_short_loses_nothing(tmp_path: Path):
    data, starts, opened = bytes(range(200)), [], Path.open

    @contextlib.contextmanager
    def stream(file: HubFile, start: int) -> Iterator[Any]:
        starts.append(start)
        blocks = (data[i : i + 50] for i in range(start, len(data), 50))
        yield types.SimpleNamespace(status_code=206 if start else 200, iter_bytes=lambda: blocks)

    class Disk:
        """A file that takes 30 bytes of its second write, as a disk does that is filling up."""

        def __init__(self, path: Path) -> None:
            self.file, self.writes = opened(path, "ab", buffering=0), 0

        def __enter__(self) -> Disk:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def fileno(self) -> int:
            return self.file.fileno()

        def write(self, data: bytes) -> int:
            self.writes += 1
            return self.file.write(data[: 30 if self.writes == 2 else None])

    file = HubFile("a", 200, hashlib.sha256(data).hexdigest())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, **how: Disk(path) if mode == "ab" else opened(path, mode, **how))
        module._fetch(NO_HUB, tmp_path, file, stream, lambda _: None, threading.Event())
    assert (tmp_path / "a").read_bytes() == data
    assert starts == [0, 80]


def test_progress_counts_every_byte_once(tmp_path: Path):
    data, ticks = b"x" * 100, []

    @contextlib.contextmanager
    def stream(file: HubFile, start: int) -> Iterator[Any]:
        blocks = [data[:60]] if not start else [data]  # it breaks off, then begins anew
        yield types.SimpleNamespace(status_code=200, iter_bytes=lambda: blocks)

    file = HubFile("a", 100, hashlib.sha256(data).hexdigest())
    module._fetch(NO_HUB, tmp_path, file, stream, ticks.append, threading.Event())
    assert ticks == [60, -60, 100]


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        ("model.safetensors consolidated.safetensors params.json", "model.safetensors"),
        (
            "consolidated-00001-of-00002.safetensors consolidated.safetensors.index.json params.json pytorch_model.bin",
            "consolidated-00001-of-00002.safetensors consolidated.safetensors.index.json params.json",
        ),
        ("pytorch_model-00001-of-00002.bin pytorch_model.bin.index.json consolidated.00.pth", "pytorch_model* bin"),
        ("consolidated.00.pth consolidated.01.pth params.json", "consolidated.00.pth consolidated.01.pth params.json"),
        ("adapter_model.safetensors adapter_config.json", "adapter_model.safetensors adapter_config.json"),
        ("model.safetensors.index.json params.json adapter_config.json model.gguf", ""),
    ],
)
def test_one_copy_of_the_weights_is_taken(names: str, taken: str):
    files = [HubFile(name, 1, "0" * 40) for name in [*names.split(), "config.json", "README.md", "tekken.json"]]
    if not taken:
        with pytest.raises(WeightsError, match="no weights that Ostro reads"):
            module._choose(files, (), (), REPO)
        return
    wanted = names.split()[:2] if "*" in taken else taken.split()
    assert [file.name for file in module._choose(files, (), (), REPO)] == [*wanted, "config.json", "tekken.json"]


def test_names_that_are_meant_well_pass():
    for name in ("a/b.c", ".gitattributes", "a..b", "...", "x.git", "weights (1).bin", "模型.json"):
        assert not module._UNSAFE.search(name), name


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(key=st.sampled_from(["rfilename", "size", "blobId", "lfs", "siblings", "sha"]), value=json_values)
def test_no_listing_raises_anything_else(key: str, value: Any):
    listing = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": "a", "size": 1, "blobId": "0" * 40}]}
    (listing if key in listing else listing["siblings"][0])[key] = value

    class Api:
        def __init__(self, *args: Any) -> None:
            pass

        def model_info(self, *args: Any, **kwargs: Any) -> Any:
            return huggingface_hub.hf_api.ModelInfo(**json.loads(json.dumps(listing)))

    fake = types.SimpleNamespace(errors=huggingface_hub.errors, HfApi=Api)
    try:
        commit, files = module._listing(fake, REPO, "main", "http://127.0.0.1", None)
    except Error:
        return
    assert isinstance(commit, str)
    assert all(file.num_bytes >= 0 and not module._UNSAFE.search(file.name) for file in files)
