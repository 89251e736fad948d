"""Who else keeps a run's numbers: each tracker gets the same scalars, is closed, and goes on where the run does."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from ostro import trackers
from ostro.errors import ConfigError
from ostro.log import Metrics

ROW = {"step": 3, "loss": 2.5, "tokens": 300, "expert_load": [[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]}
SCALARS = {"loss": 2.5, "tokens": 300, "expert_load_max/0": 0.5, "expert_load_max/1": 0.6}
CONFIG = {"train": {"steps": 5}, "run": {"dir": "x"}}


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for key, value in contents.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def follow(run_dir: Path, name: str, step: int = 2, picture: Path | None = None) -> None:
    metrics = Metrics(run_dir, step, [name], CONFIG)
    metrics.write(ROW)
    metrics.close(picture)


def test_wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = MagicMock(id="abc")
    init = MagicMock(return_value=run)
    install(monkeypatch, "wandb", init=init, Image=lambda file: f"image of {file}")
    monkeypatch.setenv("WANDB_PROJECT", "winds")
    follow(tmp_path, "wandb", picture=Path("load.png"))
    asked = init.call_args.kwargs
    assert (asked["project"], asked["name"], asked["id"], asked["config"]) == ("winds", tmp_path.name, None, CONFIG)
    assert run.log.call_args_list[0].args == (SCALARS,)
    assert run.log.call_args_list[0].kwargs == {"step": 3}
    assert run.log.call_args_list[1].args == ({"expert_load": "image of load.png"},)
    run.finish.assert_called_once_with()
    follow(tmp_path, "wandb")
    assert init.call_args.kwargs["id"] == "abc"


def test_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = MagicMock()
    client.get_experiment_by_name.return_value = None
    client.create_run.return_value = SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    install(monkeypatch, "mlflow")
    install(monkeypatch, "mlflow.tracking", MlflowClient=lambda: client)
    install(monkeypatch, "mlflow.entities", Metric=lambda *fields: fields, Param=lambda *fields: fields)
    follow(tmp_path, "mlflow", picture=Path("load.png"))
    parameters, metrics = client.log_batch.call_args_list
    assert parameters.kwargs["params"] == [("train.steps", "5"), ("run.dir", "x")]
    assert {(name, value, step) for name, value, _, step in metrics.args[1]} == {(k, v, 3) for k, v in SCALARS.items()}
    client.log_artifact.assert_called_once_with("r1", "load.png")
    client.set_terminated.assert_called_once_with("r1")
    follow(tmp_path, "mlflow")
    client.create_run.assert_called_once()
    assert client.log_batch.call_args.args[0] == "r1"


def test_trackio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = MagicMock()
    names = ("init", "log", "finish", "Image")
    install(monkeypatch, "trackio", **{name: getattr(module, name) for name in names})
    follow(tmp_path, "trackio", step=0)
    module.init.assert_called_once_with(project="ostro", name=tmp_path.name, config=CONFIG, resume="never")
    module.log.assert_called_once_with(SCALARS, step=3)
    module.finish.assert_called_once_with()
    follow(tmp_path, "trackio", picture=Path("load.png"))
    assert module.init.call_args.kwargs["resume"] == "allow"
    module.Image.assert_called_once_with("load.png")


def test_tensorboard_is_the_default_where_it_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[Path] = []
    tracker = trackers.Tracker(lambda row: None, lambda picture: None)
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", lambda place: opened.append(place.run_dir) or tracker)
    there = {"tensorboard": True}
    monkeypatch.setattr(importlib.util, "find_spec", there.get)
    for names in (None, [], ["tensorboard"]):
        Metrics(tmp_path, 0, names).close()
    assert opened == [tmp_path, tmp_path]
    there.clear()
    Metrics(tmp_path, 0).close()
    assert len(opened) == 2


def test_one_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"names wandb, .* pip install 'ostro\[wandb\]'"):
        trackers.require(["wandb"])
    with pytest.raises(ConfigError, match=r"ostro\[mlflow\]"):
        Metrics(tmp_path, 0, ["mlflow"])


def test_what_was_noted_survives(tmp_path: Path) -> None:
    place = trackers.Place(tmp_path, 0, {})
    for name in ("wandb", "mlflow"):
        with trackers._remembered(place, name) as known:
            known["id"] = name
    assert json.loads((tmp_path / "trackers.json").read_text()) == {
        "wandb": {"id": "wandb"},
        "mlflow": {"id": "mlflow"},
    }
