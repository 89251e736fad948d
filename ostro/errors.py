"""Every error a user may see.

    Error                 exit 1   something failed that is not one of the below
    ├── ConfigError       exit 2   a setting, a recipe, a command line
    │   └── LayoutError   exit 2   degrees of parallelism that do not fit the model or the machine
    ├── DataError         exit 3   text, records, token shards
    ├── OutOfMemory       exit 4   what was asked does not fit
    ├── WeightsError      exit 5   checkpoints
    ├── TrainError        exit 1   a run that cannot go on
    └── RequestError      exit 2   what was asked of generation or of the server

A message is one sentence that says what was asked, what is true, and what to change. `cli.main` prints it and exits
with `exit_code`; a traceback in front of a user is a bug. `assert` is for our own invariants only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Error(Exception):
    """Root of everything Ostro raises on purpose."""

    exit_code = 1


class ConfigError(Error):
    """A setting, a recipe or an argument is wrong."""

    exit_code = 2


class LayoutError(ConfigError):
    """Degrees of parallelism do not fit the model or the devices."""


class DataError(Error):
    """Text, records or token shards cannot be used."""

    exit_code = 3


class OutOfMemory(Error):
    """What was asked does not fit into memory or onto the disk."""

    exit_code = 4


class WeightsError(Error):
    """A checkpoint cannot be read or written."""

    exit_code = 5


class TrainError(Error):
    """A run cannot go on."""


class RequestError(Error):
    """A prompt or a sampling setting cannot be served."""

    exit_code = 2


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the known name most like `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""
