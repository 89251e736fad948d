"""The picture of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ostro.errors import DataError
from ostro.log import Metrics, read_metrics
from ostro.report import draw_run


def row(step: int, **more: float) -> dict:
    loads = [[0.5, 0.25, 0.25], [0.4, 0.3, 0.3]]
    return {"step": step, "tokens": 100 * step, "loss": 5.0 / step, "expert_load": loads, **more}


def test_a_run_is_drawn(tmp_path: Path) -> None:
    lines = [row(1), row(2, eval_loss=2.6), row(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_run(tmp_path, tmp_path / "run.png", references={"unigram": 4.0})
    import matplotlib.image

    image = matplotlib.image.imread(tmp_path / "run.png")
    assert image.shape[:2] == (540, 1500)
    assert image.std() > 0.05


def test_an_empty_run_cannot_be_drawn(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(DataError, match="has no step to draw"):
        draw_run(tmp_path, tmp_path / "run.png")


def test_metrics_are_cut_back_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row(step)) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(file)] == [1, 2, 3]
    metrics = Metrics(tmp_path, step=2)
    metrics.write(row(3, loss=9.0))
    metrics.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(file)] == [(1, 5.0), (2, 2.5), (3, 9.0)]
    file.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(DataError, match="line 2 is not JSON"):
        read_metrics(file)
