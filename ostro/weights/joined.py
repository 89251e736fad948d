"""Training checkpoints of hosts that share no disk, brought together: one that any layout can load."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ostro.errors import WeightsError
from ostro.weights import dcp
from ostro.weights.dcp_file import open_tensors, write_tensors
from ostro.weights.folder import written_beside
from ostro.weights.reshard import Box, GatheredFile, is_covered, shared
from ostro.weights.store import TensorInfo

_OF_A_HOST = ("host", "num_hosts", "save")


def join(sources: Sequence[Path], target: Path, step: int | None = None) -> Path:
    """Write what the hosts' folders hold, weights and optimizer, as one checkpoint; return the first one's folder.

    Each source is a host's checkpoint, the folder of its checkpoints, or its run directory; of several steps the newest
    that all have, or `step`. What several hosts hold is taken from the first. Raises WeightsError for folders of
    different saves or runs, and for a host that is missing and alone held something.
    """
    folders = _same_step(sources, step)
    states = [dcp.read_state(folder) for folder in folders]
    _require_together(folders, states)
    files = [open_tensors(folder, "", is_partial=True) for folder in folders]
    owners = _owners(folders, files)
    infos = {name: info for file in reversed(files) for name, info in file.infos.items()}
    present = {state["host"] for state in states}
    missing = next((host for host in range(states[0]["num_hosts"]) if host not in present), None)
    for name, boxes in owners.items():
        if (
            not is_covered(infos[name].shape, boxes)
            or shared(boxes)
            or (missing is not None and "save" not in states[0])
        ):
            whose = "they are of different layouts" if missing is None else f"the folder of host {missing} is missing"
            raise WeightsError(
                f"the folders given do not make up {name}, {whose}: give the folders of all hosts of one run."
            )

    def values(name: str) -> Iterator[tuple[Box, Tensor]]:
        return ((box, file.tensor(name, box.where)) for box, file in owners[name].items())

    state = {key: value for key, value in states[0].items() if key not in _OF_A_HOST}
    num_bytes = sum(info.num_bytes for info in infos.values())
    with written_beside(target, needed_bytes=num_bytes + (1 << 20)) as partial:
        (partial / dcp.STATE).write_text(json.dumps(state, indent=1) + "\n", "utf-8")
        write_tensors(partial, ((name, info, values(name)) for name, info in infos.items()))
    return folders[0]


def _same_step(sources: Sequence[Path], step: int | None) -> list[Path]:
    """Return the checkpoint of each source: itself, or the one of the newest step that all folders of several have."""
    found = [dcp.steps(path) | dcp.steps(path / "checkpoints") for path in sources]
    several = [set(steps) for path, steps in zip(sources, found, strict=True) if not dcp.is_whole(path)]
    common = set.intersection(*several) if several else set()
    if several and step is None and not common:
        raise WeightsError(
            f"{', '.join(map(str, sources))} hold no step that is whole in all of them: give the folders of all hosts "
            "of one run."
        )
    chosen = max(common) if step is None and common else step
    return [
        path if dcp.is_whole(path) else steps[chosen] if chosen in steps else dcp.of_step(path, chosen or 0)
        for path, steps in zip(sources, found, strict=True)
    ]


def _require_together(folders: Sequence[Path], states: Sequence[Mapping[str, Any]]) -> None:
    for folder, state in zip(folders, states, strict=True):
        for key in ("num_hosts", "save", "step", "model"):
            if state.get(key) != states[0].get(key):
                raise WeightsError(
                    f"{folders[0]} and {folder} are not of the same checkpoint, {key} differs: give the folders that "
                    "the hosts wrote of one step of one run."
                )
    if not all(isinstance(state.get(key), int) for state in states for key in ("host", "num_hosts")):
        raise WeightsError(f"{folders[0]} is not a host's part of a checkpoint but a whole one: convert it alone.")
    hosts = [state.get("host") for state in states]
    for at, host in enumerate(hosts):
        if host in hosts[:at]:
            raise WeightsError(
                f"{folders[hosts.index(host)]} and {folders[at]} are both host {host}'s: give each once."
            )


def _owners(folders: Sequence[Path], files: Sequence[GatheredFile]) -> dict[str, dict[Box, GatheredFile]]:
    """Return who is to give each box of each tensor."""
    owners: dict[str, dict[Box, GatheredFile]] = {}
    infos: dict[str, TensorInfo] = {}
    for folder, file in zip(folders, files, strict=True):
        for name, info in file.infos.items():
            if infos.setdefault(name, info) != info:
                raise WeightsError(
                    f"{folders[0]} and {folder} hold {name} in different shapes or types: they are of different runs."
                )
            for box in file.boxes(name):
                owners.setdefault(name, {}).setdefault(box, file)
            owners.setdefault(name, {})
    return owners
