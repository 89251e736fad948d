"""What holding parameters and averages in fewer bits does to the loss: a small Mixtral, trained alike but for that.

    python benchmarks/master_dtype.py            # 400 steps, two seeds
    python benchmarks/master_dtype.py --quick    # 60 steps, one seed

It trains on modules of the standard library and scores another. Parameters of bf16 without stochastic rounding are in
it to show what that is for; no setting chooses it.
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import inspect
import io
import json
import statistics
import subprocess
import tarfile
import tempfile
import typing
import zipfile
from pathlib import Path

from ostro.config import load_config
from ostro.evaluate import evaluate
from ostro.optim import rounding
from ostro.train import set_up, train_step

# Modules of which the one half teaches and the other asks.
TEXT = [inspect.__file__, argparse.__file__, typing.__file__, tarfile.__file__, subprocess.__file__, doctest.__file__]
HELD_OUT = [zipfile.__file__]
SETTINGS = [
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.num_hidden_layers=2",
    "data.seq_length=128",
    "train.global_batch_sequences=8",
    "train.micro_batch_sequences=8",
    "train.dtype=fp32",
    "optim.warmup_ratio=0.04",
]
CASES: dict[str, tuple[list[str], float]] = {
    "fp32 masters": ([], 12),
    "fp32 masters, 8-bit averages": (["optim.state_dtype=int8"], 6.03),
    "bf16 stochastic": (["train.master_dtype=bf16"], 10),
    "bf16 stochastic, 8-bit averages": (["train.master_dtype=bf16", "optim.state_dtype=int8"], 4.03),
    "bf16 nearest": (["train.master_dtype=bf16"], 10),
}


def trained(case: str, words: list[str], options: argparse.Namespace, seed: int, folder: Path) -> tuple[float, float]:
    """Return the mean training loss of the last tenth of the steps, and the held-out loss."""
    rounded = rounding.to_bf16
    if case == "bf16 nearest":
        rounding.to_bf16 = lambda value, draws: value.bfloat16()
    config = load_config(
        "tiny",
        [
            *SETTINGS,
            *words,
            *options.more,
            f"data.path=[{','.join(TEXT)}]",
            f"data.eval_path=[{','.join(HELD_OUT)}]",
            f"train.steps={options.steps}",
            f"train.seed={seed}",
            f"run.dir={folder}",
        ],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        run = set_up(config)
    losses = [train_step(run).loss for _ in range(options.steps)]
    held_out = evaluate(run.world, run.eval_shards, config.data.seq_length).loss
    rounding.to_bf16 = rounded
    return statistics.mean(losses[-options.steps // 10 :]), held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 steps, one seed")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("more", nargs="*", help="settings, as optim.learning_rate=1e-3")
    options = parser.parse_intermixed_args()
    options.steps = options.steps or (60 if options.quick else 400)
    options.seeds = options.seeds or (1 if options.quick else 2)
    rows = []
    print(f"{'held in':<34}{'bytes a value':>14}{'training loss':>15}{'held-out loss':>15}")
    for case, (words, num_bytes) in CASES.items():
        found: list[typing.Any] = []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                found.append(trained(case, words, options, seed, Path(folder) / "run"))
        means = [statistics.mean(values) for values in zip(*found, strict=True)]
        rows.append({"case": case, "bytes": num_bytes, "training": means[0], "held_out": means[1], "each": found})
        print(f"{case:<34}{num_bytes:>14}{means[0]:>15.4f}{means[1]:>15.4f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
