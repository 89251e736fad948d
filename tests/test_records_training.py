"""Records of MindFormers through our own training step: what was recorded there comes out here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from ostro.config import Config, load_config
from ostro.data.mindrecord import MindRecordWriter
from ostro.data.prepare import prepare
from ostro.data.shards import open_shards
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.evaluate import evaluate
from ostro.model.spans import spans_of
from ostro.train import Run, set_up, train_step

PAD, IGNORED = 0, -100
# The first loss as the logits agree between frameworks; later ones as layouts do: weights that differ by one rounding
# move the fifth loss by up to 2.2e-5, which is 8e-6 of it.
FIRST, LATER = 4e-6, 1e-5


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden" / "mindformers"


@pytest.fixture(scope="module")
def recorded(golden: Path) -> tuple[np.ndarray, list[float]]:
    """The records, int32 [2, 17], and the loss before each of five updates."""
    expected = np.load(golden / "expected.npz")
    return expected["train_tokens"], expected["adamweightdecay_lr1e-2_losses"].tolist()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary of the golden model's size: 128 pieces, the first three of them special."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 193))]
    vocab = {piece: at for at, piece in enumerate(["<unk>", "<s>", "</s>", *letters])}
    spec = {
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
        "added_tokens": [
            {"id": at, "content": piece, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for at, piece in enumerate(["<unk>", "<s>", "</s>"])
        ],
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    }
    file = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    file.write_text(json.dumps(spec), "utf-8")
    tokenizer = load_tokenizer(file)
    assert tokenizer.vocab_size == 128
    return tokenizer


def written(path: Path, rows: Iterable[dict[str, np.ndarray]]) -> Path:
    rows = list(rows)
    with MindRecordWriter(path, sorted(rows[0]), "rows", header_size=1 << 14, page_size=1 << 15) as writer:
        for row in rows:
            writer.append(row)
    return path


def config(golden: Path, data: Path, run_dir: Path, seq_length: int, *more: str) -> Config:
    fields = [
        f"model={golden / 'config.json'}",
        f"weights.path={golden / 'model.ckpt'}",
        f"data.path={data}",
        f"data.tokenizer={run_dir.parent / 'vocabulary'}",
        f"data.seq_length={seq_length}",
        "data.packing=records",
        f"data.pad_token_id={PAD}",
        "train.dtype=fp32",
        "train.steps=5",
        "train.global_batch_sequences=2",
        "moe.router_aux_loss_coef=0",
        "optim.name=fp32_state_adam_weight_decay",
        "optim.betas=[0.9,0.999]",
        "optim.schedule=constant",
        "optim.learning_rate=1e-2",
        "optim.warmup_ratio=0",
        "optim.max_grad_norm=1e9",
        f"run.dir={run_dir}",
    ]
    return load_config("tiny", [*fields, *more])


def started(golden: Path, data: Path, tokenizer: Tokenizer, folder: Path, seq_length: int, *more: str) -> Run:
    """Return a run over MindRecord files with the recorded weights and MindFormers' optimizer."""
    tokenizer.save(folder / "vocabulary")
    prepare([data], folder / "prepared", tokenizer=tokenizer)
    return set_up(config(golden, folder / "prepared", folder / "run", seq_length, *more))


def assert_losses(found: list[float], losses: list[float]) -> None:
    assert found[0] == pytest.approx(losses[0], abs=FIRST, rel=0)
    assert found == pytest.approx(losses, rel=LATER, abs=0)


@pytest.mark.parametrize(("micro_batch", "implementation"), [(1, "foreach"), (2, "fused")])
def test_records_train_as_they_do_in_mindformers(
    golden: Path,
    recorded: tuple[np.ndarray, list[float]],
    tokenizer: Tokenizer,
    tmp_path: Path,
    micro_batch: int,
    implementation: str,
) -> None:
    records, losses = recorded
    data = written(tmp_path / "wiki.mindrecord", [{"input_ids": row} for row in records])
    more = (f"train.micro_batch_sequences={micro_batch}", f"optim.implementation={implementation}")
    run = started(golden, data, tokenizer, tmp_path, 16, *more)
    assert_losses([train_step(run).loss for _ in losses], losses)


def test_neither_pad_nor_ignored_labels_are_trained(
    golden: Path, recorded: tuple[np.ndarray, list[float]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Records padded to twice their length, of which the first pad, a label of the last token, is ignored."""
    records, losses = recorded
    rows = []
    for record in records:
        ids = np.concatenate([record, np.full(16, PAD, np.int32)])
        labels = ids.copy()
        labels[len(record)] = IGNORED
        rows.append({"input_ids": ids, "labels": labels})
    data = written(tmp_path / "qa.mindrecord", rows)
    run = started(golden, data, tokenizer, tmp_path, 32)
    assert [float(row.weights_L.sum()) for row in run.loader.rows(0, 2)] == [16.0, 16.0]
    assert_losses([train_step(run).loss for _ in losses], losses)


def test_either_mask_alone_would_train_something_else(
    golden: Path, recorded: tuple[np.ndarray, list[float]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Of the two masks of the test above, one is not enough: each of them takes labels away."""
    rows = [np.concatenate([record, np.full(16, PAD, np.int32)]) for record in recorded[0]]
    ignored = [np.where(np.arange(33) == 17, IGNORED, ids).astype(np.int32) for ids in rows]
    for name, labels, pad, count in (("wiki", None, PAD, 17), ("qa", ignored, -1, 31)):
        folder = tmp_path / name
        folder.mkdir()
        records = [{"input_ids": ids} | ({"labels": labels[at]} if labels else {}) for at, ids in enumerate(rows)]
        data = written(folder / f"{name}.mindrecord", records)
        run = started(golden, data, tokenizer, folder, 32, f"data.pad_token_id={pad}")
        assert [float(row.weights_L.sum()) for row in run.loader.rows(0, 2)] == [count, count]
        assert abs(train_step(run).loss - recorded[1][0]) > 0.01


def test_labels_are_carried_from_the_file_to_the_step(
    golden: Path, recorded: tuple[np.ndarray, list[float]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The loss is the mean over the labels that are not ignored, held against the model's own logits."""
    records, _ = recorded
    labels = records.copy()
    labels[0, :9] = IGNORED
    labels[1, ::2] = IGNORED
    pairs = zip(records, labels, strict=True)
    data = written(tmp_path / "qa.mindrecord", [{"input_ids": ids, "labels": to} for ids, to in pairs])
    run = started(golden, data, tokenizer, tmp_path, 16)
    shards = open_shards(tmp_path / "prepared")
    found = shards.trained(0, shards.num_tokens)
    assert found is not None
    np.testing.assert_array_equal(found.reshape(records.shape), labels != IGNORED)
    tokens, learned = torch.from_numpy(records).long(), torch.from_numpy(labels[:, 1:] != IGNORED)
    with torch.no_grad():
        logits = run.model.logits(run.model(tokens[:, :-1].reshape(-1), spans_of([16, 16]))).view(2, 16, -1)
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    assert evaluate(run.model, [shards], 16, "records", PAD).loss == pytest.approx(
        nll[learned].mean().item(), abs=FIRST, rel=0
    )
    assert train_step(run).loss == pytest.approx(nll[learned].mean().item(), abs=FIRST, rel=0)
