"""A conversation: what the model sees is what it learned from, a turn costs what is new, a terminal is a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

import pytest

from ostro import weights
from ostro.cli import main
from ostro.data import chat as templates
from ostro.data.records import Message
from ostro.data.tokenizer import load_tokenizer
from ostro.errors import DataError, RequestError
from ostro.model.settings import ModelConfig
from ostro.serve.chat import Dialogue, template_for
from ostro.serve.engine import Answer, Engine
from ostro.serve.load import load_model
from ostro.serve.sampling import Sampling
from ostro.weights.store import RandomReader

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "initializer_range": 0.3,
}
POSITIONS = 160


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    reader = RandomReader(ModelConfig.from_fields({**SMALL, "max_position_embeddings": 4096}), 3)
    weights.convert(reader, folder, to="hf", tokenizer=load_tokenizer("v1").save)
    return folder


@pytest.fixture(scope="module")
def engine() -> Engine:
    reader = RandomReader(ModelConfig.from_fields({**SMALL, "max_position_embeddings": POSITIONS}), 3)
    return Engine(load_model(reader, "fp32"), load_tokenizer("v1"))


def dialogue(engine: Engine, sampling: Sampling | None = None, system: str = "", name: str = "mistral-v1") -> Dialogue:
    return Dialogue(engine, templates.TEMPLATES[name], sampling or Sampling(6), system)


def alone(engine: Engine, talk: Dialogue, turns: list[Message], sampling: Sampling) -> str:
    """The answer to the last of `turns`, computed from nothing."""
    prompt = talk.prompt(turns)
    answer = Answer(0, "", prompt.ids, engine.tokenizer, sampling, end_ids=prompt.end_ids, continues=False)
    return "".join(text for _, text in engine.steps([answer], engine.cache([8])))


def computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each forward pass from now on."""
    counts: list[int] = []
    forward = engine._forward

    def counted(cache, sequences, pieces):
        counts.append(sum(map(len, pieces)))
        return forward(cache, sequences, pieces)

    monkeypatch.setattr(engine, "_forward", counted)
    return counts


@pytest.mark.parametrize("name", ["mistral-v1", "vicuna"])
def test_each_answer_is_the_one_from_nothing_and_costs_what_is_new(
    engine: Engine, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = dialogue(engine, Sampling(6), "Be brief." if name == "mistral-v1" else "Brief.", name)
    counts, seen = computed(engine, monkeypatch), 0
    for question in ("How are you?", "And you?", "é", "Then what"):
        before = list(talk.turns)
        del counts[:]
        said = "".join(talk.ask(question))
        prefill = counts[0]
        assert said == alone(engine, talk, [*before, Message("user", question)], Sampling(6))
        assert talk.turns[len(before) :] == [Message("user", question), Message("assistant", said)]
        prompt = talk.prompt([*before, Message("user", question)]).ids
        # All of the prompt but what the cache had; of the last answer at most its last token is not in the cache,
        # unless its text is written in other tokens than it was said in.
        assert prefill <= len(prompt) - seen
        seen = len(prompt)
    assert not talk.dropped


def test_a_sampled_answer_is_drawn_anew_each_turn_and_the_same_each_time(engine: Engine) -> None:
    sampling = Sampling(6, temperature=1.0, seed=2)
    said = [
        ["".join(talk.ask("Hi")) for _ in range(3)] for talk in (dialogue(engine, sampling), dialogue(engine, sampling))
    ]
    assert said[0] == said[1]
    assert len(set(said[0])) == 3


def test_an_answer_that_is_broken_off_is_kept_as_far_as_it_came(engine: Engine) -> None:
    talk = dialogue(engine, Sampling(40))
    with contextlib.closing(talk.ask("Tell me")) as stream:
        begun = "".join(next(stream) for _ in range(5))
    assert talk.turns == [Message("user", "Tell me"), Message("assistant", begun)]
    turns = [*talk.turns, Message("user", "Go on")]
    assert "".join(talk.ask("Go on")) == alone(engine, talk, turns, Sampling(40))
    with contextlib.closing(talk.ask("Nothing")):
        pass  # before its first token
    assert talk.turns[:-1] == turns


def test_the_oldest_turns_are_dropped_when_the_model_has_no_room(engine: Engine) -> None:
    talk = dialogue(engine, Sampling(20), "Be brief.")
    dropped = []
    for at in range(9):
        "".join(talk.ask(f"Question {at} of some length"))
        dropped.append(talk.dropped)
        prompt = talk.prompt(talk.turns[:-1])
        assert len(prompt.ids) + 20 <= POSITIONS
        assert "Be brief." in prompt.text
        assert talk.turns[0].role == "user"
    assert 0 < sum(count > 0 for count in dropped) < 4  # not at every turn, each of which computes all anew
    assert all(count % 2 == 0 for count in dropped)
    with pytest.raises(RequestError, match=r"the question has \d+ tokens with the system prompt and the model 160"):
        "".join(talk.ask("word " * 200))
    kept = list(talk.turns)
    assert "".join(talk.ask("word " * 120))  # room for a shorter answer
    assert talk.dropped == len(kept)


def test_undo_save_and_load(engine: Engine, tmp_path: Path) -> None:
    talk = dialogue(engine, system="Be brief.")
    first, second = ("".join(talk.ask(question)) for question in ("One", "Two\nlines"))
    assert talk.save(tmp_path / "talk.jsonl") == f"saved 2 questions to {tmp_path / 'talk.jsonl'}"
    said = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [row["content"] for row in said] == ["Be brief.", "One", first, "Two\nlines", second]
    assert talk.undo() == "taken back; 1 question left"
    assert "".join(talk.ask("Two\nlines")) == second
    other = dialogue(engine)
    assert other.load(tmp_path / "talk.jsonl") == "loaded 2 questions"
    assert (other.turns, other.system) == (talk.turns, talk.system)
    (tmp_path / "a.txt").write_text("no conversation")
    with pytest.raises(DataError, match=r"a\.txt holds no conversation"):
        other.load(tmp_path / "a.txt")


def test_the_template_is_what_was_trained_with_or_a_guess_with_a_note(model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("v1")
    name, template, note = template_for(model, "auto", tokenizer)
    assert (name, template) == ("mistral-v1", templates.mistral_v1)
    assert "says nothing of a chat template" in note
    assert template_for(model, "vicuna", tokenizer)[1:] == (templates.vicuna, "")
    (tmp_path / "checkpoints" / "step-3").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("data: {template: vicuna}")
    for path in (tmp_path, tmp_path / "checkpoints" / "step-3"):
        assert template_for(path, "auto", tokenizer) == ("vicuna", templates.vicuna, "")


def test_lines_in_answers_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: Engine
) -> None:
    talk = dialogue(engine, system="Be brief.")
    meant = ["".join(talk.ask(question)) for question in ("One", "Two")]
    arguments = ["chat", str(model), "--system", "Be brief.", "--max-new-tokens", "6", "--dtype", "fp32"]
    typed = b"One\n\nTwo\r\n/undo\nTwo\n/quit\nnever asked\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{meant[0]}\n{meant[1]}\n{meant[1]}\n"
    assert "taken back; 1 question left" in captured.err
    (tmp_path / "turns.txt").write_text("One\nTwo\n")
    assert main([*arguments, "--prompts", str(tmp_path / "turns.txt")]) == 0
    assert capsys.readouterr().out == f"{meant[0]}\n{meant[1]}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"/rest\n")))
    assert main(arguments) == 2
    assert "/rest is no command: use /reset," in capsys.readouterr().err

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "_forward", interrupted)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"One\nTwo\n")))
    assert main(arguments) == 130  # a pipe has nobody who could want to go on


class Terminal:
    """A program in a terminal of its own: what it writes, what is typed."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.pid, self.file = pty.fork()
        if not self.pid:
            os.execvpe(command[0], command, env)
        self.seen = ""

    def until(self, text: str, seconds: float = 150) -> str:
        """Return what comes up to `text`, and forget it."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            if not select.select([self.file], [], [], max(0, end - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} did not come: {self.seen!r}")
            try:
                self.seen += os.read(self.file, 4096).decode("utf-8", "replace")
            except OSError:  # the other end is closed
                raise AssertionError(f"it ended: {self.seen!r}") from None
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def end(self) -> int:
        """Wait for its end; return the exit code."""
        while True:
            try:
                if not os.read(self.file, 4096):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.timeout(180)
def test_a_terminal_streams_stops_remembers_and_leaves(model: Path, tmp_path: Path, engine: Engine) -> None:
    env = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "TERM": "dumb", "OMP_NUM_THREADS": "1"}
    meant = "".join(dialogue(engine, Sampling(6)).ask("Say something"))
    command = [sys.executable, "-m", "ostro", "chat", str(model), "--max-new-tokens", "4000", "--dtype", "fp32"]
    shown = Terminal(command, env)
    try:
        assert "template mistral-v1, 4,096 positions" in shown.until("> ")
        shown.type("Say something\n")
        shown.until("\n")
        shown.until(meant)  # long before all 4,000 tokens are there
        os.kill(shown.pid, signal.SIGINT)
        shown.until(" …")
        shown.until("> ")
        shown.type("\x03")  # at the prompt
        shown.until("Ctrl-D to leave")
        shown.until("> ")
        shown.type(f"/save {tmp_path / 'talk.jsonl'}\n")
        shown.until("saved 1 question")
        shown.until("> ")
        shown.type("\x1b[A\x1b[A\n")  # up, up: the first question again
        assert "Say something" in shown.until("\n")
        os.kill(shown.pid, signal.SIGINT)
        shown.until("> ")
        shown.type("/oops\n")
        shown.until("/oops is no command")
        shown.until("> ")
        shown.type("\x04")
        assert shown.end() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(shown.pid, signal.SIGKILL)
    question, answer = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert question["content"] == "Say something"
    assert answer["content"].startswith(meant)
    assert (tmp_path / "ostro" / "chat_history").read_text().splitlines()[0] == "Say something"
