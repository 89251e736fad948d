"""Where a model lies that is named: at its path, or where it was fetched to from the Hugging Face hub before."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ostro.errors import WeightsError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def located(source: str | Path) -> Path:
    """Return where a checkpoint lies, absolute: `source` is a path, or OWNER/NAME of a model that was downloaded.

    The latter is looked for where `ostro download` puts it (./NAME), then in huggingface_hub's cache; nothing is
    fetched. A path that cannot be OWNER/NAME is returned whether it exists or not; raises WeightsError for OWNER/NAME
    that is nowhere.
    """
    name, path = str(source), Path(os.path.abspath(source))
    owner, _, short = name.partition("/")
    # Beside an existing folder OWNER it is a path that is misspelt, and ./NAME another thing.
    if path.exists() or not _HUB_NAME.fullmatch(name) or Path(owner).exists():
        return path
    cache = _hub_cache()
    for found in (Path(short), _snapshot(cache / f"models--{owner}--{short}")):
        if found is not None and found.is_dir():
            return Path(os.path.abspath(found))
    raise WeightsError(
        f"{path} does not exist: give a checkpoint or a run directory. If {name} is a model of the Hugging Face hub, "
        f"it is neither in ./{short} nor in {cache}: run `ostro download {name}` first."
    )


def _hub_cache() -> Path:
    """Return huggingface_hub's cache, by the variables that it reads."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _snapshot(folder: Path) -> Path | None:
    """Return the snapshot of a cached repository that `main` was when it was fetched, else the newest."""
    try:
        main = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        if main.is_dir():
            return main
    except (OSError, UnicodeDecodeError):
        pass
    return max(folder.glob("snapshots/*"), key=lambda path: path.stat().st_mtime, default=None)
