"""Training checkpoints through torch.distributed.checkpoint: `checkpoints/step-00000100`, whole or absent.

A folder holds DCP's own files, with tensors only, and `state.json` with everything else (step, data position,
random states, the model's and the run's configuration). Nothing in it is unpickled except DCP's `.metadata`,
and that by a reader that knows a dozen harmless classes and refuses all others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ostro.degrees import Degrees, host_ranks, stage_of
from ostro.errors import ConfigError, WeightsError
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights.dcp_file import DAMAGED, METADATA, open_tensors, write_tensors
from ostro.weights.folder import not_written, written_beside
from ostro.weights.hf_config import SaveTokenizer, save_tokenizer
from ostro.weights.reshard import Box, whole
from ostro.weights.store import (
    NO_HINTS,
    Hints,
    Reader,
    TensorInfo,
    Where,
    match_depth,
    match_shapes,
    printable,
    stack_sizes,
)

WHAT = "a training checkpoint (a step-… folder, the checkpoints folder around it, or its run directory)"
WEIGHTS_PREFIX = "model."  # "model." + canonical name; the optimizer's tensors have other prefixes

STATE = "state.json"
BEST = "best"
_STEP = re.compile(r"step-(\d{8,18})")


def read_state(folder: Path) -> dict[str, Any]:
    """Return the JSON state of a checkpoint without touching its tensors."""
    if not is_whole(folder):
        raise WeightsError(f"{folder} is not a whole checkpoint: it lacks {STATE} or {METADATA}; take another.")
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{folder / STATE} cannot be read ({error}): {DAMAGED}.") from error
    if not isinstance(state, dict):
        raise WeightsError(f"{folder / STATE} is not a JSON object: {DAMAGED}.")
    return state


def step_folder(directory: Path, step: int) -> Path:
    """Return where the checkpoint of a step belongs."""
    return directory / f"step-{step:08d}"


def latest(directory: Path) -> Path | None:
    """Return the newest whole checkpoint in a folder of them, or None."""
    found = steps(directory)
    return found[max(found)] if found else None


def best(directory: Path) -> Path | None:
    """Return the whole checkpoint that is marked as the best in a folder of them, or None."""
    found = directory / BEST
    return directory / found.readlink() if found.is_symlink() and is_whole(found) else None


def mark_best(directory: Path, step: int) -> None:
    """Mark the checkpoint of a step as the best: a link, so that any verb takes its path for a model."""
    beside = directory / f"{BEST}.partial"
    beside.unlink(missing_ok=True)
    try:
        beside.symlink_to(step_folder(directory, step).name)
        beside.replace(directory / BEST)
    except OSError as error:
        raise not_written(directory / BEST, error) from error


def prune(directory: Path, keep: int, step: int | None = None) -> None:
    """Remove all but the newest `keep` whole checkpoints and the best, and what interrupted saves left behind.

    With `step` later ones are neither counted nor removed: they are of a save that another host did not finish.
    """
    spared = best(directory)
    found = {n: folder for n, folder in steps(directory).items() if (step is None or n <= step) and folder != spared}
    for number in sorted(found)[: max(0, len(found) - keep)]:
        hide(found[number])
    sweep(directory)


def hide(folder: Path) -> None:
    """Make of a checkpoint what `sweep` removes: a removal that is interrupted must not leave one that looks whole."""
    old = folder.with_name(f"{folder.name}.partial-old")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rename(old)


def sweep(directory: Path) -> None:
    """Remove what interrupted saves left behind."""
    for stale in directory.glob("step-*.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)


def find(path: Path) -> Path | None:
    """Return the checkpoint that a path stands for: itself, or the newest whole one of a run or folder."""
    return path if is_whole(path) else latest(path) or latest(path / "checkpoints")


def of_step(path: Path, step: int) -> Path:
    """Return the checkpoint of a step in a run directory or a folder of checkpoints."""
    found = steps(path) | steps(path / "checkpoints")
    if step not in found:
        raise WeightsError(
            f"{path} holds no whole checkpoint of step {step}; it has {', '.join(map(str, sorted(found))) or 'none'}: "
            "choose one of those."
        )
    return found[step]


class CheckpointReader:
    """The weights of a training checkpoint as a reader; WeightsError if it holds no sound model."""

    format = "dcp"

    def __init__(self, path: Path, step: int | None = None, *, is_partial: bool = False) -> None:
        folder = find(path) if step is None else of_step(path, step)
        if folder is None:
            raise WeightsError(
                f"{path} holds no whole training checkpoint: the run was interrupted before its first one; "
                "resume it or give another folder."
            )
        self.path = folder
        self.notes = (f"the checkpoint is {folder.name}",) if folder != path else ()
        state = read_state(folder)
        fields = state.get("model")
        if not isinstance(fields, dict):
            raise WeightsError(f"{folder / STATE} does not say what model it is of: {DAMAGED}.")
        try:
            self.model = ModelConfig.from_fields(fields)
        except (ConfigError, TypeError) as error:
            raise WeightsError(f"{folder / STATE}: {printable(str(error))}") from error
        if "host" in state and not is_partial:
            raise WeightsError(
                f"{folder} holds only what host {state['host']} of {state.get('num_hosts')} needs: give the checkpoint "
                "that it was made from, or bring all hosts' together first: ostro convert HOSTDIR… DST --to dcp."
            )
        self._file = open_tensors(folder, WEIGHTS_PREFIX, is_partial=is_partial)
        held = self._file.infos
        if not is_partial:
            match_depth(str(folder), held, self.model)
        table = layout.table(self.model)
        wanted = {name: parameter.shape for name, parameter in table.items() if name in held or not is_partial}
        match_shapes(str(folder), {name: info.shape for name, info in held.items()}, wanted)
        self._infos = {name: held[name] for name in wanted}

    def names(self) -> dict[str, TensorInfo]:
        """Return every tensor of the table that is there, with the dtype it was trained in."""
        return self._infos

    def read(self, name: str, where: Where = ()) -> Tensor:
        """Return a slice: a view of the mapped file where one shard holds it."""
        return self._file.tensor(name, where)


def detect(path: Path) -> bool:
    """Whether `path` looks like this format, whole or not."""
    around = (path, path / "checkpoints")
    return (path / METADATA).exists() or any(any(folder.glob("step-*")) for folder in around)


def open_reader(path: Path, hints: Hints = NO_HINTS) -> CheckpointReader:
    """Open a checkpoint, a folder of them, or a run directory."""
    return CheckpointReader(path, hints.step, is_partial=bool(hints.partial))


def write(
    reader: Reader,
    path: Path,
    *,
    degrees: Degrees | None = None,
    host: tuple[int, int] | None = None,
    tokenizer: SaveTokenizer = None,
) -> None:
    """Write the weights alone as a training checkpoint: one piece in memory at a time.

    With `degrees` and `host` (i, n) only what the ranks of host i of n need is written, in the boxes they need, for
    clusters without a shared disk. Every host's folder has metadata of its own. A tokenizer goes into `tokenizer/`.
    """
    state: dict[str, Any] = {"model": reader.model.as_fields()}
    wanted = None
    if degrees is not None:
        degrees.check(reader.model)
        index, num_hosts = host or (0, 1)
        wanted = host_ranks(degrees.num_ranks, index, num_hosts)
        state["layout"] = dataclasses.asdict(degrees)
        if num_hosts > 1:
            state |= {"host": index, "num_hosts": num_hosts}
    infos = reader.names()
    table = layout.parameters(reader.model)
    found = ((p, infos[p.name], _boxes(p, reader.model, degrees, wanted)) for p in table)
    plan = [(parameter, info, boxes) for parameter, info, boxes in found if boxes is not None]
    num_bytes = sum(box.num_elements * info.dtype.itemsize for _, info, boxes in plan for box in boxes)

    def values(parameter: layout.Parameter, boxes: Sequence[Box]) -> Iterator[tuple[Box, Tensor]]:
        return ((box, reader.read(parameter.name, box.where)) for box in boxes)

    with written_beside(path, needed_bytes=num_bytes + (1 << 20)) as folder:
        (folder / STATE).write_text(json.dumps(state, indent=1) + "\n", "utf-8")
        if tokenizer is not None:
            (folder / "tokenizer").mkdir()
            save_tokenizer(tokenizer, folder / "tokenizer")
        write_tensors(folder, ((WEIGHTS_PREFIX + p.name, info, values(p, boxes)) for p, info, boxes in plan))


def _boxes(
    parameter: layout.Parameter, model: ModelConfig, degrees: Degrees | None, ranks: range | None
) -> list[Box] | None:
    """Return the boxes to write of a parameter: its pieces, or what the ranks hold of it; None if their stages have
    no such parameter."""
    shape = parameter.shape
    if degrees is None or ranks is None:
        return list(_cut(whole(shape), len(stack_sizes(parameter))))
    last = degrees.pp - 1
    if parameter.layer is not None:
        stages = {stage_of(parameter.layer, model.num_hidden_layers, degrees.pp)}
    elif parameter.kind is layout.EMBEDDING:
        stages = {0, last} if model.tie_word_embeddings else {0}  # a tied one is the last stage's head as well
    else:
        stages = {last}
    holding = [rank for rank in ranks if rank * degrees.pp // degrees.num_ranks in stages]
    held = (degrees.box(rank, parameter.kind.dims, shape, None) for rank in holding)
    # None of it may be theirs, where it is small; DCP wants its name all the same.
    whole_boxes = [Box(*box) for box in dict.fromkeys(held) if box is not None]
    return [part for box in whole_boxes for part in _cut(box, len(stack_sizes(parameter)))] if holding else None


def _cut(box: Box, num_dims: int) -> Iterator[Box]:
    """Cut a box of a stack along its leading dims, so that one matrix is in memory at a time."""
    for stack in itertools.product(*(range(o, o + n) for o, n in zip(box.offsets, box.sizes[:num_dims], strict=False))):
        yield Box((*stack, *box.offsets[num_dims:]), (1,) * num_dims + box.sizes[num_dims:])


def is_whole(folder: Path) -> bool:
    """Whether a folder is a checkpoint that was written to its end."""
    is_final = ".partial-" not in folder.name
    return is_final and (folder / STATE).is_file() and (folder / METADATA).is_file()


def steps(directory: Path) -> dict[int, Path]:
    """Return the whole checkpoints in a folder of them, by step."""
    if not directory.is_dir():
        return {}
    named = ((_STEP.fullmatch(path.name), path) for path in directory.iterdir())
    return {int(match[1]): path for match, path in named if match and is_whole(path)}
