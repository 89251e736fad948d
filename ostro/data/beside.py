"""Several files that belong together: written in a hidden folder beside their places, renamed there at the end."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ostro.errors import DataError, Error, OutOfMemory


class Beside:
    """Files on the way to `targets`, which lie in one folder; none of them is there before all are whole.

    Raises DataError where a target is taken or its folder cannot be written.
    """

    def __init__(self, targets: Sequence[Path]) -> None:
        self._targets = list(targets)
        first = self._targets[0]
        with disk_errors(first):
            for target in self._targets:
                if target.exists() or target.is_symlink():
                    raise DataError(f"{target} exists already: choose another name, or remove it first.")
            first.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix=f".{first.name[:100]}.", suffix=".partial", dir=first.parent))

    def path(self, target: Path) -> Path:
        """Return where the file that becomes `target` is written."""
        return self.folder / target.name

    def keep(self) -> None:
        """Rename every file to its place, in the order of the targets; all of them, or none where one cannot be."""
        kept: list[Path] = []
        try:
            for target in self._targets:
                os.replace(self.path(target), target)
                kept.append(target)
        except BaseException:
            for target in kept:
                with contextlib.suppress(OSError):
                    target.unlink()
            raise
        finally:
            self.drop()

    def drop(self) -> None:
        """Remove whatever was not kept."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(out: Path, full: str | None = None) -> Iterator[None]:
    """Turn what the operating system says of writing `out` into a sentence; `full` is what to do when the disk is."""
    try:
        yield
    except Error:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            kept = "" if full else f", and nothing of {out} was kept"
            do = full or "make room or choose a folder on another disk"
            raise OutOfMemory(f"the disk is full{kept}: {do}.") from None
        named = f": {error.filename}" if error.filename and str(error.filename) != str(out) else ""
        raise DataError(
            f"{out} cannot be written ({error.strerror or error}{named}): change the permissions or choose another "
            "folder."
        ) from None
    except ValueError as error:  # a null character in the name
        raise DataError(f"{str(out)!r} cannot be written ({error}): choose another name.") from None
