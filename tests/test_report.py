"""What a run leaves to look at: the page, the pictures, the numbers on top."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import pytest
from pages import Page

from ostro import cli
from ostro.errors import DataError
from ostro.log import Metrics, read_metrics
from ostro.report import charts, history
from ostro.report.page import write_page
from ostro.report.pictures import draw_run

CONFIG = (
    "model: {num_hidden_layers: 2, num_local_experts: 3, num_experts_per_tok: 2, hidden_size: 96}\nrun: {dir: <b>}\n"
)


def row(step: int, **more: float) -> dict:
    loads = [[0.5, 0.25, 0.25], [0.4, 0.3, 0.3]]
    return {"step": step, "tokens": 100 * step, "loss": 5.0 / step, "expert_load": loads, **more}


def whole_row(step: int, **more: float) -> dict:
    fields = dict.fromkeys(("aux_loss", "z_loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu"), 1.0 / step)
    return row(step, **fields, seconds=0.5, drop_rate=0.01, **more)


def write_lines(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(each) + "\n" for each in rows))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [whole_row(step) for step in range(1, 41)]
    for each in rows[9::10]:
        each["eval_loss"] = 2.0 + abs(each["step"] - 20) / 10
    write_lines(folder / "metrics.jsonl", rows)
    samples = [{"step": step, "prompt": "<i>", "text": f"</script><b>{step}"} for step in (10, 20)]
    write_lines(folder / "samples.jsonl", samples)
    write_lines(folder / "spikes.jsonl", [{"step": 7, "grad_norm": 31.5, "documents": [["a&b", 12345]]}])
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "versions.json").write_text('{"ostro": "9.9"}')
    return folder


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(run_dir: Path) -> None:
    write_page(run_dir, peak_memory_bytes=3_000_000_000)
    page = Page((run_dir / "report.html").read_text())
    assert page.faults == []
    assert page.ids >= {chart.name for chart in charts.CHARTS} | {"expert_load", "samples", "spikes", "config"}
    assert page.said("blockquote") == ["</script><b>20", "</script><b>10"]
    assert CONFIG.strip() in page.said("pre")[0]
    assert "a&b 12345" in page.said("dd")
    values = [text for (tag, text) in page.texts if tag == "div" and text.strip()]
    assert {"3.0 GB", "4k", "at step 20"} <= set(values)
    loads = next(block for block in page.data if isinstance(block, dict))
    assert loads["steps"] == list(range(1, 41))
    assert loads["loads"][-1] == [[1.5, 0.75, 0.75], [1.2, 0.9, 0.9]]
    points = next(block for block in page.data if isinstance(block, list))
    assert points[9] == [0.2308, points[9][1], "step 10 · 1k tokens", ["training 0.5", "held out 3"]]


def test_a_page_leaves_out_what_a_run_has_not(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [row(1, drop_rate=0.0)])
    write_page(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    assert page.faults == []
    assert page.ids == {"loss", "expert_load", "loads"}


def test_the_verb_draws_a_run_again(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "summary.json").write_text('{"peak_memory_bytes": 2500000000}')
    assert cli.main(["report", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert "held out 2.0000 at best, at step 20, 4.0000 at the end" in said
    assert "2.5 GB of memory at most" in said
    drawn = {file.stem: matplotlib.image.imread(file) for file in (run_dir / "report").glob("*.png")}
    assert set(drawn) == {chart.name for chart in charts.CHARTS} | {"expert_load"}
    assert all(picture.std() > 0.03 for picture in drawn.values())
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["best_eval_step"] == 20
    assert summary["peak_memory_bytes"] == 2_500_000_000
    assert cli.main(["report", str(run_dir / "nothing")]) == 3


def test_a_long_run_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_ROWS", 10)
    rows = [row(step, **({"eval_loss": 1.0} if step == 45 else {})) for step in range(1, 96)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 96, "lo')
    found = history.read_history(tmp_path)
    assert (found.every, found.num_rows) == (10, 96)
    assert [each["step"] for each in found.rows] == [1, 11, 21, 31, 41, 45, 51, 61, 71, 81, 91, 95]
    assert found.summary["best_eval_step"] == 45


def test_a_curve_is_smoothed_without_its_outliers() -> None:
    values = [1.0] * 200
    values[100] = 1000.0
    assert history.smooth(values) == [1.0] * 200
    falling = [float(200 - i) for i in range(200)]
    assert history.smooth(falling)[:190] == pytest.approx(falling[:190])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 10.0, [0, 2, 4, 6, 8, 10]), (6.1, 6.19, [6.1, 6.12, 6.14, 6.16, 6.18]), (3.0, 3.0, [3.0])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert charts.ticks(low, high) == expected


def test_ticks_of_a_long_axis_are_powers_of_ten() -> None:
    assert charts.log_ticks(0.0009, 200) == [0.001, 0.01, 0.1, 1, 10, 100]
    assert charts.log_ticks(0.8, 12) == [1, 2, 5, 10]


def test_numbers_are_written_short() -> None:
    assert [charts.count(value) for value in (0, 999, 999_900, 12_345, 4.56e9)] == ["0", "999", "1M", "12.3k", "4.56B"]
    assert [charts.rate(value) for value in (0.0, 3e-4, 1.25e-5)] == ["0", "3e-4", "1.25e-5"]
    assert [charts.share(value) for value in (0.0, 0.5, 0.01234)] == ["0%", "50%", "1.23%"]


def test_a_run_is_drawn(tmp_path: Path) -> None:
    lines = [row(1), row(2, eval_loss=2.6), row(3)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    draw_run(tmp_path, tmp_path / "run.png", references={"unigram": 4.0})
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
