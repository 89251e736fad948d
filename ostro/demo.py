"""The main job, end to end, on text that every machine has: the source of Python's standard library.

Prepare, train a small Mixtral, kill it, resume it, score it, export it, check the export, let it write.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import rich
import torch
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ostro import device, log, weights
from ostro.config import load_config
from ostro.data import shards as token_shards
from ostro.data.prepare import prepare
from ostro.data.shards import Shards
from ostro.data.tasks import Settings
from ostro.data.tokenizer import Tokenizer, load_tokenizer
from ostro.errors import ConfigError, DataError, Error, TrainError, WeightsError
from ostro.evaluate import Evaluation, evaluate
from ostro.model import layout
from ostro.report.pictures import draw_run
from ostro.serve.engine import Completion, Engine
from ostro.serve.load import load_model
from ostro.serve.sampling import Sampling
from ostro.verify import verify
from ostro.weights import dcp

# What training may take, and the share of the machine's matrix rate that a step of this size reaches; the steps lost to
# the kill and the start of two processes come on top.
_TRAIN_SECONDS = 72.0
_SHARE_OF_RATE = 0.47
_MAX_STEPS = 1200
# The run is cut into this many stretches with a checkpoint after each, and killed in the middle of the ninth.
_STRETCHES = 16
_KILLED_AFTER = 8
SEQ_LENGTH = 256
_HELD_OUT_BYTES = 180_000
_PROMPTS = ("import os\n", "def read(self, ", "class Error(", "    if not isinstance(", "    for name in ", "    # ")
_COLOURS = ("red", "green", "yellow", "blue", "magenta", "cyan", "bright_red", "bright_green")
_MARKER = ".ostro-demo"
# `encodings` and `pydoc_data` are tables made by programs: a quarter of the tokens, and nothing to learn from.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Bits per byte of the held-out text under models that only count, and under gzip."""

    unigram: float
    bigram: float
    gzip: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the demo found, as its last page shows it."""

    num_tokens: int
    steps: int
    train_seconds: float
    last: dict[str, float]
    evaluation: Evaluation
    baselines: Baselines
    digest: str
    undisturbed_digest: str
    seconds: float


def first_act(folder: Path, total_steps: int | None = None) -> Summary:
    """Run everything into `folder` and return what `page` shows; takes about two minutes on two cores.

    The number of training steps follows from this machine's rate unless given (a multiple of 16, at least 32).
    """
    start = time.monotonic()
    _clear(folder)
    tokenizer = load_tokenizer("v1")
    title(1, "prepare: the standard library's own source, with the real Mixtral tokenizer")
    corpus = _prepare(folder, tokenizer)
    total_steps = total_steps or _num_steps()
    title(2, f"train a Mixtral of 8 experts for {total_steps} steps; it is killed on the way and resumed")
    training = time.monotonic()
    undisturbed, digest = _train(folder, total_steps)
    train_seconds = time.monotonic() - training
    title(3, "evaluate on files it has not seen")
    run_dir = folder / "run"
    model = load_model(run_dir)
    evaluation = evaluate(model, [corpus.held_out], SEQ_LENGTH)
    baselines = _baselines(corpus)
    rich.print(f"{evaluation.bits_per_byte:.3f} bits per byte; counting single tokens gives {baselines.unigram:.3f}")
    title(4, "export to Hugging Face's format, load it back, compare")
    exported = folder / "hf"
    weights.convert(run_dir, exported, to="hf", tokenizer=tokenizer.save)
    require_equal(run_dir, exported)
    title(5, "write: each colour is the expert of the last layer that wrote the token")
    _write(Engine(load_model(exported), load_tokenizer(exported)))
    rows = log.read_metrics(run_dir / "metrics.jsonl")
    nats_a_bit_a_byte = math.log(2) * evaluation.num_bytes / evaluation.num_tokens
    references = {
        "held out, counting single tokens": baselines.unigram * nats_a_bit_a_byte,
        "held out, this model at the end": evaluation.loss,
    }
    draw_run(run_dir, folder / "demo.png", references=references)
    return Summary(
        num_tokens=corpus.train.num_tokens,
        steps=total_steps,
        train_seconds=train_seconds,
        last=rows[-1],
        evaluation=evaluation,
        baselines=baselines,
        digest=digest,
        undisturbed_digest=undisturbed,
        seconds=time.monotonic() - start,
    )


def title(number: int, text: str) -> None:
    """Print what comes next."""
    rich.print(f"\n[bold]{number}. {text}[/]")


def _clear(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARKER).exists():
        raise ConfigError(f"{folder} is not empty and not an earlier demo: choose another with --dir.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARKER).touch()


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token shards of the training files and of the held-out ones, and the latter's text."""

    train: Shards
    held_out: Shards
    held_out_bytes: bytes


def library() -> Path:
    """Return the folder of the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _sources() -> Iterator[Path]:
    """Yield the standard library's modules that are UTF-8 and not empty; tests and generated tables are left out."""
    root = library()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _LEFT_OUT & set(parts[:-1]):
            continue
        try:
            if path.read_text(encoding="utf-8").strip():
                yield path
        except (OSError, UnicodeDecodeError):
            continue


def split() -> tuple[list[Path], list[Path], list[Path]]:
    """Return the files to learn from, a twentieth to be scored on, and a tenth that the second act asks about.

    By a hash of a file's name, so that the same are held out on every machine with this Python.
    """
    train, scored, asked, num_scored_bytes = [], [], [], 0
    for path in _sources():
        share, num_bytes = hashlib.sha256(path.name.encode()).digest()[0] / 256, path.stat().st_size
        if share < 0.047 and num_scored_bytes + num_bytes <= _HELD_OUT_BYTES:
            scored.append(path)
            num_scored_bytes += num_bytes
        else:
            (asked if share > 0.9 else train).append(path)
    if not train or not scored or not asked:
        raise DataError("this Python has no standard library source to learn from: run the demo with another one.")
    return train, scored, asked


def _prepare(folder: Path, tokenizer: Tokenizer) -> Corpus:
    start = time.monotonic()
    train, held_out, _ = split()
    for paths, name in ((train, "train"), (held_out, "held_out")):
        prepare(paths, folder / "data" / name, tokenizer=tokenizer, settings=Settings("text"))
    opened = [token_shards.open_shards(folder / "data" / name) for name in ("train", "held_out")]
    rich.print(
        f"{len(train)} files, {opened[0].num_tokens:,} tokens for training; {len(held_out)} files, "
        f"{opened[1].num_tokens:,} tokens held out; {time.monotonic() - start:.1f} s"
    )
    return Corpus(opened[0], opened[1], b"".join(path.read_bytes() for path in held_out))


def _num_steps() -> int:
    """Return as many steps of recipe `tiny` as this machine does in `_TRAIN_SECONDS`."""
    config = load_config("tiny")
    lengths = [SEQ_LENGTH] * config.train.global_batch_sequences
    rate = device.peak_flops(torch.device("cpu"), torch.float32)
    steps = int(_TRAIN_SECONDS * _SHARE_OF_RATE * rate / layout.training_flops(config.model, lengths))
    return min(_MAX_STEPS, max(2 * _STRETCHES, steps // _STRETCHES * _STRETCHES))


def _train(folder: Path, total_steps: int) -> tuple[str, str]:
    """Train, kill with SIGKILL in mid-stretch, set the newest checkpoint aside, resume from the one before.

    Returns two digests of the weights after the eighth stretch: as the first process left them undisturbed, and as
    the resumed one arrived at them.
    """
    stretch = total_steps // _STRETCHES
    compared = dcp.step_folder(folder / "run" / "checkpoints", stretch * _KILLED_AFTER)
    aside = folder / "undisturbed" / compared.name
    command = [sys.executable, "-m", "ostro", "train", "tiny", *_overrides(folder, total_steps, stretch)]
    with subprocess.Popen(command) as first:
        _wait_for_step(first, folder / "run", stretch * _KILLED_AFTER + max(1, stretch // 2))
        first.send_signal(signal.SIGKILL)
    first.wait()
    rich.print("\n[bold red]SIGKILL[/] — the newest checkpoint is set aside; the run goes on from the one before")
    aside.parent.mkdir()
    compared.rename(aside)
    undisturbed = weights.digest(weights.open_reader(aside))
    with subprocess.Popen(command) as second:
        while not compared.exists() and second.poll() is None:
            time.sleep(0.05)
        digest = weights.digest(weights.open_reader(compared)) if compared.exists() else "never written"
        second.wait()
    if second.returncode:
        raise TrainError(f"the resumed run ended with exit code {second.returncode}; its lines above say why.")
    shutil.rmtree(aside.parent)
    step = stretch * _KILLED_AFTER
    rich.print(f"weights at step {step}, undisturbed:       sha256 {undisturbed[:32]}…")
    rich.print(f"weights at step {step}, killed and resumed: sha256 {digest[:32]}…")
    if digest != undisturbed:
        raise Error("the resumed run did not arrive at the same weights: please report it with `ostro doctor`'s lines.")
    return undisturbed, digest


def _overrides(folder: Path, total_steps: int, stretch: int) -> list[str]:
    return [
        f"data.path={folder / 'data' / 'train'}",
        f"data.seq_length={SEQ_LENGTH}",
        f"train.steps={total_steps}",
        f"checkpoint.every={stretch}",
        "checkpoint.async=false",  # the kill falls between two checkpoints, not into the writing of one
        f"run.dir={folder / 'run'}",
        f"run.log_every={stretch}",
    ]


def _wait_for_step(process: subprocess.Popen[bytes], run_dir: Path, step: int) -> None:
    metrics = run_dir / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.02)
    raise TrainError(f"the training process ended with exit code {process.returncode}; its lines above say why.")


def _baselines(corpus: Corpus) -> Baselines:
    """Count tokens, and pairs of them, over the whole training corpus: more than the model gets to see.

    Pairs are smoothed towards single tokens with weight 100 (MacKay and Peto 1995, a Dirichlet prior).
    """
    vocab = corpus.train.manifest.vocab_size
    tokens = corpus.train.tokens(0, corpus.train.num_tokens).astype(np.int64)
    unigram_V = np.bincount(tokens, minlength=vocab) + 1.0
    unigram_V /= unigram_V.sum()
    pairs, counts = np.unique(tokens[:-1] * vocab + tokens[1:], return_counts=True)
    held = corpus.held_out.tokens(0, corpus.held_out.num_tokens).astype(np.int64)
    inside = np.ones(len(held) - 1, dtype=bool)
    inside[np.asarray(corpus.held_out.document_ends)[:-1] - 1] = False  # a document's first token is not scored
    first, second = held[:-1][inside], held[1:][inside]
    at = np.minimum(np.searchsorted(pairs, first * vocab + second), len(pairs) - 1)
    seen = np.where(pairs[at] == first * vocab + second, counts[at], 0)
    firsts_V = np.bincount(tokens[:-1], minlength=vocab)
    bigram = (seen + 100 * unigram_V[second]) / (firsts_V[first] + 100)
    num_bytes = len(corpus.held_out_bytes)
    return Baselines(
        unigram=float(-np.log2(unigram_V[second]).sum()) / num_bytes,
        bigram=float(-np.log2(bigram).sum()) / num_bytes,
        gzip=8 * len(zlib.compress(corpus.held_out_bytes, 9)) / num_bytes,
    )


def require_equal(a: Path, b: Path) -> None:
    """Print that two checkpoints hold the same bits; WeightsError if they do not."""
    result = verify(a, b)
    if not result.is_equal or result.logits != 0:
        raise WeightsError(f"{b} does not hold what {a} holds: please report it.")
    count = sum(row.num_tensors for row in result.differences)
    rich.print(f"{b}: all {count} tensors equal bit for bit, and the logits too")


def _write(engine: Engine) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=0.7, top_p=0.9, repetition_penalty=1.15, seed=7)
    for completion in engine.generate(_PROMPTS, sampling):
        rich.print(_coloured(engine.tokenizer, completion))
        rich.print(Text("─" * 60, style="dim"))


def _coloured(tokenizer: Tokenizer, completion: Completion) -> Text:
    text = Text(completion.prompt, style="dim")
    stream = tokenizer.stream()
    for token in tokenizer.encode(completion.prompt, bos=True):
        stream.push(token)
    for token, expert in zip(completion.token_ids, completion.experts, strict=True):
        text.append(stream.push(token), style=_COLOURS[expert % len(_COLOURS)])
    return text.append(stream.flush())


def _peak_memory_bytes() -> int:
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return scale * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def next_commands(folder: Path, has_lesson: bool = False) -> list[str]:
    """Return the commands the last page proposes; a test runs each."""
    ask = f"""echo "What does textwrap.shorten do?" | ostro chat {folder}/lora --max-new-tokens 60"""
    return [
        f'ostro generate {folder}/hf "import os" --max-new-tokens 60 --temperature 0.8',
        f"ostro evaluate {folder}/run {folder}/data/held_out --seq-length {SEQ_LENGTH}",
        f"ostro verify {folder}/run {folder}/hf",
        f"ostro train tiny data.path={folder}/data/train train.steps=2 model.num_hidden_layers=2 run.dir={folder}-mine",
        "ostro recipes ls",
        *([ask] if has_lesson else []),
    ]


def page(folder: Path, summary: Summary, lesson: Mapping[str, str] | None = None, seconds: float = 0.0) -> None:
    """Print the last page, what the second act found in a section of its own, and what to do next.

    `seconds` are those of the second act.
    """
    last, found, base = summary.last, summary.evaluation, summary.baselines
    share, counted = found.bits_per_byte / base.unigram, f"unigram {base.unigram:.3f}, bigram {base.bigram:.3f}"
    first = {
        "text": f"{summary.num_tokens:,} tokens of the standard library, {found.num_tokens:,} held out",
        "training": f"{summary.steps} steps, {last['tokens']:,} tokens, {summary.train_seconds:.0f} s with the kill",
        "speed": f"{last['tokens_per_second']:,.0f} tokens/s, {last['mfu']:.0%} of this machine's matrix rate",
        "resumed": f"same weights, bit for bit: {summary.digest[:16]}… = {summary.undisturbed_digest[:16]}…",
        "bits per byte": f"[bold]{found.bits_per_byte:.3f}[/], {share:.0%} of the unigram's",
        "counted": f"{counted}, over all training text; gzip -9 {base.gzip:.3f}",
        "expert load": f"{max(max(loads) for loads in found.expert_load):.0%} at most, an even share is 12.5%",
        "export": f"{folder / 'hf'}: equal to the run, ready for transformers",
        "picture": f"{folder / 'demo.png'}",
    }
    total = summary.seconds + seconds
    end = {"all of it": f"{total:.0f} s, {_peak_memory_bytes() / 1e9:.1f} GB of memory at most"}
    table = Table.grid(padding=(0, 2))
    for section in filter(None, (first, lesson, end)):
        if section is lesson:
            table.add_row()
        for name, value in section.items():
            table.add_row(Text(name, style="dim"), value)
    rich.print()
    rich.print(Panel(table, title="ostro demo", expand=False))
    rich.print("next:" if shutil.which("ostro") else "next, with this Python's folder of commands on your PATH:")
    for command in next_commands(folder, has_lesson=lesson is not None):
        print(f"  {command}")
