"""The demo, cut short: every step of it, its last page, and each command it proposes."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ostro import demo as demos
from ostro.demo import Summary, demo, next_commands
from ostro.errors import ConfigError


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, demo(folder, total_steps=32)


def test_it_trains_resumes_scores_exports_and_draws(summary: tuple[Path, Summary]) -> None:
    folder, found = summary
    assert found.steps == found.last["step"] == 32
    assert found.digest == found.undisturbed_digest
    # 32 steps are no training, so only the counts and the order of the baselines are certain.
    assert 1.5 < found.baselines.bigram < found.baselines.unigram < 3.5
    assert 1.0 < found.baselines.gzip < 3.0
    assert 2.0 < found.evaluation.bits_per_byte < 4.5
    assert found.peak_memory_bytes < 4e9
    assert (folder / "hf" / "tokenizer.json").exists()
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "undisturbed").exists()


@pytest.mark.parametrize("number", range(len(next_commands(Path("x")))))
def test_the_commands_it_proposes_work(summary: tuple[Path, Summary], number: int) -> None:
    command = next_commands(summary[0])[number]
    assert command.startswith("ostro ")
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_never_overwrites_what_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty and not an earlier demo: choose another with --dir"):
        demo(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_it_replaces_an_earlier_demo(tmp_path: Path) -> None:
    (tmp_path / demos._MARKER).touch()
    (tmp_path / "run").mkdir()
    demos._clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [demos._MARKER]
