"""The verbs one begins with: the demo, what this machine has, the shipped recipes, a recipe of MindFormers' YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    directory: Annotated[Path, typer.Option("--dir", help="Where everything is written.")] = Path("runs/demo"),
    *,
    short: Annotated[bool, typer.Option("--short", help="Without the second act, fine-tuning with LoRA.")] = False,
) -> None:
    """Run the main job end to end on the Python standard library's own text; nothing is downloaded."""
    from ostro.demo import first_act, page
    from ostro.demo_lora import second_act

    summary = first_act(directory)
    if short:
        return page(directory, summary)
    lesson = second_act(directory)
    return page(directory, summary, lesson.rows(directory), lesson.seconds)


def doctor() -> None:
    """Check what this machine has: pass, warn or fail."""
    from ostro import doctor as doctors

    checks = doctors.doctor()
    doctors.render(checks)
    raise typer.Exit(doctors.exit_status(checks))


def recipes_ls() -> None:
    """List the recipes and the model presets."""
    from ostro import config

    typer.echo("recipes: " + ", ".join(config.recipe_names()))
    typer.echo("models:  " + ", ".join(config.preset_names()))


def recipes_cp(name: str, file: Path) -> None:
    """Copy a recipe to FILE, to be changed."""
    from ostro import config
    from ostro.errors import ConfigError

    source = config.recipe_path(name)
    if file.exists():
        raise ConfigError(f"{file} exists: choose another name.")
    file.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    typer.echo(f"wrote {file}")


def migrate(
    file: Annotated[Path, typer.Argument(help="A MindFormers YAML for Mixtral.")],
    out: Annotated[Path | None, typer.Argument(help="The recipe to write; printed unless given.")] = None,
) -> None:
    """Turn a MindFormers YAML into a recipe that says of each setting what became of it."""
    from ostro.migrate import migrate as run_migrate

    run_migrate(file, out, typer.echo)
