"""The second act of the demo: the model of the first learns with LoRA to say what a function of the library does.

Its questions and answers are the documentation strings of the standard library's own sources.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import rich
import torch
from rich.text import Text

from ostro import device, log
from ostro.config import Config, load_config
from ostro.conversion import Request, convert
from ostro.data import shards as token_shards
from ostro.data.prepare import prepare
from ostro.data.tokenizer import load_tokenizer
from ostro.demo import SEQ_LENGTH, library, require_equal, split, title
from ostro.errors import DataError, TrainError, WeightsError
from ostro.evaluate import Evaluation, evaluate
from ostro.model import layout
from ostro.model.mixtral import Mixtral
from ostro.serve.chat import Dialogue, template_for
from ostro.serve.engine import Engine
from ostro.serve.load import load_model
from ostro.serve.sampling import Sampling
from ostro.training import train_here

# What training may take, and the share of the machine's matrix rate that a step with LoRA reaches.
_TRAIN_SECONDS = 36.0
_SHARE_OF_RATE = 0.36
_MAX_STEPS = 600
# Weights that hardly move can take rates that would tear the model itself apart.
_LORA = ("lora.targets=[attention,experts]", "lora.rank=16", "lora.alpha=32")
_OPTIM = ("optim.learning_rate=8e-3", "optim.min_learning_rate=8e-4", "moe.router_aux_loss_coef=0.0")
_ROWS = 4
_ANSWER_CHARACTERS = range(20, 301)
# The loss of the run's own, unmerged weights, in its own dtype, and that of the merged ones.
_SAME_LOSS = 0.01


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What the second act found, as the last page shows it; losses are of the held-out answers."""

    num_pairs: int
    num_held_out: int
    num_trained: int
    steps: int
    train_seconds: float
    before: Evaluation
    after: Evaluation
    seconds: float

    def rows(self, folder: Path) -> dict[str, str]:
        """Return names and values for the page."""
        before, after = self.before, self.after
        return {
            "pairs": f"{self.num_pairs:,} of documentation strings, {self.num_held_out} of other modules held out",
            "LoRA": f"{self.steps} steps, {self.num_trained:,} parameters trained, {self.train_seconds:.0f} s",
            "held-out answers": f"loss {before.loss:.3f} before, [bold]{after.loss:.3f}[/] after",
            "perplexity": f"{before.perplexity:,.0f} before, {after.perplexity:,.0f} after",
            "merged": f"{folder / 'lora-hf'}: equal to the run, ready for transformers",
        }


def second_act(folder: Path, steps: int | None = None, files: tuple[list[Path], list[Path]] | None = None) -> Lesson:
    """Fine-tune the model that `demo.first_act` left in `folder`, and return what the last page shows of it.

    The number of training steps follows from this machine's rate unless given; `files` to learn from and
    to hold out are those of the first act. Raises TrainError and WeightsError where
    what comes out is not what was trained.
    """
    start = time.monotonic()
    base, run_dir, merged = folder / "hf", folder / "lora", folder / "lora-hf"
    title(6, "ask: what does it do? Questions and answers from the library's documentation strings")
    num_pairs, held_out = _prepare(folder / "pairs", *(files or split()[::2]))
    data = [token_shards.open_shards(folder / "pairs" / "held_out")]
    before = evaluate(load_model(base), data, SEQ_LENGTH)
    rich.print(f"held-out answers before: loss {before.loss:.3f} nats a token")
    config = load_config("tiny", [*_LORA, f"train.global_batch_sequences={_ROWS}"])
    steps = steps or _num_steps(config)
    title(7, f"fine-tune attention and every expert with LoRA for {steps} steps")
    training = time.monotonic()
    _train(folder, steps)
    train_seconds = time.monotonic() - training
    title(8, "merge it into the model, export, compare with the run")
    convert(Request(str(base), merged, to="hf", adapter=str(run_dir)), print)
    require_equal(run_dir, merged)
    model = load_model(merged)
    after = evaluate(model, data, SEQ_LENGTH)
    _require_same_loss(run_dir, after)
    rich.print(f"held-out answers after: loss {after.loss:.3f} nats a token, before {before.loss:.3f}")
    title(9, "answer questions about modules it has not been asked about")
    _answer(model, merged, held_out)
    return Lesson(
        num_pairs=num_pairs,
        num_held_out=len(held_out),
        num_trained=layout.num_adapter_parameters(config.model, config.lora and config.lora.settings()),
        steps=steps,
        train_seconds=train_seconds,
        before=before,
        after=after,
        seconds=time.monotonic() - start,
    )


Pair = tuple[str, str]


def pairs_of(source: str, module: str) -> Iterator[Pair]:
    """Yield question and answer for each public function and class of a source whose documentation begins with a
    sentence."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    inside: list[tuple[str, ast.AST]] = [(module, tree)]
    while inside:
        prefix, holder = inside.pop()
        for node in ast.iter_child_nodes(holder):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name[0] == "_":
                continue
            name = f"{prefix}.{node.name}"
            if isinstance(node, ast.ClassDef):
                inside.append((name, node))
            answer = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(answer) in _ANSWER_CHARACTERS and re.fullmatch(r"[A-Z].* .*\.", answer):
                is_class = isinstance(node, ast.ClassDef)
                yield (f"What is {name}?" if is_class else f"What does {name} do?"), answer


def _pairs(paths: Iterable[Path], known: set[str]) -> list[Pair]:
    """Return the pairs of some files whose answer is not `known`, each answer once; they are known afterwards."""
    found = []
    for path in paths:
        parts = path.relative_to(library()).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if any(part.startswith("_") for part in parts):
            continue
        for question, answer in pairs_of(path.read_text(encoding="utf-8"), ".".join(parts)):
            if answer.lower() not in known:
                known.add(answer.lower())
                found.append((question, answer))
    return found


def _prepare(folder: Path, train: list[Path], held_out: list[Path]) -> tuple[int, list[Pair]]:
    """Write and prepare conversations; return how many there are to learn from, and the held-out ones.

    Held out are modules that the first act has not read either, and no answer of theirs is among the others.
    """
    known: set[str] = set()
    asked_later = _pairs(held_out, known)
    learned = _pairs(train, known)
    if not learned or not asked_later:
        raise DataError("this Python's standard library has no documentation strings: run the demo with another one.")
    folder.mkdir()
    for name, pairs in (("held_out", asked_later), ("train", learned)):
        file = folder / f"{name}.jsonl"
        lines = (
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]})
            for q, a in pairs
        )
        log.write_text(file, "\n".join(lines) + "\n")
        prepare([file], folder / name, tokenizer=load_tokenizer("v1"))
    manifest = token_shards.open_shards(folder / "train").manifest
    rich.print(
        f"{len(learned):,} pairs, {manifest.num_tokens:,} tokens, of which {manifest.num_trained:,} are learned: the "
        f"answers; {len(asked_later)} pairs of other modules held out, such as"
    )
    _show(*asked_later[0])
    return len(learned), asked_later


def _show(question: str, answer: str) -> None:
    rich.print(Text(f"  {question}", "dim"))
    rich.print(Text(f"  {answer}"))


def _num_steps(config: Config) -> int:
    """Return as many steps as this machine does in `_TRAIN_SECONDS`."""
    rate = device.peak_flops(torch.device("cpu"), torch.float32)
    lora = config.lora and config.lora.settings()
    flops = layout.training_flops(config.model, [SEQ_LENGTH] * _ROWS, lora)
    return min(_MAX_STEPS, max(8, int(_TRAIN_SECONDS * _SHARE_OF_RATE * rate / flops)))


def _train(folder: Path, steps: int) -> None:
    config = load_config("tiny", overrides(folder, steps))
    if (number := train_here(config, print)) is not None:
        raise TrainError(f"the fine-tuning was ended by {signal.Signals(number).name}: start the demo again.")


def overrides(folder: Path, steps: int) -> list[str]:
    """Return what makes recipe `tiny` the second act's training."""
    return [
        f"model={folder / 'hf'}",
        f"weights.path={folder / 'hf'}",
        f"data.path={folder / 'pairs' / 'train'}",
        f"data.eval_path={folder / 'pairs' / 'held_out'}",
        f"data.seq_length={SEQ_LENGTH}",
        *_LORA,
        *_OPTIM,
        f"train.steps={steps}",
        f"train.global_batch_sequences={_ROWS}",
        f"train.micro_batch_sequences={_ROWS}",
        f"train.eval_every={steps}",
        f"checkpoint.every={steps}",
        f"run.dir={folder / 'lora'}",
        f"run.log_every={max(1, steps // 8)}",
    ]


def _require_same_loss(run_dir: Path, merged: Evaluation) -> None:
    """Hold the merged model against what the run itself measured, with its corrections beside the model."""
    loss = next(row["eval_loss"] for row in reversed(log.read_metrics(run_dir / "metrics.jsonl")) if "eval_loss" in row)
    rich.print(f"held-out answers, not merged, as the run computes: loss {loss:.3f}")
    if abs(loss - merged.loss) > _SAME_LOSS * loss:
        raise WeightsError(f"merged the loss is {merged.loss:.4f}, and it was {loss:.4f}: please report it.")


def _answer(model: Mixtral, path: Path, held_out: list[Pair]) -> None:
    tokenizer = load_tokenizer(path)
    _, template, _ = template_for(path, "auto", tokenizer)
    for question, answer in held_out[:: max(1, len(held_out) // 3)][:3]:
        sampling = Sampling(max_new_tokens=40, temperature=0.5, top_p=0.9, repetition_penalty=1.15, seed=7)
        dialogue = Dialogue(Engine(model, tokenizer), template, sampling)
        rich.print(Text(f"{question}", "bold"))
        rich.print(Text("the model:   " + "".join(dialogue.ask(question)), "cyan"))
        rich.print(Text(f"the library: {answer}", "dim"))
