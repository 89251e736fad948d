"""Where a run's numbers go beside metrics.jsonl: TensorBoard, and services that keep many runs.

Each is an extra of its own name, and reads from the environment (offline modes, servers, projects) what it always does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ostro.errors import ConfigError

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Tracker:
    """`write(row)` takes one step's row of metrics; `close(picture)` ends it, with a PNG of the expert load or None."""

    write: Callable[[Row], None]
    close: Callable[[Path | None], None]


@dataclasses.dataclass(frozen=True)
class Place:
    """What a tracker is told of the run: its directory, the step it starts after, its config."""

    run_dir: Path
    step: int
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.run_dir.resolve().name


def require(names: Sequence[str]) -> None:
    """Raise ConfigError that names the extra where a tracker asked for is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"run.trackers names {name}, which is not installed: pip install 'ostro[{name}]'.")


def open_trackers(names: Sequence[str] | None, place: Place) -> list[Tracker]:
    """Open the trackers of a run; None is TensorBoard where it is installed."""
    if names is None:
        # Asked for by its own name first: torch's wrapper takes seconds to import even where TensorBoard is absent.
        names = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    require(names)
    return [TRACKERS[name](place) for name in names]


def scalars(row: Row) -> dict[str, Any]:
    """Return the numbers of a row without the step; of the experts' loads, each layer's largest."""
    found = {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "step"}
    return found | {f"expert_load_max/{layer}": max(loads) for layer, loads in enumerate(row.get("expert_load", ()))}


def _tensorboard(place: Place) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(place.run_dir / "tensorboard"), purge_step=place.step + 1)

    def write(row: Row) -> None:
        for name, value in scalars(row).items():
            board.add_scalar(name, value, row["step"])
        for layer, loads in enumerate(row.get("expert_load", ())):
            for expert, load in enumerate(loads):
                board.add_scalar(f"expert_load/{layer}/{expert}", load, row["step"])

    return Tracker(write, lambda _: board.close())


def _wandb(place: Place) -> Tracker:
    import wandb  # pyright: ignore[reportMissingImports]

    # A run that goes on has the name it began with; WANDB_MODE, WANDB_PROJECT and the like say the rest.
    with _remembered(place, "wandb") as known:
        run = wandb.init(
            project=_project("WANDB_PROJECT"),
            name=place.name,
            dir=str(place.run_dir),
            config=dict(place.config),
            id=known.get("id"),
            resume="allow",
        )
        known["id"] = run.id

    def close(picture: Path | None) -> None:
        if picture is not None:
            run.log({"expert_load": wandb.Image(str(picture))})
        run.finish()

    return Tracker(lambda row: run.log(scalars(row), step=row["step"]), close)


def _mlflow(place: Place) -> Tracker:
    from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]
    from mlflow.tracking import MlflowClient  # pyright: ignore[reportMissingImports]

    client, project = MlflowClient(), _project("MLFLOW_EXPERIMENT_NAME")
    with _remembered(place, "mlflow") as known:
        if "id" not in known:
            found = client.get_experiment_by_name(project)
            experiment = found.experiment_id if found else client.create_experiment(project)
            known["id"] = client.create_run(experiment, run_name=place.name).info.run_id
            params = [Param(key, value) for key, value in _flat(place.config)]
            for first in range(0, len(params), 100):  # its limit
                client.log_batch(known["id"], params=params[first : first + 100])
        number = known["id"]
    client.update_run(number, status="RUNNING")

    def write(row: Row) -> None:
        when = int(time.time() * 1000)
        client.log_batch(number, [Metric(name, value, when, row["step"]) for name, value in scalars(row).items()])

    def close(picture: Path | None) -> None:
        if picture is not None:
            client.log_artifact(number, str(picture))
        client.set_terminated(number)

    return Tracker(write, close)


def _trackio(place: Place) -> Tracker:
    import trackio  # pyright: ignore[reportMissingImports]

    # It knows a run by its name alone, so one that begins anew never goes on in an older one's.
    resume = "allow" if place.step else "never"
    trackio.init(project=_project("TRACKIO_PROJECT"), name=place.name, config=dict(place.config), resume=resume)

    def close(picture: Path | None) -> None:
        if picture is not None:
            trackio.log({"expert_load": trackio.Image(str(picture))})
        trackio.finish()

    return Tracker(lambda row: trackio.log(scalars(row), step=row["step"]), close)


TRACKERS: dict[str, Callable[[Place], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}


def _project(variable: str) -> str:
    return os.environ.get(variable, "ostro")


@contextlib.contextmanager
def _remembered(place: Place, name: str) -> Iterator[dict[str, str]]:
    """Give what a tracker noted of this run when it began, to be added to; it is kept in trackers.json."""
    file = place.run_dir / "trackers.json"
    noted = {}
    with contextlib.suppress(OSError, ValueError):  # a damaged one costs the thread to an earlier start, not the run
        noted = json.loads(file.read_text(encoding="utf-8"))
    known = noted.setdefault(name, {})
    yield known
    file.write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")


def _flat(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", str(value)[:500]
