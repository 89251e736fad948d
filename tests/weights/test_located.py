"""A model by its name on the hub: where it was fetched to is found, without a network; a path stays a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from ostro import weights
from ostro.errors import WeightsError
from ostro.weights.located import located

NAME = "winds/Ostro-8x1.v2"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache as huggingface_hub leaves it: two snapshots, `main` at the older one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "models--winds--Ostro-8x1.v2"
    for commit in ("c1", "c2"):
        (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c1")
    return folder


def test_a_name_is_looked_for_where_downloads_go(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert located(NAME) == cache / "snapshots" / "c1"
    (cache / "refs" / "main").write_text("gone")
    assert located(NAME).parent == cache / "snapshots"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(WeightsError, match=rf"neither in \./Ostro-8x1.v2 nor in {tmp_path}/elsewhere: run `ostro down"):
        weights.open_reader(NAME)
    (tmp_path / "Ostro-8x1.v2").mkdir()
    assert located(NAME) == tmp_path / "Ostro-8x1.v2"
    (tmp_path / NAME).mkdir(parents=True)
    assert located(NAME) == tmp_path / NAME


def test_a_path_stays_a_path(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    (tmp_path / "runs").mkdir()
    for path in ("runs/first", "./winds/first", "a/b/c", "first", str(tmp_path / "x")):  # ./first is not meant
        assert located(path) == (tmp_path / path)
    with pytest.raises(WeightsError, match="runs/first does not exist: give a checkpoint or a run directory"):
        weights.open_reader("runs/first")
