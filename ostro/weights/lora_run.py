"""A LoRA run's checkpoint as a reader: the model that it started from, corrected by what it has trained.

The checkpoint holds LoRA's tensors alone; its state says where the model itself lies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ostro.errors import ConfigError, WeightsError
from ostro.model import layout
from ostro.model.settings import LoraConfig, ModelConfig
from ostro.weights import dcp
from ostro.weights.adapters import Adapter, write_peft
from ostro.weights.dcp_file import open_tensors
from ostro.weights.merged import Merged
from ostro.weights.store import NO_HINTS, Hints, Reader, match_shapes

WHAT = "a LoRA run"


@dataclasses.dataclass(frozen=True)
class LoraRun:
    """A checkpoint of a LoRA run: its folder, what it corrects, how the model under it is opened (`Start`), and what
    the recipe calls that."""

    folder: Path
    model: ModelConfig
    adapter: Adapter
    start: Mapping[str, Any]
    base_name: str | None

    def base(self) -> Reader:
        """Open the model that the run started from; WeightsError if it is gone."""
        from ostro.weights import Start  # which opens this format, too

        path = self.start["path"]
        if path is not None and not Path(path).exists():
            raise WeightsError(
                f"{self.folder} corrects the model at {path}, which is not there: bring it back, or merge the run's "
                "folder adapter into another copy (ostro merge-lora BASE ADAPTER OUT)."
            )
        return Start(model=self.model, **self.start).open()


def detect(path: Path) -> bool:
    """Whether `path` is a LoRA run or one of its checkpoints."""
    folder = dcp.find(path) if dcp.detect(path) else None
    return folder is not None and dcp.read_state(folder).get("lora") is not None


def open_run(path: Path, step: int | None = None) -> LoraRun:
    """Read what a LoRA run has trained; WeightsError if it holds no sound checkpoint of one."""
    folder = dcp.find(path) if step is None else dcp.of_step(path, step)
    state: dict[str, Any] = {} if folder is None else dcp.read_state(folder)
    if folder is None or state.get("lora") is None:
        raise WeightsError(f"{path} holds no checkpoint of a LoRA run: give the run directory of one.")
    try:
        model = ModelConfig.from_fields(state["model"])
        lora = LoraConfig(**{**state["lora"], "targets": tuple(state["lora"]["targets"])})
        start = {key: state["data"]["weights"][key] for key in ("path", "seed", "strategy", "upcycle")}
        name = state["config"]["weights"]["path"]
    except (ConfigError, TypeError, KeyError) as error:
        raise WeightsError(f"{folder / dcp.STATE} does not say what LoRA it is of ({error}): {dcp.DAMAGED}.") from error
    file = open_tensors(folder, dcp.WEIGHTS_PREFIX)
    wanted = {name: parameter.shape for name, parameter in layout.adapter_table(model, lora).items()}
    match_shapes(str(folder), {name: info.shape for name, info in file.infos.items()}, wanted)
    adapter = Adapter(lora, {name: file.tensor(name) for name in wanted})
    return LoraRun(folder, model, adapter, start, name)


def open_reader(path: Path, hints: Hints = NO_HINTS) -> Reader:
    """Open a LoRA run as the merged model."""
    run = open_run(path, hints.step)
    return Merged(run.base(), run.adapter)


def export(path: Path, target: Path) -> None:
    """Write the newest checkpoint of a LoRA run as a folder of PEFT's, in the place of an earlier one."""
    run = open_run(path)
    write_peft(target, run.adapter, run.model, run.base_name or "", replace=True)
