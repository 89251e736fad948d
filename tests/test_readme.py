"""The READMEs' command blocks work: those marked `bash` are run, those marked `bash needs=…` are parsed.

A block that needs more than a laptop (`bash needs=gpu`) is not run, but the command line of Ostro itself
reads each of its `ostro` lines up to the point where the verb would start. The Chinese README holds the same
commands, so what is proven for one is proven for both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh.md")
FENCE = re.compile(r"^ *(`{3,}|~{3,}) *(.*)$")
TERMINALS = ("", "sh", "shell", "zsh", "console", "shell-session", "terminal")
OPERATORS = set("();<>|&")
OUTSIDE = (
    "git",
    "cd",
    "pip",
    "python",
    "python3",
    "source",
    "export",
    "docker",
    "uv",
    "xcode-select",
    "sudo",
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A command block: the line of its first command, what it needs (empty: it is run), and its text."""

    line: int
    needs: str
    text: str

    def commands(self) -> list[str]:
        """Return its commands without comments and blank lines, continued lines joined."""
        commands = []
        for line in self.text.replace("\\\n", " ").splitlines():
            try:
                commands.append(" ".join(shlex.split(line, comments=True)))
            except ValueError:  # a line inside quotes that span several
                commands.append(line)
        return [command for command in commands if command]


def command_blocks(markdown: str) -> list[Block]:
    """Return the blocks marked `bash`; one that holds commands under another name raises ValueError."""
    blocks, fence, info, start, lines = [], "", "", 0, []
    for number, line in enumerate(markdown.splitlines(), 1):
        match = FENCE.match(line)
        if not fence and match:
            fence, info, start, lines = match[1], match[2].strip(), number + 1, []
        elif fence and match and match[1].startswith(fence) and not match[2]:
            language, _, rest = info.partition(" ")
            if language in TERMINALS:
                raise ValueError(f"line {start - 1}: mark the block bash, bash needs=… or text, not {language!r}")
            if language == "bash":
                if rest and not re.fullmatch(r"needs=\S.*", rest):
                    raise ValueError(f"line {start - 1}: after bash only needs=… may stand, not {rest!r}")
                blocks.append(Block(start, rest.removeprefix("needs="), "\n".join(lines)))
            fence = ""
        else:
            lines.append(line)
    return blocks


def simple_commands(line: str) -> list[list[str]]:
    """Split a shell line at its operators into commands of words, without assignments and redirections."""
    lexer = shlex.shlex(line.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands, redirected = [[]], False
    for word in lexer:
        if set(word) <= OPERATORS:
            redirected = word[0] in "<>"
            if not redirected:
                commands.append([])
        elif redirected:
            redirected = False
        elif commands[-1] or not re.fullmatch(r"\w+=.*", word, re.DOTALL):
            commands[-1].append(word)
    return [command for command in commands if command]


def ostro_arguments(words: list[str]) -> list[str] | None:
    """Return what `ostro …`, `python -m ostro …` or `torchrun … -m ostro …` gives to Ostro, else None."""
    if Path(words[0]).name == "ostro":
        return words[1:]
    for i in range(1, len(words) - 1):
        if words[i : i + 2] == ["-m", "ostro"]:
            return words[i + 2 :]
    return None


def parse_fault(app: typer.Typer, arguments: list[str]) -> str | None:
    """Return what the command line has against `arguments`, or None; verbs are parsed but not started."""
    command = typer.main.get_command(app)
    pending = [command]
    while pending:
        one = pending.pop()
        pending += getattr(one, "commands", {}).values()
        one.callback = None
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            command.main(arguments, prog_name="ostro", standalone_mode=True)
        except SystemExit as stop:
            return told.getvalue() or f"exit {stop.code}" if stop.code else None
    return None


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def line_faults(app: typer.Typer, targets: set[str], line: str) -> list[str]:
    """Return what is wrong with a command that is not run."""
    faults = []
    for words in simple_commands(line):
        arguments = ostro_arguments(words)
        if arguments is not None:
            fault = parse_fault(app, arguments)
            faults += [f"{shlex.join(words)}: {fault}"] if fault else []
        elif words[0] == "make":
            goals = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            faults += [f"make {goal}: the Makefile has no such target" for goal in goals if goal not in targets]
        elif words[0] not in OUTSIDE:
            faults.append(f"{words[0]}: this test does not know how to check it")
    return faults


def override_fault(arguments: list[str]) -> str | None:
    """Return what the config has against `ostro train RECIPE a.b=c …` where the recipe is a shipped one."""
    from ostro.config import load_config, recipe_names
    from ostro.errors import ConfigError

    if len(arguments) < 2 or arguments[0] != "train" or arguments[1] not in recipe_names():
        return None
    try:
        load_config(arguments[1], [word for word in arguments[2:] if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)])
    except ConfigError as error:
        return str(error)
    return None


def blocks_of(name: str) -> list[Block]:
    return command_blocks((ROOT / name).read_text("utf-8"))


@pytest.mark.timeout(900)
def test_commands_run(tmp_path: Path):
    blocks = [block for block in blocks_of("README.md") if not block.needs]
    assert blocks
    tools = Path(sys.executable).parent
    assert (tools / "ostro").exists(), "the command ostro is not installed beside this Python: run make setup"
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "100",
    }
    env.pop("XDG_CACHE_HOME", None)
    for block in blocks:
        run = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=tmp_path,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        told = run.stdout[-3000:]
        assert run.returncode == 0, f"README.md line {block.line}:\n{block.text}\nexit {run.returncode}:\n{told}"


@pytest.mark.parametrize("name", ["README.md", "docs/data.md", "docs/weights.md"])
def test_commands_that_need_more_are_understood(name: str):
    from ostro.cli import app

    targets = make_targets((ROOT / "Makefile").read_text("utf-8"))
    blocks = [block for block in blocks_of(name) if block.needs]
    assert blocks
    faults = []
    for block in blocks:
        for line in block.text.replace("\\\n", " ").splitlines():
            found = line_faults(app, targets, line)
            asked = [ostro_arguments(words) for words in simple_commands(line)]
            found += [fault for arguments in asked if arguments and (fault := override_fault(arguments))]
            faults += [f"{name} block at line {block.line}: {fault}" for fault in found]
    assert not faults, "\n".join(faults)


def test_both_readmes_hold_the_same_commands():
    english, chinese = ([(block.needs, block.commands()) for block in blocks_of(name)] for name in READMES)
    assert english == chinese


@pytest.fixture
def app() -> typer.Typer:
    """A command line with a verb, a verb that passes overrides on, and a group."""
    app, recipes = typer.Typer(), typer.Typer()

    @app.command()
    def convert(src: str, dst: str, to: str = typer.Option(...), dtype: str = "bf16") -> None:
        raise AssertionError("a parsed verb must not start")

    @app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def train(recipe: str) -> None:
        raise AssertionError("a parsed verb must not start")

    @recipes.command("ls")
    def ls() -> None:
        raise AssertionError("a parsed verb must not start")

    app.add_typer(recipes, name="recipes")
    return app


@pytest.mark.parametrize(
    "line",
    [
        "ostro convert a b --to hf  # a comment",
        "ostro train tiny optim.betas=[0.9,0.95] --train.steps 5",
        "torchrun --nproc-per-node 8 -m ostro train tiny",
        "python -m ostro recipes ls",
        "OMP_NUM_THREADS=1 ostro recipes ls > recipes.txt && ostro --help",
        "make setup PYTHON=python3.12",
        "git clone URL && cd ostro && make test",
        "# only a comment",
    ],
)
def test_good_lines_pass(app: typer.Typer, line: str):
    assert line_faults(app, {"setup", "test"}, line) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("ostro convert a b --to hf --turbo", "--turbo"),
        ("ostro convert a b", "--to"),
        ("ostro convert a --to hf", "Missing argument"),
        ("ostro recipes ls extra", "extra"),
        ("ostro recipes rm", "rm"),
        ("ostro fly", "fly"),
        ("git pull; ostro fly", "fly"),
        ("torchrun -m ostro fly", "fly"),
        ("make dinner", "no such target"),
        ("frobnicate", "does not know"),
    ],
)
def test_bad_lines_are_noticed(app: typer.Typer, line: str, fault: str):
    assert fault in "\n".join(line_faults(app, {"setup"}, line))


def test_overrides_are_checked_against_the_config():
    assert override_fault(["train", "tiny", "train.steps=5", "--nproc-per-node", "2"]) is None
    assert "train.stepps" in (override_fault(["train", "tiny", "train.stepps=5"]) or "")
    assert override_fault(["train", "mine.yaml", "train.stepps=5"]) is None


def test_blocks_are_found_with_what_they_need():
    first, second = "```bash\nostro demo\n```\n", "```bash needs=a GPU\nostro train \\\n  tiny # now\n\n```\n"
    text = f"# A\n{first}\n{second}```text\nout\n```\n"
    assert command_blocks(text) == [
        Block(3, "", "ostro demo"),
        Block(7, "a GPU", "ostro train \\\n  tiny # now\n"),
    ]
    assert command_blocks(text)[1].commands() == ["ostro train tiny"]


@pytest.mark.parametrize("info", ["sh", "console", "", "bash run=no", "bash needs="])
def test_commands_cannot_hide_under_another_name(info: str):
    with pytest.raises(ValueError, match="line 1"):
        command_blocks(f"```{info}\nostro fly\n```\n")


def test_targets_of_the_makefile():
    targets = make_targets((ROOT / "Makefile").read_text("utf-8"))
    assert targets == {"help", "setup", "demo", "test", "check", "parity", "faults", "bench", "interop", "clean"}
