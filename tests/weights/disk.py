"""A disk that is full: in a child process whose files may not grow beyond a limit."""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from typing import Any


def on_a_full_disk(limit_bytes: int, function: Callable[..., Any], *args: Any) -> tuple[str, str]:
    """Run `function(*args)` where no file grows beyond `limit_bytes`; return what it raises."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=_run, args=(send, limit_bytes, function, args), daemon=True
    )
    process.start()
    send.close()
    try:
        return receive.recv()
    finally:
        process.join()


def _run(send: Any, limit_bytes: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    try:
        function(*args)
    except BaseException as error:
        send.send((type(error).__name__, str(error)))
    else:
        send.send(("", "nothing was raised"))
