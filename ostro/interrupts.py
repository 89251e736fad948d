"""How a run is stopped from outside: SIGTERM and SIGINT end it after the step."""

from __future__ import annotations

import os
import signal
from typing import Any


class Signals:
    """Between enter and exit, SIGTERM and SIGINT are noted in `caught`; a second one does not tear the save."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def _note(self, number: int, frame: Any) -> None:
        if self.caught is None:
            # Past Python's buffers: a signal may arrive in the middle of a print.
            os.write(2, b"\nstopping after this step, then saving; kill -9 stops without\n")
        self.caught = number

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: whoever runs us there owns the signals
                break
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
