"""The verbs, one line each; what they take stands in `verbs`.

Errors of ours are printed as one sentence and end with their exit code (errors.py); `--debug` shows the traceback.
"""

from __future__ import annotations

import errno
import sys
from typing import Annotated

import typer

from ostro.verbs import models, start, training, weights

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}  # a.b=c

app = typer.Typer(
    name="ostro",
    help="Mixtral from text to a model that writes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="List and copy the shipped recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
recipes_app.command("ls")(start.recipes_ls)
recipes_app.command("cp")(start.recipes_cp)

app.command()(start.demo)
app.command()(start.doctor)
app.command()(start.migrate)
app.command()(training.prepare)
app.command(context_settings=_OVERRIDES)(training.train)
app.command(context_settings=_OVERRIDES)(training.plan)
app.command()(training.report)
app.command()(models.evaluate)
app.command()(models.routing)
app.command()(weights.convert)
app.command()(weights.merge_lora)
app.command()(weights.inspect)
app.command()(weights.download)
app.command()(weights.verify)
app.command()(models.generate)
app.command()(models.chat)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
) -> None:
    """Mixtral from text to a model that writes."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    from ostro.errors import Error, OutOfMemory

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = app(args=arguments, standalone_mode=False)
        return status if isinstance(status, int) else 0
    except Error as error:
        if "--debug" in arguments:
            raise
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted.", 130)
    except MemoryError:
        return _fail("this machine's memory is not enough.", OutOfMemory.exit_code)
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _foreign(error)


def _foreign(error: Exception) -> int:
    if isinstance(error, BrokenPipeError):  # whoever read our output has had enough
        sys.stdout = None
        return 0
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _FULL):
        return _fail(f"{error.filename or 'the disk'}: {error.strerror}.", 4 if error.errno in _FULL else 1)
    if isinstance(error, typer.Abort):
        return _fail("interrupted.", 130)
    show = getattr(error, "show", None)
    if show is not None:  # a usage error, of click or of the copy of it that newer typers carry
        show()
        return 2
    if any(words in str(error).lower() for words in ("out of memory", "can't allocate memory", "tried to allocate")):
        return _fail(f"the device's memory is not enough: {error}", 4)
    return _fail(f"{type(error).__name__}: {error} (a bug of Ostro's; --debug shows where)", 1)


def _fail(sentence: str, exit_code: int) -> int:
    import rich.console
    import rich.text

    console = rich.console.Console(stderr=True, soft_wrap=True)
    console.print(rich.text.Text("ostro: ", style="bold red") + rich.text.Text(sentence))
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
