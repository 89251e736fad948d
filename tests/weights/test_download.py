"""`download` against a hub of our own on this machine: it lists, redirects, breaks off, damages and refuses."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
import shutil
import socket
import sys
import threading
import types
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub.constants
import huggingface_hub.errors
import huggingface_hub.hf_api
import pytest
import torch
from disk import on_a_full_disk
from hypothesis import given
from hypothesis import strategies as st
from small_models import TINY

from ostro.errors import ConfigError, Error, OutOfMemory, WeightsError
from ostro.weights import RandomReader, convert, open_reader
from ostro.weights import download as module
from ostro.weights.download import HubFile, download

REPO, COMMIT = "winds/tiny", "c0ffee" + "0" * 34
WEIGHTS = "model.safetensors"


class Hub:
    """What the two servers of a hub share: the files, what is to go wrong, and what was asked and sent."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.sent: dict[str, int] = {}  # bytes of each file that left, over all requests
        self.cuts: dict[str, list[int]] = {}  # after how many bytes the next answers with a file break off
        self.damaged: set[str] = set()
        self.statuses: dict[str, list[int]] = {}  # the next answers for a file, 200 for one that is given
        self.error_codes: dict[int, str] = {403: "GatedRepo"}
        self.listing_status, self.listing_code = 200, ""
        self.ranges = True
        self.listing: dict[str, Any] | str | None = None
        self.endpoint = self.storage = ""

    def listed(self) -> dict[str, Any]:
        return {"id": REPO, "sha": COMMIT, "siblings": [entry(name, data) for name, data in self.files.items()]}

    def fetched(self) -> list[str]:
        return [path for _, path, _ in self.asked if not path.startswith("/api/")]


# What `_fetch` needs of huggingface_hub where a test answers for the network.
NO_HUB = types.SimpleNamespace(
    errors=huggingface_hub.errors, utils=types.SimpleNamespace(hf_raise_for_status=lambda response: None)
)


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".model"))


def entry(name: str, data: bytes) -> dict[str, Any]:
    """Return a file as the hub lists it."""
    row = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    if is_large(name):
        row["blobId"] = "d" * 40  # of the pointer
        row["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return row


class Answers(BaseHTTPRequestHandler):
    """The hub: its API, its small files, and redirects to where the large ones are stored."""

    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.hub.asked.append((self.command, url.path, {name.lower(): text for name, text in self.headers.items()}))
        name = unquote(url.path.partition(f"/{REPO}/resolve/{COMMIT}/")[2])
        if url.path.startswith("/storage/"):
            self.file(url.path.removeprefix("/storage/"))
        elif url.path.startswith("/api/"):
            self.list(url.path, parse_qs(url.query))
        elif name not in self.hub.files:
            self.answer(404, b"{}", "EntryNotFound")
        elif (status := (self.hub.statuses.get(name) or [200]).pop(0)) != 200:
            self.answer(status, b"{}", self.hub.error_codes.get(status, ""))
        elif is_large(name):
            self.answer(302, b"", location=f"{self.hub.storage}/storage/{name}")
        else:
            self.file(name)

    def list(self, path: str, query: dict[str, list[str]]) -> None:
        found = re.fullmatch(rf"/api/models/{REPO}/revision/(main|{COMMIT})", path)
        if self.hub.listing_status != 200:
            self.answer(self.hub.listing_status, b"{}", self.hub.listing_code)
        elif not found:
            is_repo = path.startswith(f"/api/models/{REPO}/")
            self.answer(404 if is_repo else 401, b"{}", "RevisionNotFound" if is_repo else "RepoNotFound")
        elif isinstance(self.hub.listing, str):
            self.answer(200, self.hub.listing.encode())
        else:
            assert query["blobs"][0].lower() == "true", "checksums are not asked for"
            self.answer(200, json.dumps(self.hub.listing or self.hub.listed()).encode())

    def file(self, name: str) -> None:
        data, status = self.hub.files[name], 200
        if name in self.hub.damaged:
            data = bytes([data[0] ^ 1]) + data[1:]
        total = len(data)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and self.hub.ranges:
            status, data = 206, data[int(asked[1]) :]
        length = len(data)
        cuts = self.hub.cuts.get(name)
        data = data[: cuts.pop(0)] if cuts else data
        self.hub.sent[name] = self.hub.sent.get(name, 0) + len(data)
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if status == 206:
            self.send_header("Content-Range", f"bytes {total - length}-{total - 1}/{total}")
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = len(data) < length

    def answer(self, status: int, data: bytes, code: str = "", location: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for header, text in (("X-Error-Code", code), ("Location", location)):
            if text:
                self.send_header(header, text)
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Answers, hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return a model that Ostro wrote and what repositories hold beside it."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    convert(RandomReader(TINY, seed=3), folder, to="hf", max_shard_bytes=6_000)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sum(name.endswith(".safetensors") for name in files) > 2
    more = {"tokenizer.model": b"pieces", "tokenizer.json": b"{}", "added_tokens.json": b""}
    left = {"consolidated.00.pt": b"again", "pytorch_model.bin": b"again", "params.json": b"{}", "README.md": b"#"}
    return files | more | left | {"onnx/model.safetensors": b"again"}


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing but 127.0.0.1 has an address, and neither token, proxy nor home of whoever runs the tests counts."""
    look_up = socket.getaddrinfo

    def look_up_here(host: Any, *args: Any, **kwargs: Any) -> Any:
        assert host in ("127.0.0.1", b"127.0.0.1"), f"a test reached for {host}"
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up_here)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(module, "_PAUSE_SECONDS", 0.0)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub(checkpoint: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Return a running hub that HF_ENDPOINT names."""
    hub = Hub(dict(checkpoint))
    with serving(hub) as hub.endpoint, serving(hub) as hub.storage:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint + "/")
        yield hub


def shard(hub: Hub) -> str:
    """Return the name of a file with weights that is large enough to break off in."""
    return max((name for name in hub.files if name.startswith("model-")), key=lambda name: len(hub.files[name]))


def partials(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.partial"))


def test_a_repository_is_read_bit_for_bit(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert download(REPO, tmp_path / "model") == tmp_path / "model"
    reader, expected = open_reader(tmp_path / "model"), RandomReader(TINY, seed=3)
    for name in expected.names():
        assert torch.equal(reader.read(name), expected.read(name)), name
    left = {"consolidated.00.pt", "pytorch_model.bin", "params.json", "README.md", "onnx/model.safetensors"}
    assert {path.name for path in (tmp_path / "model").iterdir()} == set(hub.files) - left
    assert hub.sent == {name: len(hub.files[name]) for name in set(hub.files) - left - {"added_tokens.json"}}
    said = " ".join(capsys.readouterr().out.split())  # the console breaks its lines anywhere
    assert f"{REPO} at {COMMIT}" in said
    assert f"{len(hub.files) - len(left)} files" in said
    assert f"/{len(hub.files) - len(left)} {shard(hub)}" in said
    assert {path.rpartition("/")[0] for path in hub.fetched()} == {f"/{REPO}/resolve/{COMMIT}", "/storage"}


def test_the_folder_has_the_name_of_the_repository(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert download(REPO, revision=COMMIT, include=["config.json"]) == Path("tiny")
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["config.json"]


def test_a_second_call_fetches_nothing(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    download(REPO, tmp_path)
    hub.sent.clear()
    hub.asked.clear()
    capsys.readouterr()
    download(REPO, tmp_path)
    assert hub.fetched() == []
    assert hub.sent == {}
    assert "0 files and 0 bytes are to be fetched" in capsys.readouterr().out


def test_a_lost_connection_is_taken_up_where_it_broke(hub: Hub, tmp_path: Path):
    name = shard(hub)
    hub.cuts[name] = [1000, 0, 700]
    download(REPO, tmp_path)
    assert (tmp_path / name).read_bytes() == hub.files[name]
    ranges = [headers.get("range") for _, path, headers in hub.asked if path == f"/storage/{name}"]
    assert ranges == [None, "bytes=1000-", "bytes=1000-", "bytes=1700-"]
    assert hub.sent[name] == len(hub.files[name])


def test_an_interrupted_call_is_taken_up_by_the_next(hub: Hub, tmp_path: Path):
    name = shard(hub)
    hub.cuts[name] = [1000] + [0] * 5
    with pytest.raises(WeightsError, match=r"cannot be reached .*the same command goes on"):
        download(REPO, tmp_path)
    (left,) = [path for path in partials(tmp_path) if path.name.startswith(name)]
    assert left.read_bytes() == hub.files[name][:1000]
    assert not (tmp_path / name).exists()
    download(REPO, tmp_path)
    assert all(hub.sent[name] == len(hub.files[name]) for name in hub.sent), "bytes were sent twice"
    assert (tmp_path / name).read_bytes() == hub.files[name]
    assert partials(tmp_path) == []


def test_ctrl_c_keeps_what_has_arrived(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    name = shard(hub)
    hub.cuts[name] = [1000]

    def interrupted(jobs: Any) -> Any:
        for job in jobs:
            job.exception()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "as_completed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            download(REPO, tmp_path, include=[name])
    assert "the same command goes on" in capsys.readouterr().out
    download(REPO, tmp_path, include=[name])
    assert hub.sent[name] == len(hub.files[name])


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


def test_a_hub_without_ranges_is_heard_from_the_beginning(hub: Hub, tmp_path: Path):
    name, hub.ranges = shard(hub), False
    hub.cuts[name] = [1000]
    download(REPO, tmp_path)
    assert (tmp_path / name).read_bytes() == hub.files[name]
    assert hub.sent[name] == len(hub.files[name]) + 1000


def test_passing_refusals_are_waited_out(hub: Hub, tmp_path: Path):
    hub.statuses[shard(hub)] = [503, 429, 500]
    download(REPO, tmp_path)
    assert (tmp_path / shard(hub)).read_bytes() == hub.files[shard(hub)]
    hub.statuses["config.json"] = [503] * 9
    with pytest.raises(WeightsError, match="HTTP 503"):
        download(REPO, tmp_path / "again")
    assert len(hub.statuses["config.json"]) == 4


@pytest.mark.parametrize("name", ["model-", "config.json"])  # by its sha256, by its git blob
def test_a_damaged_file_is_named_and_removed(hub: Hub, tmp_path: Path, name: str):
    name = shard(hub) if name == "model-" else name
    hub.damaged.add(name)
    with pytest.raises(WeightsError, match=f"{re.escape(name)} arrived damaged"):
        download(REPO, tmp_path)
    assert not any(path.name.startswith(name + ".") or path.name == name for path in tmp_path.iterdir())
    hub.damaged.clear()
    download(REPO, tmp_path)
    assert (tmp_path / name).read_bytes() == hub.files[name]


def test_a_partial_of_other_bytes_is_noticed(hub: Hub, tmp_path: Path):
    row = entry(shard(hub), hub.files[shard(hub)])
    file = HubFile(shard(hub), row["size"], row["lfs"]["sha256"])
    file.partial(tmp_path).write_bytes(b"?" * 100)
    with pytest.raises(WeightsError, match="arrived damaged"):
        download(REPO, tmp_path)
    download(REPO, tmp_path)
    assert (tmp_path / file.name).read_bytes() == hub.files[file.name]


def test_bytes_beyond_the_listed_size_are_not_written(hub: Hub, tmp_path: Path):
    hub.listing = hub.listed()
    row = next(row for row in hub.listing["siblings"] if row["rfilename"] == "config.json")
    row["size"] = 7
    with pytest.raises(WeightsError, match=r"config\.json arrived damaged"):
        download(REPO, tmp_path, include=["config.json"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"my own words", None])
def test_a_file_of_the_users_is_not_overwritten(hub: Hub, tmp_path: Path, data: bytes | None):
    own = hub.files["config.json"][:-1] + b" " if data is None else data  # of the same size, or of another
    (tmp_path / "config.json").write_bytes(own)
    with pytest.raises(WeightsError, match=r"config\.json exists and is not the hub's"):
        download(REPO, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == own
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_two_downloads_do_not_write_one_file(hub: Hub, tmp_path: Path):
    row = entry("config.json", hub.files["config.json"])
    with HubFile("config.json", row["size"], row["blobId"]).partial(tmp_path).open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(WeightsError, match="another download is writing"):
            download(REPO, tmp_path)


def test_a_name_that_is_no_folder(hub: Hub, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightsError, match="file cannot be used"):
        download(REPO, tmp_path / "file")


def test_a_disk_that_is_too_small(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes = sum(len(hub.files[name]) for name in hub.files if re.match(r"model|config|gen|tok|add", name))
    (tmp_path / "a").mkdir()
    for free, fits in ((sizes - 1, False), (sizes, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: types.SimpleNamespace(free=free))
        if fits:
            download(REPO, tmp_path / "b" / "c")
        else:
            with pytest.raises(OutOfMemory, match=r"needs .* more, its disk has .* free") as caught:
                download(REPO, tmp_path / "b" / "c")
            assert caught.value.exit_code == 4
            assert hub.fetched() == []
            assert not (tmp_path / "b").exists()


def test_a_disk_that_fills_up(hub: Hub, tmp_path: Path):
    name = shard(hub)
    raised, sentence = on_a_full_disk(2000, partial(download, REPO, tmp_path, include=[name]))
    assert raised == "OutOfMemory"
    assert "is full" in sentence
    download(REPO, tmp_path, include=[name])
    assert (tmp_path / name).read_bytes() == hub.files[name]


def test_globs_replace_the_choice_and_thin_it(hub: Hub, tmp_path: Path):
    download(REPO, tmp_path / "a", include=["*.md", "onnx/*"])
    assert {str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*.*")} == {
        "README.md",
        "onnx/model.safetensors",
    }
    download(REPO, tmp_path / "b", exclude=["*.safetensors", "added*"])
    assert {path.name for path in (tmp_path / "b").iterdir()} >= {"config.json", "tokenizer.json"}
    assert not list((tmp_path / "b").glob("*.safetensors"))
    assert not (tmp_path / "b" / "added_tokens.json").exists()
    with pytest.raises(WeightsError, match=r"none of the .* is asked for"):
        download(REPO, tmp_path / "c", include=["*.gguf"])


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


def test_a_token_goes_to_the_hub_alone(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    download(REPO, tmp_path / "a")
    given = {path.startswith("/storage/"): headers.get("authorization") for _, path, headers in hub.asked}
    assert given == {False: "Bearer hf_environment", True: None}
    hub.asked.clear()
    download(REPO, tmp_path / "b", token="hf_argument")
    assert {headers.get("authorization") for _, _, headers in hub.asked} == {"Bearer hf_argument", None}


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_says_how_to_be_let_in(hub: Hub, tmp_path: Path, status: int):
    hub.statuses["config.json"], hub.error_codes = [status], {status: "GatedRepo"}
    with pytest.raises(WeightsError, match=f"gated: accept its terms at {hub.endpoint}/{REPO}, then set HF_TOKEN"):
        download(REPO, tmp_path)
    hub.listing_status = status
    with pytest.raises(WeightsError, match=f"for you .HTTP {status}.: check the name, or set HF_TOKEN"):
        download(REPO, tmp_path)


def test_what_does_not_exist_is_named(hub: Hub, tmp_path: Path):
    with pytest.raises(WeightsError, match="has no model winds/other for you"):
        download("winds/other", tmp_path)
    with pytest.raises(WeightsError, match="has no revision 'v9'"):
        download(REPO, tmp_path, revision="v9")
    for name in ("https://huggingface.co/a/b", "..", "a/b/c", "", "a/", "-"):
        with pytest.raises(ConfigError, match="write OWNER/NAME"):
            download(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/x",
        "a/../../x",
        "a//x",
        "./x",
        "..",
        "",
        "a\\..\\x",
        "C:x",
        "x\0",
        "x\n",
        ".git/hooks/x",
        "a/.GIT/x",
    ],
)
def test_a_name_that_leaves_the_folder_is_refused(hub: Hub, tmp_path: Path, name: str):
    hub.listing = hub.listed()
    hub.listing["siblings"].append(entry(name, b"x"))
    with pytest.raises(WeightsError, match="do not trust it"):
        download(REPO, tmp_path / "a" / "b")
    assert hub.fetched() == []
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_meant_well_pass():
    for name in ("a/b.c", ".gitattributes", "a..b", "...", "x.git", "weights (1).bin", "模型.json"):
        assert not module._UNSAFE.search(name), name


NOT_A_HUB = [
    "<html>welcome</html>",
    "[]",
    "{}",
    json.dumps({"id": REPO, "sha": COMMIT}),
    json.dumps({"id": REPO, "sha": None, "siblings": []}),
    json.dumps({"id": REPO, "sha": "../../x", "siblings": []}),
    json.dumps({"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": "config.json"}]}),
    json.dumps({"id": REPO, "sha": COMMIT, "siblings": [entry("config.json", b"{}") | {"blobId": "../../x"}]}),
    json.dumps({"id": REPO, "sha": COMMIT, "siblings": [entry("config.json", b"{}") | {"size": -1}]}),
    json.dumps({"id": REPO, "sha": COMMIT, "siblings": [entry("config.json", b"{}") | {"size": None}]}),
    json.dumps({"id": REPO, "sha": COMMIT, "siblings": [{**entry(WEIGHTS, b"{}"), "lfs": {"size": 2}}]}),
]


@pytest.mark.parametrize("answer", NOT_A_HUB)
def test_an_answer_that_is_no_hubs(hub: Hub, tmp_path: Path, answer: str):
    hub.listing = answer
    with pytest.raises(WeightsError, match="does not list winds/tiny as a Hugging Face hub does"):
        download(REPO, tmp_path)
    assert list(tmp_path.iterdir()) == []


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


def test_no_network_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as closed:  # bound, not listening
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(WeightsError, match=r"cannot be reached .*: check the network"):
            download(REPO, tmp_path)


@pytest.mark.parametrize("endpoint", ["nonsense", "http://[", "http://127.0.0.1:99999999", "ftp://127.0.0.1"])
def test_an_endpoint_that_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(WeightsError, match=re.escape(endpoint)):
        download(REPO, tmp_path)


def test_settings_that_forbid_it(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
            download(REPO, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # set when it was imported, not any more
        with pytest.raises(ConfigError, match="is offline"):
            download(REPO, tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(ConfigError, match=r"pip install 'ostro\[hub\]'"):
            download(REPO, tmp_path)
    for wrong in ("hf_secret\n", "hf_секрет", "hf secret"):
        with pytest.raises(ConfigError, match="characters that no token has") as caught:
            download(REPO, tmp_path, token=wrong)
        assert wrong not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_\x01secret")
    with pytest.raises(ConfigError, match="characters that no token has"):
        download(REPO, tmp_path)
    assert hub.asked == []
