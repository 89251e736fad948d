"""A conversation with a model, and the terminal it is held in.

Each turn is rendered as a whole, by the template and the code that training data went through; the engine's cache then
finds what it has of it already, so that a turn costs what is new in it, however long the conversation is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import yaml

from ostro import log
from ostro.data import shards, sources
from ostro.data.chat import Prompt, fitting, load_template, own_source, prompt_of
from ostro.data.pieces import Template
from ostro.data.records import Chat, Message
from ostro.data.tokenizer import Tokenizer
from ostro.errors import DataError, Error, RequestError
from ostro.serve.engine import Answer, Engine
from ostro.serve.sampling import Sampling
from ostro.weights.located import located

_FIRST_CAPACITY = 1024  # tokens that the cache has room for before it grows
# What a terminal would obey rather than show.
_UNSHOWN = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


def template_for(model: str | Path, asked: str, tokenizer: Tokenizer) -> tuple[str, Template, str]:
    """Return name and function of the template to talk to `model` with, and a note where that is a guess.

    With `asked` "auto" it is what a run (or an adapter) was trained with, else what fits the tokenizer. Raises
    DataError for a template that is not there.
    """
    name, note = asked, ""
    if name == "auto":
        name = trained_with(model) or "auto"
    if name == "auto":
        name = fitting(tokenizer)
        if not own_source(tokenizer):
            note = (
                f"{model} says nothing of a chat template, as base models do, which complete text and do not answer: "
                f"taking {name}; --template names another."
            )
    return name, load_template(name, tokenizer), note


def trained_with(model: str | Path) -> str | None:
    """Return the chat template that a run directory's model learned, None where nothing says so."""
    path = located(model)
    for folder in (path, path.parent, path.parent.parent):  # the run, or a checkpoint in it
        try:
            data = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]
            return None if data["template"] == "auto" else str(data["template"])
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
            continue
    return None


class Dialogue:
    """Questions, answers, and a system prompt; what was said is kept, and so are its keys and values.

    `turns` are the messages after the system prompt, `dropped` how many the last question made the oldest go.
    """

    def __init__(self, engine: Engine, template: Template, sampling: Sampling, system: str = "") -> None:
        self.engine, self.template, self.sampling, self.system = engine, template, sampling, system
        self.turns: list[Message] = []
        self.dropped = 0
        self._cache = engine.cache([min(_FIRST_CAPACITY, engine.model.config.max_position_embeddings)])

    def ask(self, question: str) -> Generator[str]:
        """Stream the answer; an answer that is broken off (by closing the stream) is kept as far as it came.

        Raises RequestError for a question that leaves no room for an answer, DataError for what the template cannot
        express; then nothing is kept. A question that is answered with nothing is not kept either.
        """
        self.dropped = 0
        turns, prompt = self._fitted([*self.turns, Message("user", question)])
        self.dropped = len(self.turns) + 1 - len(turns)
        room = self._limit - len(prompt.ids)
        # Another seed a turn: asked again, a question is answered anew.
        seed = (self.sampling.seed + len(turns)) % 2**63
        sampling = dataclasses.replace(self.sampling, seed=seed, max_new_tokens=min(self.sampling.max_new_tokens, room))
        answer = Answer(
            0, prompt.text, prompt.ids, self.engine.tokenizer, sampling, end_ids=prompt.end_ids, continues=False
        )
        try:
            for _, text in self.engine.steps([answer], self._cache):
                yield text
        finally:
            said = answer.completion().text
            self.turns = [*turns, Message("assistant", said)] if said.strip() else turns[:-1]

    def prompt(self, turns: list[Message]) -> Prompt:
        """Return what the model sees before it answers the last of `turns`."""
        system = [Message("system", self.system)] if self.system else []
        return prompt_of(Chat([*system, *turns], "this conversation"), self.template, self.engine.tokenizer)

    @property
    def _limit(self) -> int:
        return self.engine.model.config.max_position_embeddings

    def _fitted(self, turns: list[Message]) -> tuple[list[Message], Prompt]:
        """Return the newest turns that leave room for an answer, and what the model sees of them."""
        prompt = self.prompt(turns)
        room = self._limit - min(self.sampling.max_new_tokens, self._limit // 2)
        if len(prompt.ids) > room:
            # A good deal at once: each time this happens all that is left is computed anew.
            while len(turns) > 1 and len(prompt.ids) > room * 3 // 4:
                turns = turns[1:]
                while turns[0].role != "user":
                    turns = turns[1:]
                prompt = self.prompt(turns)
        if len(prompt.ids) >= self._limit:
            with_system = " with the system prompt" if self.system else ""
            raise RequestError(
                f"the question has {len(prompt.ids)} tokens{with_system} and the model {self._limit} positions: "
                "shorten it."
            )
        return turns, prompt

    def undo(self) -> str:
        """Take back the last question and its answer; return a sentence."""
        if not self.turns:
            return "there is nothing to take back"
        while self.turns and self.turns.pop().role != "user":
            pass
        return f"taken back; {_count(self.turns)} left"

    def save(self, file: Path) -> str:
        """Write the conversation as a line of JSON, as `ostro train` reads it; return a sentence."""
        said = [Message("system", self.system)] if self.system else []
        rows = [{"role": message.role, "content": message.content} for message in [*said, *self.turns]]
        log.write_text(file, json.dumps({"messages": rows}, ensure_ascii=False) + "\n")
        return f"saved {_count(self.turns)} to {file}"

    def load(self, file: Path) -> str:
        """Go on with the first conversation of a file of any kind that `ostro prepare` reads; return a sentence."""
        record = next((record for unit in sources.units([file]) for record in sources.read(unit)), None)
        if not isinstance(record, Chat):
            raise DataError(f"{file} holds no conversation: name a file that /save wrote, or one to train on.")
        turns = list(record.messages)
        system = [turns.pop(0).content for message in record.messages if message.role == "system"]
        if record.tools or any(turn.role not in ("user", "assistant") or turn.tool_calls for turn in turns):
            raise DataError(f"{record.where}: this conversation has tools, or a system prompt inside: name another.")
        while turns and turns[-1].role == "user":
            turns.pop()
        self.turns, self.system = turns, "\n\n".join(system)
        return f"loaded {_count(turns)}"


def _count(turns: list[Message]) -> str:
    count = sum(turn.role == "user" for turn in turns)
    return f"{count} question" + "s" * (count != 1)


def converse(dialogue: Dialogue, title: str, note: str = "", prompts: list[str] | None = None) -> None:
    """Talk until the input ends: on a terminal with prompts, history and Ctrl-C; else lines in, answers out.

    With `prompts` these are asked and nothing is read. Only answers go to stdout unless it is a terminal.
    """
    is_terminal = prompts is None and sys.stdin.isatty() and sys.stdout.isatty()
    if note:
        _note(note)
    if is_terminal:
        _note(f"{title}; /help for commands, Ctrl-D to leave")
    lines = iter(prompts) if prompts is not None else _piped()
    with _history() if is_terminal else contextlib.nullcontext():
        while True:
            try:  # all of it: Ctrl-C may come at any moment
                line = _typed() if is_terminal else next(lines, None)
                if line is None:
                    return
                if prompts is None and line.startswith("/"):
                    if not _command(dialogue, line):
                        return
                elif line.strip():
                    _answer(dialogue, line, is_terminal)
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                print()
                _note("Ctrl-D to leave")
            except Error as error:
                if not is_terminal:
                    raise
                _note(str(error))


def _answer(dialogue: Dialogue, question: str, is_terminal: bool) -> None:
    """Print an answer as it comes, and what there is to say about it."""
    said = ""
    try:
        with contextlib.closing(dialogue.ask(question)) as stream:
            for text in stream:
                said += text
                print(text.translate(_UNSHOWN) if is_terminal else text, end="", flush=True)
    except KeyboardInterrupt:
        if not is_terminal:
            raise
        print(" …", end="")
    print(flush=True)
    if dialogue.dropped:
        _note(f"the oldest {dialogue.dropped} messages were dropped: the conversation had outgrown the model.")
    if is_terminal and not said.strip():
        _note("no answer came, so the question is not kept")


def _typed() -> str | None:
    """Return the line that is typed, None for Ctrl-D."""
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _piped() -> Iterator[str]:
    while line := sys.stdin.buffer.readline():
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(f"the input is no UTF-8 ({error.reason}): convert it.") from None


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Edit lines with readline, where Python has it, and remember them from one conversation to the next."""
    try:
        import readline
    except ImportError:
        yield
        return
    file = shards.cache_dir() / "chat_history"
    readline.parse_and_bind("set enable-bracketed-paste on")  # what is pasted is one question, whatever its lines
    readline.set_history_length(1000)
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)


def _note(text: str) -> None:
    """Say something that is no answer, where it does not get among the answers."""
    import rich.console
    from rich.text import Text

    rich.console.Console(stderr=True, soft_wrap=True).print(Text(text, "dim"))


def _command(dialogue: Dialogue, line: str) -> bool:
    """Do what a line that begins with a slash asks for; return whether to go on."""
    name, _, rest = line.strip().partition(" ")
    if name == "/quit":
        return False
    if name not in COMMANDS:
        raise RequestError(f"{name} is no command: use {', '.join(COMMANDS)}; a space before it makes it a question.")
    what, do = COMMANDS[name]
    if what.startswith("FILE") and not rest:
        raise RequestError(f"{name} needs the name of a file.")
    try:
        _note(do(dialogue, rest.strip()))
    except OSError as error:
        raise RequestError(f"{rest} cannot be used ({error.strerror}): name another file.") from None
    return True


def _reset(dialogue: Dialogue, rest: str) -> str:
    dialogue.turns = []
    return "a new conversation"


def _system(dialogue: Dialogue, rest: str) -> str:
    dialogue.system = rest
    return "a new system prompt" if rest else "no system prompt"


def _help(dialogue: Dialogue, rest: str) -> str:
    return "\n".join(f"{name:<8} {what}" for name, (what, _) in COMMANDS.items())


# What each takes and does, and the function that does it and returns what to say.
COMMANDS: dict[str, tuple[str, Callable[[Dialogue, str], str]]] = {
    "/reset": ("forget the conversation; the system prompt stays", _reset),
    "/system": ("TEXT: give the model this system prompt from now on, without TEXT none", _system),
    "/undo": ("take back the last question and its answer", lambda dialogue, rest: dialogue.undo()),
    "/save": ("FILE: write the conversation, to go on with or to train on", lambda talk, rest: talk.save(Path(rest))),
    "/load": ("FILE: go on with a conversation that was written", lambda talk, rest: talk.load(Path(rest))),
    "/help": ("this", _help),
    "/quit": ("leave, as Ctrl-D does", _help),
}
