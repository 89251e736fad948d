"""The verb convert: what it says, what it refuses, and how it ends when something stops it."""

from __future__ import annotations

import dataclasses
import faulthandler
import hashlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import save
from torch import Tensor

from ostro import weights
from ostro.cli import main
from ostro.config import preset
from ostro.data.tokenizer import load_tokenizer
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights import FORMATS, RandomReader, Reader, Where, convert, dcp, digest, open_reader

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
W2 = "model.layers.1.block_sparse_moe.experts.w2"


class Altered:
    """A reader whose tensors pass through `alter(name, where, tensor)`."""

    format, notes = "altered", ()

    def __init__(self, source: Reader, alter: Callable[[str, Where, Tensor], Tensor]) -> None:
        self.model = source.model
        self._source, self._alter = source, alter

    def names(self) -> Any:
        return self._source.names()

    def read(self, name: str, where: Where = ()) -> Tensor:
        return self._alter(name, where, self._source.read(name, where).clone())


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "a bug of Ostro's" not in captured.err
    return code, captured.out, " ".join(captured.err.split())


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model without a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "hf"
    convert(RandomReader(SMALL), folder, to="hf")
    return folder


def entries(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# What is said


@pytest.mark.parametrize("to", WRITABLE)
def test_every_format_and_back_by_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path, to: str
) -> None:
    code, out, err = run(capsys, "convert", hf, tmp_path / "x", "--to", to)
    assert (code, err) == (0, "")
    num_bytes = sum(info.num_bytes for info in RandomReader(SMALL).names().values())
    assert f"{hf}: hf, {layout.num_parameters(SMALL):,} parameters in float32, {num_bytes / 1e3:.1f} kB" in out
    assert f"wrote {tmp_path / 'x'} as {to}, " in out
    code, out, _ = run(capsys, "convert", tmp_path / "x", tmp_path / "y")
    assert code == 0
    assert f"{tmp_path / 'x'}: {to}, " in out
    assert f"wrote {tmp_path / 'y'} as hf" in out
    assert digest(open_reader(tmp_path / "y")) == digest(RandomReader(SMALL))


@pytest.mark.parametrize(("name", "to"), [("x.ckpt", "mindspore"), ("x.gguf", "gguf"), ("x", "hf"), ("x.d", "hf")])
def test_the_targets_name_says_its_format(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path, name: str, to: str
) -> None:
    code, out, _ = run(capsys, "convert", hf, tmp_path / name)
    assert code == 0
    assert f"wrote {tmp_path / name} as {to}," in out
    assert (tmp_path / name).is_file() == (to in ("mindspore", "gguf"))


def test_a_ckpt_may_be_for_the_grouped_products(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    code, out, _ = run(capsys, "convert", hf, tmp_path / "x.ckpt", "--to", "mindspore-gmm")
    assert code == 0
    assert "as mindspore-gmm" in out
    code, out, _ = run(capsys, "convert", tmp_path / "x.ckpt", tmp_path / "y", "--model", hf / "config.json")
    assert code == 0
    assert "x.ckpt: mindspore-gmm," in out
    assert digest(open_reader(tmp_path / "y")) == digest(RandomReader(SMALL))


def test_the_preset_that_fits_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    convert(RandomReader(preset("tiny")), tmp_path / "x.ckpt", to="mindspore", dtype=torch.bfloat16)
    code, out, _ = run(capsys, "convert", tmp_path / "x.ckpt", tmp_path / "y", "--to", "dcp")
    assert code == 0
    assert re.search(r"^  .*sizes are those of tiny$", out, re.MULTILINE)
    assert "parameters in bfloat16" in out


def test_a_file_that_no_preset_fits_wants_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    code, out, _ = run(capsys, "convert", hf, tmp_path / "x.ckpt")
    assert code == 0
    assert "keep the model's config.json" in out
    code, _, err = run(capsys, "convert", tmp_path / "x.ckpt", tmp_path / "y")
    assert code == 5
    assert "--model" in err
    assert not (tmp_path / "y").exists()
    assert run(capsys, "convert", tmp_path / "x.ckpt", tmp_path / "y", "--model", hf / "config.json")[0] == 0
    assert digest(open_reader(tmp_path / "y")) == digest(RandomReader(SMALL))


def test_the_step_that_was_taken_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for step in (3, 12):
        reader = RandomReader(SMALL, step)
        tensors = {dcp.WEIGHTS_PREFIX + name: reader.read(name) for name in reader.names()}
        folder = dcp.step_folder(tmp_path / "run" / "checkpoints", step)
        save(folder, tensors, {"step": step, "model": SMALL.as_fields()})
    code, out, _ = run(capsys, "convert", tmp_path / "run", tmp_path / "newest")
    assert code == 0
    assert "step-00000012" in out
    code, out, _ = run(capsys, "convert", tmp_path / "run", tmp_path / "older", "--step", 3)
    assert code == 0
    assert "step-00000003" in out
    assert digest(open_reader(tmp_path / "newest")) == digest(RandomReader(SMALL, 12))
    assert digest(open_reader(tmp_path / "older")) == digest(RandomReader(SMALL, 3))
    code, _, err = run(capsys, "convert", tmp_path / "run", tmp_path / "none", "--step", 4)
    assert code == 5
    assert "step 4" in err
    assert "3, 12" in err


@pytest.mark.parametrize("to", WRITABLE)
def test_verify_prints_the_digest_of_all_values(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path, to: str
) -> None:
    code, out, _ = run(capsys, "convert", hf, tmp_path / "x", "--to", to, "--verify")
    assert code == 0
    total = hashlib.sha256()
    for name in RandomReader(SMALL).names():
        total.update(RandomReader(SMALL).read(name).numpy().tobytes())
    assert re.findall(r"sha256[a-z ]* ([0-9a-f]{64})\b", out) == [total.hexdigest()]


def test_verify_finds_what_was_written_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound: Any = FORMATS["hf"].write

    def write(reader: Reader, path: Path, **settings: Any) -> Any:
        return sound(Altered(reader, lambda name, _, t: t + 1 if name == "model.norm.weight" else t), path, **settings)

    monkeypatch.setitem(FORMATS, "hf", dataclasses.replace(FORMATS["hf"], write=write))
    code, out, err = run(capsys, "convert", hf, tmp_path / "x", "--verify")
    assert code == 5
    assert "model.norm.weight was read back with other values" in err
    assert "sha256" not in out
    code, out, _ = run(capsys, "convert", hf, tmp_path / "y")
    assert code == 0


def test_norms_and_router_stay_in_fp32(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    code, out, _ = run(capsys, "convert", hf, tmp_path / "x", "--dtype", "bf16", "--keep-fp32", "--verify")
    assert code == 0
    assert "sha256" in out
    kept = {name for name, info in open_reader(tmp_path / "x").names().items() if info.dtype == torch.float32}
    assert kept == {name for name in RandomReader(SMALL).names() if "norm" in name or "gate" in name}


# Options that do not go together


CONFLICTS: list[tuple[list[str], str]] = [
    (["--to", "hff"], "Did you mean 'hf'?"),
    (["--to", "random"], "--to random is not one of"),
    (["--to", "hf", "--layout", "fsdp=2"], "--layout is for"),
    (["--to", "mistral", "--layout", "fsdp=2"], "--layout is for"),
    (["--to", "dcp", "--host", "0/2"], "give --layout too"),
    (["--to", "dcp", "--layout", "fsdp=2", "--host", "0"], "--host '0' must be i/n"),
    (["--to", "dcp", "--layout", "fsdp=2", "--host", "0/0"], "--host '0/0' must be i/n"),
    (["--to", "dcp", "--layout", "fsdp=2", "--host", "2/2"], "hosts are counted from 0 to 1"),
    (["--to", "dcp", "--layout", "fsdp=3", "--host", "0/2"], "3 ranks cannot be shared evenly by 2 hosts"),
    (["--to", "dcp", "--layout", "fsdp=2", "--host", "0/2", "--verify"], "--verify reads a whole checkpoint"),
    (["--to", "dcp", "--layout", "fspd=2"], "Did you mean 'fsdp'?"),
    (["--to", "dcp", "--layout", "tp=4"], "tp=4 does not divide num_key_value_heads=2"),
    (["--to", "mindspore", "--layout", "fsdp=2"], "'fsdp' is no degree here"),
    (["--to", "mindspore", "--layout", "dp=2", "--qkv-concat"], "layout"),
    (["--keep-fp32"], "give --dtype too"),
    (["--dtype", "fp8"], "dtype 'fp8' is not one of"),
    (["--to", "mindspore", "--optimizer"], "this is hf: leave it out"),
    (["--to", "hf", "--optimizer"], "--optimizer is for"),
    (["--to", "hf", "--qkv-concat"], "--qkv-concat is for"),
    (["--to", "mistral", "--quantize", "q8_0"], "--quantize is for gguf, not for mistral: leave it out"),
    (["--step", "3"], "--step says nothing about"),
    (["--strategy", "nowhere"], "--strategy nowhere does not exist"),
    (["--from", "hff"], "Did you mean 'hf'?"),
    (["--from", "dcp", "--model", "tiny"], "--model says nothing about"),
    (["--tokenizer", "v1"], "--tokenizer v1 has 32000 pieces and the model 48"),
]


@pytest.mark.parametrize(("options", "sentence"), CONFLICTS, ids=[" ".join(options) for options, _ in CONFLICTS])
def test_options_that_do_not_go_together(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path, options: list[str], sentence: str
) -> None:
    code, _, err = run(capsys, "convert", hf, tmp_path / "deep" / "x", *options)
    assert code == 2, err
    assert sentence in err
    assert err.startswith("ostro: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "to"), [("x.ckpt", "hf"), ("x.ckpt", "dcp"), ("x.ckpt", "gguf"), ("x.gguf", "mindspore"), ("x.gguf", "hf")]
)
def test_a_name_of_another_format(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path, name: str, to: str
) -> None:
    code, _, err = run(capsys, "convert", hf, tmp_path / name, "--to", to)
    assert code == 2
    assert f"{tmp_path / name} names a" in err
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_not_empty_stays_as_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("precious")
    (tmp_path / "y.gguf").write_text("precious")
    for target in ("x", "y.gguf"):
        code, _, err = run(capsys, "convert", hf, tmp_path / target)
        assert code == 5
        assert f"{tmp_path / target} exists" in err
    assert entries(tmp_path) == ["x", "x/mine", "y.gguf"]
    assert (tmp_path / "y.gguf").read_text() == (tmp_path / "x" / "mine").read_text() == "precious"


def test_a_hosts_part_by_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    common = ("convert", hf, "--to", "mindspore", "--layout", "dp=2,pp=2")
    assert run(capsys, *common, tmp_path / "all", "--verify")[0] == 0
    assert digest(open_reader(tmp_path / "all")) == digest(RandomReader(SMALL))
    assert run(capsys, *common, tmp_path / "second", "--host", "1/2")[0] == 0
    ranks = sorted(path.name for path in (tmp_path / "second" / "checkpoint").iterdir())
    assert ranks == ["rank_2", "rank_3"]
    for file in (tmp_path / "second" / "checkpoint").rglob("*.ckpt"):
        same = tmp_path / "all" / file.relative_to(tmp_path / "second")
        assert file.read_bytes() == same.read_bytes()
    common = ("convert", hf, "--to", "dcp", "--layout", "fsdp=2,pp=2")
    assert run(capsys, *common, tmp_path / "part", "--host", "1/2")[0] == 0
    code, _, err = run(capsys, "convert", tmp_path / "part", tmp_path / "y")
    assert code == 5
    assert "holds only what host 1 of 2 needs" in err


# The tokenizer


def with_vocabulary(folder: Path, size: int, tokenizer: Any = None) -> Path:
    model = dataclasses.replace(SMALL, vocab_size=size, hidden_size=8, num_hidden_layers=1)
    convert(RandomReader(model), folder, to="hf", tokenizer=tokenizer)
    return folder


@pytest.mark.parametrize("to", ["hf", "mistral", "mindspore"])
def test_the_sources_own_tokenizer_goes_along(capsys: pytest.CaptureFixture[str], tmp_path: Path, to: str) -> None:
    source = with_vocabulary(tmp_path / "source", 32000, load_tokenizer("v1").save)
    (source / "tokenizer_config.json").write_text('{"mine": true}')
    code, out, _ = run(capsys, "convert", source, tmp_path / "x", "--to", to)
    assert code == 0
    assert "without a tokenizer" not in out
    copied = [name for name in os.listdir(tmp_path / "x") if name.startswith(("tokenizer", "special_tokens"))]
    assert "tokenizer.model" in copied
    for name in copied:
        assert (tmp_path / "x" / name).read_bytes() == (source / name).read_bytes()
    if to == "hf":
        assert "tokenizer_config.json" in copied


@pytest.mark.parametrize(("size", "name"), [(32000, "v1"), (32768, "v3")])
def test_the_built_in_tokenizer_of_the_vocabularys_size_goes_along(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, size: int, name: str
) -> None:
    source = with_vocabulary(tmp_path / "source", size)
    for to in ("hf", "dcp"):
        code, out, _ = run(capsys, "convert", source, tmp_path / to, "--to", to)
        assert code == 0
        assert "without a tokenizer" not in out
    text = "Guten Tag, wie geht's? 你好 [INST]"
    assert load_tokenizer(tmp_path / "hf").encode(text) == load_tokenizer(name).encode(text)
    for file in (tmp_path / "dcp" / "tokenizer").iterdir():
        assert file.read_bytes() == (tmp_path / "hf" / file.name).read_bytes()
    assert (tmp_path / "dcp" / "tokenizer" / "tokenizer.model").is_file()


def test_that_none_fits_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    code, out, _ = run(capsys, "convert", hf, tmp_path / "x")
    assert code == 0
    assert "without a tokenizer" in out
    assert "--tokenizer" in out
    assert not [name for name in entries(tmp_path) if "tokenizer" in name]


def test_a_tokenizer_that_is_named_goes_along(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = with_vocabulary(tmp_path / "source", 40000)
    assert "without a tokenizer" in run(capsys, "convert", source, tmp_path / "x")[1]
    code, out, _ = run(capsys, "convert", source, tmp_path / "y", "--tokenizer", "v1")
    assert code == 0
    assert "without a tokenizer" not in out
    assert load_tokenizer(tmp_path / "y").vocab_size == 32000


# What stops it


class Slow:
    """A reader that takes a while for each piece, and says when it has given some."""

    def __init__(self, source: Reader, started: Any) -> None:
        self.format, self.model, self.notes = source.format, source.model, source.notes
        self._source, self._started, self._num_reads = source, started, 0

    def names(self) -> Any:
        return self._source.names()

    def read(self, name: str, where: Where = ()) -> Tensor:
        self._num_reads += 1
        if self._num_reads == 9:
            self._started.set()
        time.sleep(0.003 if self._num_reads < 9 else 0.2)
        return self._source.read(name, where)


def _child(arguments: list[str], log: Path, started: Any, limit_bytes: int | None) -> None:
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    faulthandler.dump_traceback_later(55, file=sys.stderr)  # should it hang
    torch.set_num_threads(1)  # the parent's threads are not in a forked child
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts us in the background ignores it
    if started is not None:
        opened = weights.open_reader
        weights.open_reader = lambda path, *rest: Slow(opened(path, *rest), started)
    if limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    log.with_suffix(".code").symlink_to(str(main(arguments)))  # a link has no bytes: it fits on a full disk


def in_child(log: Path, *arguments: object, stop: int | None = None, limit_bytes: int | None = None) -> tuple[int, str]:
    """Run a verb in a forked process; send it the signal `stop` when it is in the middle. Return its code and words."""
    context = multiprocessing.get_context("fork")
    started = context.Event() if stop is not None else None
    words = [str(argument) for argument in arguments]
    process = context.Process(target=_child, args=(words, log, started, limit_bytes), daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while started is not None and process.is_alive() and time.monotonic() < deadline and not started.wait(0.02):
        pass
    if stop is not None:
        os.kill(process.pid or 0, stop)
    process.join(60)
    is_hanging = process.is_alive()
    process.kill()
    assert not is_hanging, log.read_text()
    return int(os.readlink(log.with_suffix(".code"))), " ".join(log.read_text().split())


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("to", WRITABLE)
def test_an_interrupted_conversion_leaves_nothing_and_says_where_it_was(
    tmp_path: Path, hf: Path, to: str, stop: int
) -> None:
    place = tmp_path / "models"
    place.mkdir()
    (place / "other").write_text("other")
    code, said = in_child(tmp_path / "log", "convert", hf, place / "new" / "x", "--to", to, stop=stop)
    assert code == 130, said
    assert re.search(r"stopped at model\.\S+, after [\d.]+ k?B; ", said), said
    assert f"{place / 'new' / 'x'} was not touched" in said
    assert "wrote" not in said
    assert entries(place) == ["other"]


def test_a_folder_that_was_there_is_still_empty(tmp_path: Path, hf: Path) -> None:
    (tmp_path / "x").mkdir()
    code, _ = in_child(tmp_path / "log", "convert", hf, tmp_path / "x", stop=signal.SIGTERM)
    assert code == 130
    assert entries(tmp_path) == ["log", "log.code", "x"]


def test_an_interrupt_from_within_the_reading_thread(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(name: str, where: Where, tensor: Tensor) -> Tensor:
        if name == W2:
            raise KeyboardInterrupt
        return tensor

    opened = weights.open_reader
    monkeypatch.setattr(weights, "open_reader", lambda path, *rest: Altered(opened(path, *rest), interrupt))
    before = signal.getsignal(signal.SIGTERM)
    for to in WRITABLE:
        code, out, _ = run(capsys, "convert", hf, tmp_path / "x", "--to", to)
        assert code == 130
        assert "stopped at model.layers." in out
        assert f"{tmp_path / 'x'} was not touched" in out
        assert entries(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("limit_bytes", [3000, 20_000])
@pytest.mark.parametrize("to", WRITABLE)
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, hf: Path, to: str, limit_bytes: int) -> None:
    place = tmp_path / "models"
    place.mkdir()
    code, said = in_child(
        tmp_path / "log", "convert", hf, place / "x", "--to", to, limit_bytes=limit_bytes
    )  # the log needs some too
    assert code == 4, said
    assert "could not be written whole" in said
    assert "choose another disk" in said
    assert "wrote" not in said
    assert entries(place) == []


def test_a_source_that_fails_in_the_middle(capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path) -> None:
    """A value that fp16 cannot hold is found when most has been written."""
    convert(
        Altered(RandomReader(SMALL), lambda name, _, t: t.fill_(1e6) if name == "lm_head.weight" else t),
        tmp_path / "source",
        to="hf",
    )
    code, _, err = run(capsys, "convert", tmp_path / "source", tmp_path / "x", "--dtype", "fp16")
    assert code == 5
    assert "lm_head.weight has 768 of 768 values that float16 cannot hold" in err
    assert "was not touched" in err
    assert not (tmp_path / "x").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_path_is_what_it_is_from_wherever_one_stands(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(capsys, "convert", hf, tmp_path / "run", "--to", "mindspore", "--layout", "dp=2,mp=1")[0] == 0
    for place, path in (("checkpoint", "."), ("checkpoint/rank_0", ".."), ("checkpoint/rank_1", "checkpoint_1.ckpt")):
        monkeypatch.chdir(tmp_path / "run" / place)
        _, out, err = run(capsys, "inspect", path, "--quick")
        assert "2 ranks in 1 stage of" in out, (place, err)


def test_targets_that_nothing_can_be_renamed_to_are_refused_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, _, err = run(capsys, "convert", hf, ".")
    assert (code, "name a new folder inside it" in err) == (5, True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert run(capsys, "convert", hf, "link")[0] == 0
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_tokenizer_that_does_not_fit_stays_behind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hf: Path
) -> None:
    source = Path(shutil.copytree(hf, tmp_path / "source"))
    load_tokenizer("v1").save(source)
    code, out, _ = run(capsys, "convert", source, tmp_path / "x")
    assert code == 0
    assert "without a tokenizer: the source's has 32000 pieces and the model" in out
    assert not (tmp_path / "x" / "tokenizer.json").exists()
