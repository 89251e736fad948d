"""lm-eval's own adapter for transformers beside Ostro's, on tasks made on the spot: every score and every text.

Run by a Python that has lm-eval, transformers and Ostro:

    python tests/interop/lm_eval_side.py [--limit 40]

A small random Mixtral is written as a Hugging Face folder, three tasks (multiple choice, perplexity of whole texts,
generation) as YAML over JSON Lines. Each is run once through `HFLM` and once through Ostro; it exits with 1 where a
log-likelihood differs by more than 1e-3 nats, or a choice or a text at all.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.api.model
import lm_eval.tasks
import torch
from lm_eval.models.huggingface import HFLM

from ostro import weights
from ostro.data.tokenizer import load_tokenizer
from ostro.model.settings import ModelConfig
from ostro.serve.engine import Engine
from ostro.serve.harness import Harness, table
from ostro.serve.load import load_model
from ostro.weights.store import RandomReader

TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Module {{name}}: ",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "num_fewshot": 2,
        "fewshot_split": "test",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{text[:120]}}",
        "doc_to_target": "{{name}}",
        "generation_kwargs": {"until": ["\n", " the"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def rows(limit: int) -> list[dict[str, Any]]:
    """Return modules of the standard library with the beginnings of their source, as documents of a task."""
    found = []
    for module in pkgutil.iter_modules():
        spec = module.module_finder.find_spec(module.name)  # type: ignore[call-arg]
        if spec is None or not (spec.origin or "").endswith(".py") or module.name.startswith("_"):
            continue
        text = Path(str(spec.origin)).read_text("utf-8", "replace")[:1500].strip()
        if len(text) > 300:
            found.append((module.name, text))
        if len(found) == limit:
            break
    texts = [text.splitlines()[0] for _, text in found]
    return [
        {"name": name, "text": text, "choices": [texts[at], texts[at - 1], texts[at - 2], "a"], "gold": 0}
        for at, (name, text) in enumerate(found)
    ]


def write_tasks(folder: Path, limit: int) -> None:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(limit)))
    for name, task in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": f"ostro_{name}", **source, **task}))  # JSON is YAML


def responses(model: Any, folder: Path) -> tuple[dict[str, Any], float]:
    start = time.process_time()
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=[f"ostro_{name}" for name in TASKS],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder)),
        log_samples=True,
        bootstrap_iters=0,
    )
    assert results is not None
    return results, time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=40, help="documents of each task")
    limit = parser.parse_args().limit
    config = ModelConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=192,
        initializer_range=0.2,
    )
    lm_eval.api.model.LM.register(Harness)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights.convert(RandomReader(config, 1), folder / "hf", to="hf", tokenizer=load_tokenizer("v1").save)
        write_tasks(folder, limit)
        theirs, their_seconds = responses(HFLM(str(folder / "hf"), dtype="float32", batch_size=8, device="cpu"), folder)
        ours, our_seconds = responses(Harness(Engine(load_model(folder / "hf", "fp32"), load_tokenizer("v1"))), folder)
    print("HFLM\n" + table(theirs) + "\nOstro\n" + table(ours))
    is_equal = True
    for task, samples in theirs["samples"].items():
        pairs = [
            (one, other)
            for mine, his in zip(ours["samples"][task], samples, strict=True)
            for one, other in zip(mine["resps"], his["resps"], strict=True)
        ]
        flat = [(one[0], other[0]) for one, other in pairs]
        if isinstance(flat[0][0], str):
            num_same = sum(one == other for one, other in flat)
            print(f"{task}: {num_same} of {len(flat)} texts are equal")
            is_equal &= num_same == len(flat)
            continue
        values = [(one, other) if isinstance(one, float) else (one[0], other[0]) for one, other in flat]
        worst = max(abs(float(one) - float(other)) for one, other in values)
        flags = all(isinstance(one, float) or bool(one[1]) == bool(other[1]) for one, other in flat)
        print(f"{task}: {len(flat)} log-likelihoods differ by {worst:.2g} nats at most; greedy flags equal: {flags}")
        is_equal &= worst < 1e-3 and flags
    print(
        f"HFLM {their_seconds:.1f} s, Ostro {our_seconds:.1f} s of processor time on {torch.get_num_threads()} threads"
    )
    return not is_equal


if __name__ == "__main__":
    sys.exit(main())
