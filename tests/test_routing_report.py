"""Which experts take which tokens: what is counted, and the page of coloured text."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from pages import Page

from ostro import cli, weights
from ostro.data.tokenizer import load_tokenizer
from ostro.model.settings import ModelConfig
from ostro.model.spans import spans_of
from ostro.report import routing
from ostro.serve.load import load_model
from ostro.weights.store import RandomReader

CONFIG = ModelConfig(
    vocab_size=32000,
    hidden_size=16,
    intermediate_size=8,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=5,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)


@pytest.mark.parametrize(("num_experts", "num_choices"), [(8, 2), (5, 3), (4, 1), (3, 2)])
def test_blind_repetition_is_what_counting_all_pairs_gives(num_experts: int, num_choices: int) -> None:
    orders = list(itertools.permutations(range(num_experts), num_choices))
    pairs = list(itertools.product(orders, orders))
    first = sum(a[0] == b[0] for a, b in pairs) / len(pairs)
    common = sum(bool({*a} & {*b}) for a, b in pairs) / len(pairs)
    assert routing.random_repetition(num_experts, num_choices) == pytest.approx((first, common))


def test_blind_repetition_of_mixtral_is_the_papers() -> None:
    assert routing.random_repetition(8, 2) == pytest.approx((0.125, 1 - 6 / 8 * 5 / 7))


def test_repetitions_are_counted_inside_documents() -> None:
    # Documents of three and two tokens: the pairs are 0-1, 1-2 and 3-4; 2-3 would repeat in both ways.
    one = [[0, 1], [0, 2], [3, 2], [3, 2], [1, 4]]
    other = [[0, 1], [1, 0], [1, 2], [1, 2], [2, 1]]
    repeated_LR, pairs = routing.repetitions(np.array([one, other]), [3, 2])
    assert pairs == 3
    assert repeated_LR.tolist() == [[1, 2], [1, 3]]


@pytest.mark.parametrize(("num_layers", "expected"), [(32, [0, 15, 31]), (2, [0, 1]), (1, [0]), (3, [0, 1, 2])])
def test_layers_are_the_papers(num_layers: int, expected: list[int]) -> None:
    assert routing.chosen_layers(num_layers) == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    weights.convert(RandomReader(CONFIG), folder, to="hf", tokenizer=load_tokenizer("v1").save)
    return folder


def test_domains_are_named_by_their_files_where_these_differ() -> None:
    assert routing.domain_names(["a/wiki.txt", "b/code.jsonl"]) == ["wiki", "code"]
    assert routing.domain_names(["a/text.txt", "b/text.txt"]) == ["a/text.txt", "b/text.txt"]


TEXTS = {"markup": "<b>one</b> & 'two'\r\n" * 40, "wind": "Ostro blows from the south. Ünïcödé 风\n" * 30}


@pytest.fixture(scope="module")
def report(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    files = []
    for name, text in TEXTS.items():
        files.append(folder / f"{name}.txt")
        files[-1].write_text(text, newline="")
    arguments = [model, *files, "--out", folder / "out", "--seq-length", "64", "--most-tokens", "300"]
    assert cli.main(["routing", *map(str, arguments)]) == 0
    return folder / "out"


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_loads_of_every_layer_sum_to_one(report: Path) -> None:
    found = rows_of(report / "load.csv")
    assert len(found) == len(TEXTS) * CONFIG.num_hidden_layers * CONFIG.num_local_experts
    for name, layer in itertools.product(TEXTS, range(CONFIG.num_hidden_layers)):
        here = [row for row in found if (row["domain"], row["layer"]) == (name, str(layer))]
        for key in ("load", "choice_1", "choice_2"):
            assert sum(float(row[key]) for row in here) == pytest.approx(1)
        assert all(float(r["load"]) == pytest.approx((float(r["choice_1"]) + float(r["choice_2"])) / 2) for r in here)


def test_repetitions_stand_beside_what_chance_gives(report: Path) -> None:
    found = json.loads((report / "routing.json").read_text())
    assert found["tokens"] == dict.fromkeys(TEXTS, 256)
    assert found["repetition"][-1] == {"domain": "random", "layer": "any", "first_choice": 0.2, "any_choice": 0.7}
    assert len(found["repetition"]) == len(rows_of(report / "repetition.csv")) == len(TEXTS) * 3 + 1
    assert all(0 <= row["first_choice"] <= row["any_choice"] <= 1 for row in found["repetition"])


def test_every_token_of_the_page_has_its_text_and_its_experts(report: Path, model: Path) -> None:
    page = Page((report / "routing.html").read_text())
    assert page.faults == []
    tokenizer, loaded = load_tokenizer("v1"), load_model(model)
    spans = [
        (fields["class"], fields["data-t"]) for tag, fields in page.elements if tag == "span" and "data-t" in fields
    ]
    shown = "".join(text for tag, text in page.texts if tag == "span")
    [experts] = page.data
    for number, (name, text) in enumerate(TEXTS.items()):
        ids = tokenizer.encode(text, bos=True)[:256]
        assert tokenizer.decode(ids).replace("\r", "") in shown
        experts_LTA = torch.zeros(3, 64, 2, dtype=torch.int64)
        with torch.no_grad():
            loaded(torch.tensor(ids[:64]), spans_of([64], experts_LTA=experts_LTA))
        assert np.array_equal(np.array(experts[number])[:, :64], experts_LTA), name
        first = [(f"e{expert}", str(token)) for token, expert in enumerate(experts_LTA[1, :, 0].tolist())]
        assert spans[256 * number : 256 * number + 64] == first


def test_figures_are_drawn(report: Path) -> None:
    for name in ("load", "layers", "repetition"):
        assert matplotlib.image.imread(report / f"{name}.png").std() > 0.05


def test_what_cannot_be_routed_is_said(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("a few words")
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["routing", str(model), str(tmp_path / "text.txt"), *out, "--seq-length", "999"]) == 2
    assert "more than the model's 128 positions" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["routing", str(model), str(tmp_path / "text.txt"), "--out", str(tmp_path / "text.txt")]) == 2
