"""What fits where: dry runs of the shipped recipes, as the README's table and as the first line of each recipe.

    python benchmarks/recipes.py --write

For each job and each size of a device's memory it looks for the layout of fewest devices that fits: what arithmetic
lets pass is dry-run, one after another. `--recipe NAME` takes one recipe alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from pathlib import Path

from ostro import plan
from ostro.config import RECIPES, Config, load_config, recipe_names
from ostro.parallel.memory import UNCERTAIN, estimate
from ostro.sections import Data, Optim

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh.md")
BEGIN, END = "<!-- what fits where: written by benchmarks/recipes.py -->", "<!-- end of what fits where -->"
MEMORY_GB = (64, 80, 141)
SPARE = 0.08  # of a device's memory: for the context, kernels' workspace, and what the allocator loses
FILLS = re.compile(r"(?<=dry run fills )[\d.]+(?= GB)")


@dataclasses.dataclass(frozen=True)
class Job:
    """A row: its name in English and Chinese, its recipe, and on how many devices that is tried, sharded, besides."""

    name: str
    chinese: str
    recipe: str
    others: tuple[int, ...] = ()


JOBS = (
    Job("QLoRA of 8x7B", "8x7B 的 QLoRA", "mixtral-8x7b/qlora"),
    Job("LoRA of 8x7B", "8x7B 的 LoRA", "mixtral-8x7b/lora-2", (1,)),
    Job("LoRA of 8x22B", "8x22B 的 LoRA", "mixtral-8x22b/lora-8", (4,)),
    Job(
        "full fine-tuning of 8x7B in bf16 and 8 bits", "8x7B 全参微调，bf16 权重、8 位状态", "mixtral-8x7b/full-8", (4,)
    ),
    Job("full fine-tuning of 8x7B in fp32", "8x7B 全参微调，fp32", "mixtral-8x7b/full-16", (8,)),
    Job("sparse upcycling of Mistral-7B", "由 Mistral-7B 稀疏升级", "mixtral-8x7b/upcycle", (8,)),
    Job("pretraining of 8x7B at 4k", "8x7B 预训练，4k", "mixtral-8x7b/pretrain-16", (8,)),
    Job("the same, experts over eight", "同上，专家分到八卡", "mixtral-8x7b/pretrain-16-ep8"),
    Job("the same, made for speed", "同上，为速度而设", "mixtral-8x7b/pretrain-64"),
    Job("pretraining of 8x7B at 32k, matrices cut", "8x7B 预训练，32k，切矩阵", "mixtral-8x7b/pretrain-32k"),
    Job("the same, sequences cut", "同上，切序列", "mixtral-8x7b/pretrain-32k-cp"),
    Job("pretraining of 8x22B at 4k", "8x22B 预训练，4k", "mixtral-8x22b/pretrain-128"),
)


def brief(config: Config) -> Config:
    """Return it with no more micro-batches than it takes until as much is held as ever is."""
    parallel, train, optim = config.parallel, config.train, config.optim
    each = train.micro_batch_sequences * parallel.dp * parallel.fsdp
    batch = min(train.global_batch_sequences, each * 2 * parallel.pp)
    # Of the rest only what changes memory is kept, so that recipes that are alike in it are run once.
    return Config(
        model=config.model,
        data=Data(seq_length=config.data.seq_length),
        train=train.model_copy(update={"global_batch_sequences": batch, "steps": 1, "epochs": 1.0}),
        optim=Optim(state_dtype=optim.state_dtype, offload=optim.offload),
        lora=config.lora,
        parallel=parallel.model_copy(update={"micro_batch_num": None}),
    )


class Found:
    """Dry runs, each taken once: the bytes that a recipe fills on its fullest device."""

    def __init__(self) -> None:
        self._bytes: dict[str, int] = {}

    def fills(self, name: str, config: Config) -> int:
        config = brief(config)
        key = config.as_yaml()
        if key not in self._bytes:
            start = time.perf_counter()
            self._bytes[key] = max(run.peak_bytes for run in plan.dry_runs(config, plan.end_ranks(config)))
            told = f"{name} on {config.parallel.degrees().num_ranks}: {self._bytes[key] / 1e9:.1f} GB"
            print(
                f"{told}, arithmetic {estimate(config).total / 1e9:.1f} GB ({time.perf_counter() - start:.0f} s)",
                flush=True,
            )
        return self._bytes[key]


def cell(job: Job, limit: float, found: Found) -> str:
    """Return the fewest devices on which a job fills no more than `limit` bytes, and how much it fills; or a dash."""
    layouts = [(f"parallel={{fsdp: {n}, ep: {n}}}",) for n in job.others]
    configs = [load_config(job.recipe, overrides) for overrides in (*layouts, ())]
    for config in sorted(configs, key=lambda each: each.parallel.degrees().num_ranks):
        if estimate(config).total * (1 - UNCERTAIN) > limit:
            continue
        filled = found.fills(job.recipe, config)
        if filled <= limit:
            return f"{config.parallel.degrees().num_ranks} ({filled / 1e9:.1f} GB)"
    return "—"


def tables(found: Found) -> dict[str, str]:
    """Return the table for each README."""
    rows = []
    for job in JOBS:
        rows.append([f"`{job.recipe}`", *(cell(job, gb * 1e9 * (1 - SPARE), found) for gb in MEMORY_GB)])
    told = {}
    for file, names, first in (
        (READMES[0], [job.name for job in JOBS], ["job", "recipe"]),
        (READMES[1], [job.chinese for job in JOBS], ["任务", "配方"]),
    ):
        head = first + [f"{gb} GB" for gb in MEMORY_GB]
        lines = [head, ["---"] * len(head), *([name, *row] for name, row in zip(names, rows, strict=True))]
        told[file] = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return told


def first_line(name: str, found: Found) -> None:
    """Write into a recipe's first line what a dry run of it fills."""
    file = RECIPES / f"{name}.yaml"
    if FILLS.search(file.read_text("utf-8")):
        filled = f"{found.fills(name, load_config(name)) / 1e9:#.3g}"
        file.write_text(FILLS.sub(filled, file.read_text("utf-8"), count=1), "utf-8")


def main() -> None:
    """Take the dry runs; print the tables, or write them and the recipes' first lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into the READMEs and the recipes")
    parser.add_argument("--recipe", action="append", help="only these, and only their first lines")
    parser.add_argument("--quick", action="store_true", help="only the smallest real one, mixtral-8x7b/qlora")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the tables here, as text by file")
    options = parser.parse_args()
    if options.quick:
        options.recipe = ["mixtral-8x7b/qlora"]
    found = Found()
    for name in options.recipe or recipe_names():
        if options.write:
            first_line(name, found)
        elif FILLS.search((RECIPES / f"{name}.yaml").read_text("utf-8")):
            found.fills(name, load_config(name))
    made = {} if options.recipe else tables(found)
    if options.json:
        options.json.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", "utf-8")
    for file, table in made.items():
        print(table)
        if options.write:
            before, _, rest = (ROOT / file).read_text("utf-8").partition(BEGIN)
            (ROOT / file).write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
