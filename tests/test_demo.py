"""The demo, cut short: every step of both acts, the last page, and each command it proposes."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ostro import demo as demos
from ostro import demo_lora
from ostro.cli import app
from ostro.demo import Summary, first_act, library, next_commands, page, split
from ostro.demo_lora import Lesson, pairs_of, second_act
from ostro.errors import ConfigError


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, first_act(folder, total_steps=32)


@pytest.fixture(scope="module")
def lesson(summary: tuple[Path, Summary]) -> Lesson:
    files = [library() / name for name in ("textwrap.py", "heapq.py", "sched.py", "calendar.py")]
    return second_act(summary[0], steps=6, files=(files[:2], files[2:]))


def test_it_trains_resumes_scores_exports_and_draws(summary: tuple[Path, Summary]) -> None:
    folder, found = summary
    assert found.steps == found.last["step"] == 32
    assert found.digest == found.undisturbed_digest
    # 32 steps are no training, so only the counts and the order of the baselines are certain.
    assert 1.5 < found.baselines.bigram < found.baselines.unigram < 3.5
    assert 1.0 < found.baselines.gzip < 3.0
    assert 2.0 < found.evaluation.bits_per_byte < 4.5
    assert (folder / "hf" / "tokenizer.json").exists()
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "undisturbed").exists()


def test_the_second_act_learns_merges_and_shows_it(
    summary: tuple[Path, Summary], lesson: Lesson, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, first = summary
    assert lesson.after.loss < lesson.before.loss - 0.1
    assert lesson.num_pairs > 10
    assert (folder / "lora" / "adapter" / "adapter_model.safetensors").exists()
    page(folder, first, lesson.rows(folder), lesson.seconds)
    shown = capsys.readouterr().out
    assert f"{lesson.before.loss:.3f} before" in shown
    assert f"{first.seconds + lesson.seconds:.0f} s" in shown
    page(folder, first)
    assert "held-out answers" not in capsys.readouterr().out


def test_short_is_the_first_act_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[str] = []
    lesson = Lesson(0, 0, 0, 0, 0.0, None, None, 0.0)  # type: ignore[arg-type]
    monkeypatch.setattr(Lesson, "rows", lambda *_: {})
    monkeypatch.setattr(demos, "first_act", lambda *_: done.append("first"))
    monkeypatch.setattr(demo_lora, "second_act", lambda *_: (done.append("second"), lesson)[1])
    monkeypatch.setattr(demos, "page", lambda *_: done.append("page"))
    for words, acts in (["--short"], ["first", "page"]), ([], ["first", "second", "page"]):
        done.clear()
        result = CliRunner().invoke(app, ["demo", *words, "--dir", str(tmp_path)])
        assert (result.exit_code, done) == (0, acts), result.output


def test_pairs_are_first_sentences_of_what_is_public() -> None:
    source = '''
class Box:
    """Hold a thing.

    And more.
    """
    def open(self):
        """Open the box
        if it is closed."""
    def _lock(self):
        """Lock the box, which nobody may."""
    def close(self):
        """close, without a sentence"""
    def size(self):
        """Size."""
'''
    assert list(pairs_of(source, "toy.box")) == [("What does toy.box.Box.open do?", "Open the box if it is closed.")]
    source = source.replace("Hold a thing.", "Hold a thing or none at all.")
    assert ("What is toy.box.Box?", "Hold a thing or none at all.") in list(pairs_of(source, "toy.box"))
    assert list(pairs_of("def broken(:", "m")) == []


def test_no_answer_is_on_both_sides() -> None:
    train, scored, held_out = split()
    assert len({*train, *scored, *held_out}) == len(train) + len(scored) + len(held_out)
    known: set[str] = set()
    asked, learned = demo_lora._pairs(held_out, known), demo_lora._pairs(train, known)
    assert min(len(learned) / 10, len(asked)) > 100
    answers = [answer.lower() for _, answer in asked + learned]
    assert len(answers) == len(set(answers))


@pytest.mark.parametrize("number", range(len(next_commands(Path("x"), has_lesson=True))))
def test_the_commands_it_proposes_work(summary: tuple[Path, Summary], lesson: Lesson, number: int) -> None:
    command = next_commands(summary[0], has_lesson=True)[number]
    said, _, command = command.rpartition(" | ")
    assert command.startswith("ostro ")
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, input=said, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_never_overwrites_what_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty and not an earlier demo: choose another with --dir"):
        first_act(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_it_replaces_an_earlier_demo(tmp_path: Path) -> None:
    (tmp_path / demos._MARKER).touch()
    (tmp_path / "run").mkdir()
    demos._clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [demos._MARKER]
