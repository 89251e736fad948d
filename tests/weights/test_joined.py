"""Hosts without a shared disk: their folders make one checkpoint again, with the optimizer, or it is said why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_models import random
from test_parts import LAYOUTS, MODEL, STATE, cut, full
from worlds import run_in_world

from ostro.cli import main
from ostro.degrees import Degrees
from ostro.errors import WeightsError
from ostro.weights import dcp, digest, open_reader
from ostro.weights.joined import join
from ostro.weights.parts import hold, load_held
from ostro.weights.saver import Saver

TWO_HOSTS = (Degrees(dp=2), Degrees(pp=2, fsdp=2, ep=2), Degrees(fsdp=2, tp=2, ep=2, etp=2))


def _save(directory: Path, degrees: Degrees) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    saver = Saver(directory / f"host{rank * 2 // size}" / "checkpoints", 5, dist.group.WORLD)
    for step in (1, 2, 3):
        saver.save(step, cut(full(step), degrees, rank), STATE | {"step": step})
    assert [saved.error for saved in saver.finish()] == [None] * 3


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[Degrees, Path]:
    found = {}
    for degrees in TWO_HOSTS:
        found[degrees] = tmp_path_factory.mktemp("hosts")
        run_in_world(degrees.num_ranks, _save, found[degrees], degrees)
    return found


@pytest.fixture
def hosts(written: dict[Degrees, Path], tmp_path: Path) -> list[Path]:
    """The folders of two hosts, which may be damaged."""
    shutil.copytree(written[TWO_HOSTS[1]], tmp_path / "of")
    return [tmp_path / "of" / f"host{host}" for host in (0, 1)]


def test_hosts_with_one_layout_each_make_a_checkpoint(
    written: dict[Degrees, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, folder in enumerate(written.values()):
        target = tmp_path / f"{number}"
        hosts = [str(folder / f"host{host}") for host in (1, 0)]
        assert main(["convert", *hosts, str(target), "--to", "dcp"]) == 0
        said = capsys.readouterr().out
        assert "of step-00000003 of 2 hosts" in said
        assert "checkpoints/step-00000003 of the run directory" in said
        filled = {name: torch.zeros_like(tensor) for name, tensor in full().items()}
        assert load_held(target, hold(filled)) == STATE
        assert all(torch.equal(filled[name], tensor) for name, tensor in full(3).items())
        assert digest(open_reader(target)) == digest(random(MODEL, seed=3))


def test_a_step_can_be_chosen_and_the_newest_common_one_is_taken(hosts: list[Path], tmp_path: Path) -> None:
    assert join(hosts, tmp_path / "first", 1).name == "step-00000001"
    assert dcp.read_state(tmp_path / "first")["step"] == 1
    dcp.hide(hosts[1] / "checkpoints" / "step-00000003")
    assert join(hosts, tmp_path / "newest").name == "step-00000002"
    with pytest.raises(WeightsError, match="holds no whole checkpoint of step 3; it has 1, 2"):
        join(hosts, tmp_path / "third", 3)
    shutil.rmtree(hosts[1] / "checkpoints")
    (hosts[1] / "checkpoints").mkdir()
    with pytest.raises(WeightsError, match="hold no step that is whole in all of them"):
        join(hosts, tmp_path / "none")


def test_folders_that_do_not_belong_together_are_refused(
    hosts: list[Path], written: dict[Degrees, Path], tmp_path: Path
) -> None:
    steps = [host / "checkpoints" / "step-00000002" for host in hosts]
    other = written[LAYOUTS[2]] / "host1" / "checkpoints" / "step-00000002"
    for sources, sentence in (
        ([steps[0], other], "not of the same checkpoint, save differs"),
        ([steps[0], steps[1].with_name("step-00000003")], "not of the same checkpoint, save differs"),
        ([steps[0], steps[0]], "are both host 0's: give each once"),
        ([steps[0]], r"do not make up .*, the folder of host 1 is missing: give the folders of all hosts"),
    ):
        with pytest.raises(WeightsError, match=sentence):
            join(sources, tmp_path / "out")
    state = json.loads((steps[1] / "state.json").read_text())
    for step in steps:
        (step / "state.json").write_text(json.dumps({key: state[key] for key in ("step", "model")}))
    with pytest.raises(WeightsError, match="is not a host's part of a checkpoint but a whole one: convert it alone"):
        join(steps, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_host_that_held_only_what_others_have_may_be_missing(written: dict[Degrees, Path], tmp_path: Path) -> None:
    join([written[Degrees(dp=2)] / "host1"], tmp_path / "out")
    assert digest(open_reader(tmp_path / "out")) == digest(random(MODEL, seed=3))


def test_other_options_are_for_what_comes_of_it(
    hosts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in (["--to", "hf"], ["--verify"], ["--dtype", "bf16"]):
        assert main(["convert", *map(str, hosts), str(tmp_path / "out"), *options]) == 2
        assert "joined with --to dcp and at most --step" in " ".join(capsys.readouterr().err.split())
    assert main(["convert", str(hosts[0]), str(tmp_path / "out"), "--to", "hf"]) == 5
    assert "ostro convert HOSTDIR… DST --to dcp" in capsys.readouterr().err
