"""`download` against a hub of our own on this machine: it lists, redirects, breaks off, damages and refuses."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import socket
import sys
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import huggingface_hub.errors
import huggingface_hub.hf_api
import pytest
import torch
from disk import on_a_full_disk
from hub_server import COMMIT, REPO, Hub, entry, serving
from small_models import TINY

from ostro.errors import ConfigError, OutOfMemory, WeightsError
from ostro.weights import RandomReader, convert, open_reader
from ostro.weights import download as module
from ostro.weights.download import HubFile, download

WEIGHTS = "model.safetensors"


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
    hub.cuts[name] = [1000, 0, 700, 0, 0, 0, 0]  # five times in a row it would have given up
    download(REPO, tmp_path)
    assert (tmp_path / name).read_bytes() == hub.files[name]
    ranges = [headers.get("range") for _, path, headers in hub.asked if path == f"/storage/{name}"]
    assert ranges == [None, "bytes=1000-", "bytes=1000-"] + ["bytes=1700-"] * 5
    assert {headers["accept-encoding"] for _, path, headers in hub.asked if "/api/" not in path} == {"identity"}
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


def test_bytes_beyond_the_listed_size_are_not_written(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.listing = hub.listed()
    row = next(row for row in hub.listing["siblings"] if row["rfilename"] == "config.json")
    row["size"], most = 7, 0

    class Watched(HubFile):
        def is_at(self, path: Path) -> bool:
            nonlocal most
            most = path.stat().st_size
            return super().is_at(path)

    monkeypatch.setattr(module, "HubFile", Watched)
    with pytest.raises(WeightsError, match=r"config\.json arrived damaged"):
        download(REPO, tmp_path, include=["config.json"])
    assert most == 7
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


def test_a_link_to_nowhere_is_not_followed(hub: Hub, tmp_path: Path):
    (tmp_path / "config.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WeightsError, match=r"config\.json exists and is not the hub's"):
        download(REPO, tmp_path)


def test_a_partial_of_another_revision_is_left_alone(hub: Hub, tmp_path: Path):
    name = shard(hub)
    old = HubFile(name, 100, "0" * 64).partial(tmp_path)
    old.write_bytes(b"?" * 50)
    download(REPO, tmp_path)
    assert (tmp_path / name).read_bytes() == hub.files[name]
    assert old.read_bytes() == b"?" * 50


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


def test_what_has_arrived_needs_no_room(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = shard(hub)
    hub.cuts[name] = [1000] + [0] * 5
    with pytest.raises(WeightsError, match="goes on"):
        download(REPO, tmp_path, include=[name])
    free_bytes = len(hub.files[name]) - 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free_bytes))
    download(REPO, tmp_path, include=[name])
    assert (tmp_path / name).read_bytes() == hub.files[name]


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


def test_a_token_goes_to_the_hub_alone(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    download(REPO, tmp_path / "a")
    given = {path.startswith("/storage/"): headers.get("authorization") for _, path, headers in hub.asked}
    assert given == {False: "Bearer hf_environment", True: None}
    hub.asked.clear()
    download(REPO, tmp_path / "b", token="hf_argument")
    given = {path.partition("/")[2][:3]: headers.get("authorization") for _, path, headers in hub.asked}
    assert given == {"api": "Bearer hf_argument", "win": "Bearer hf_argument", "sto": None}


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
