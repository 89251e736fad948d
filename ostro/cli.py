"""The verbs. Each imports what it needs when it runs, so that `ostro --help` is instant.

Errors of ours are printed as one sentence and end with their exit code (errors.py); `--debug` shows the traceback.
"""

from __future__ import annotations

import errno
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ostro.serve.engine import Completion, Engine
    from ostro.serve.sampling import Sampling

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    name="ostro",
    help="Mixtral from text to a model that writes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="List and copy the shipped recipes.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

Model = Annotated[str, typer.Argument(help="A checkpoint of any format, or a run directory.")]
TokenizerOption = Annotated[
    str | None, typer.Option("--tokenizer", help="v1, v3, a .model, a tokenizer.json, or a folder.")
]
Dtype = Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")]


@app.command()
def demo(
    directory: Annotated[Path, typer.Option("--dir", help="Where everything is written.")] = Path("runs/demo"),
) -> None:
    """Run the main job end to end on the Python standard library's own text; nothing is downloaded."""
    from ostro.demo import demo as run_demo

    run_demo(directory)


@app.command()
def doctor() -> None:
    """Check what this machine has: pass, warn or fail."""
    from ostro import doctor as doctors

    checks = doctors.doctor()
    doctors.render(checks)
    raise typer.Exit(doctors.exit_status(checks))


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the recipes and the model presets."""
    from ostro import config

    typer.echo("recipes: " + ", ".join(config.recipe_names()))
    typer.echo("models:  " + ", ".join(config.preset_names()))


@recipes_app.command("cp")
def recipes_cp(name: str, file: Path) -> None:
    """Copy a recipe to FILE, to be changed."""
    from ostro import config
    from ostro.errors import ConfigError

    source = config.recipe_path(name)
    if file.exists():
        raise ConfigError(f"{file} exists: choose another name.")
    file.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    typer.echo(f"wrote {file}")


@app.command()
def prepare(
    sources: Annotated[list[str], typer.Argument(help="Files, folders, or quoted globs, of any kind.")],
    *,
    out: Annotated[Path | None, typer.Option(help="The folder of token shards to write, or the file.")] = None,
    kind: Annotated[str, typer.Option(help="auto, text, wikitext, jsonl, alpaca, sharegpt, messages …")] = "auto",
    documents: Annotated[str, typer.Option(help="A document of a text file: file, line or blank.")] = "file",
    template: Annotated[str, typer.Option(help="auto, mistral-v1, mistral-v3, vicuna or tokenizer.")] = "auto",
    tokenizer: TokenizerOption = "v1",
    style: Annotated[str, typer.Option(help="native, or mindformers: the seed's records exactly.")] = "native",
    to: Annotated[str, typer.Option(help="native, mindrecord or megatron.")] = "native",
    seq_length: Annotated[int | None, typer.Option(help="What --check counts by; a MindRecord's length.")] = None,
    repeat: Annotated[int, typer.Option(help="mindformers: the text this many times.")] = 1,
    partitions: Annotated[int, typer.Option(help="mindformers: into this many files.")] = 1,
    check: Annotated[bool, typer.Option("--check", help="Read everything, name each bad record; exit 3.")] = False,
    fix: Annotated[Path | None, typer.Option(help="Write the good records here, as JSON Lines.")] = None,
    preview: Annotated[int, typer.Option(help="Show this many records; what is learned is green.")] = 0,
    dedup: Annotated[bool, typer.Option("--dedup", help="Leave out records that equal an earlier one.")] = False,
    conversations: Annotated[Path | None, typer.Option(help="mindformers: write alpaca_converter's JSON here.")] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="--check: how fast you train, for the time.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; one a core unless given.")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: only this share, for a cluster's scheduler.")] = None,
    ray: Annotated[str | None, typer.Option(help="A Ray cluster's address (auto, host:port, local): it works.")] = None,
) -> None:
    """Turn texts and conversations into token shards, or check them."""
    from ostro.preparation import Request
    from ostro.preparation import prepare as run_prepare

    run_prepare(
        Request(
            sources=sources,
            out=out,
            kind=kind,
            documents=documents,
            template=template,
            tokenizer=tokenizer or "v1",
            style=style,
            to=to,
            seq_length=seq_length,
            repeat=repeat,
            partitions=partitions,
            check=check,
            fix=fix,
            preview=preview,
            workers=workers,
            share=shard,
            dedup=dedup,
            conversations=conversations,
            tokens_per_second=tokens_per_second,
            ray=ray,
        ),
        typer.echo,
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.")],
    resume: Annotated[bool, typer.Option("--resume", help="There must be a checkpoint to resume from.")] = False,
    nproc_per_node: Annotated[int, typer.Option(help="Processes on this host, one a device.")] = 1,
    nnodes: Annotated[int, typer.Option(help="Hosts; start the same command on each.")] = 1,
    node_rank: Annotated[int, typer.Option(help="Which host this is, from 0; 0 keeps the store.")] = 0,
    master_addr: Annotated[str | None, typer.Option(help="The address of the host with node rank 0.")] = None,
    master_port: Annotated[int | None, typer.Option(help="A free port of that host; 29500 unless given.")] = None,
    rdzv_timeout: Annotated[float, typer.Option(help="Seconds the hosts wait for each other.")] = 600.0,
    timeout_seconds: Annotated[float, typer.Option(help="Seconds a collective may wait for a rank.")] = 600.0,
    max_restarts: Annotated[int, typer.Option(help="Starts after a failure, from the last checkpoint.")] = 3,
    log_dir: Annotated[Path | None, typer.Option(help="A log a rank; run.dir/logs unless given.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Go on in the background.")] = False,
) -> None:
    """Train: RECIPE, then any number of overrides (a.b=c or --a.b c)."""
    from ostro.config import load_config

    overrides = list(context.args) + (["checkpoint.resume=must"] if resume else [])
    config = load_config(recipe, overrides)
    if detach or nproc_per_node != 1 or nnodes != 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read with torch: a lost host is told in a sentence
        from ostro.parallel.launch import LaunchOptions, launch_ostro

        options = LaunchOptions(
            log_dir=log_dir or Path(config.run.dir) / "logs",
            nproc_per_node=nproc_per_node,
            nnodes=nnodes,
            node_rank=node_rank,
            master_addr=master_addr,
            master_port=master_port,
            rdzv_timeout=rdzv_timeout,
            timeout_seconds=timeout_seconds,
            max_restarts=max_restarts,
        )
        options.check()
        config.parallel.degrees().require_ranks(nproc_per_node * nnodes)  # before any of them is started
        debug = ["--debug"] if "--debug" in sys.argv else []
        raise typer.Exit(launch_ostro([*debug, "train", recipe, *overrides], options, in_background=detach))
    from ostro.training import train_here

    stopped = train_here(config, typer.echo)
    if stopped is not None:
        raise typer.Exit(128 + stopped)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def plan(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a YAML file.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count one step of the real model.")] = False,
    rank: Annotated[list[int] | None, typer.Option(help="Of this rank; first and last stage unless given.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers here as well.")] = None,
) -> None:
    """Say what a recipe needs a device, with no device there: RECIPE, then any number of overrides (a.b=c)."""
    from ostro.config import load_config
    from ostro.plan import plan as run_plan

    run_plan(load_config(recipe, list(context.args)), rank, is_dry_run=dry_run, json_file=json_file)


@app.command()
def evaluate(
    model: Model,
    data: Annotated[list[str], typer.Argument(help="Prepared data, or text.")],
    seq_length: Annotated[int, typer.Option(help="Tokens a row.")] = 1024,
    kind: Annotated[str, typer.Option(help="auto, text or jsonl.")] = "auto",
    tokenizer: TokenizerOption = None,
    dtype: Dtype = "auto",
) -> None:
    """Print loss, perplexity, bits per byte and expert load."""
    import tempfile

    from ostro.data import shards
    from ostro.data.prepare import prepare as run_prepare
    from ostro.data.tasks import Settings
    from ostro.dataset import check_data
    from ostro.errors import ConfigError
    from ostro.evaluate import evaluate as run_evaluate
    from ostro.serve.engine import load_model, tokenizer_of

    loaded = load_model(model, dtype)
    words = tokenizer_of(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        raw = [path for path in data if not shards.is_prepared(path)]
        folders = [Path(path) for path in data if shards.is_prepared(path)]
        if raw:
            run_prepare(raw, Path(folder) / "data", tokenizer=words, settings=Settings(kind))
            folders.append(Path(folder) / "data")
        opened = [shards.open_shards(path) for path in folders]
        for path, one in zip(folders, opened, strict=True):
            check_data(path, one, words, loaded.config)
        if seq_length > loaded.config.max_position_embeddings:
            raise ConfigError(
                f"--seq-length {seq_length} is more than the model's {loaded.config.max_position_embeddings} positions."
            )
        result = run_evaluate(loaded, opened, seq_length)
    bits = "" if math.isnan(result.bits_per_byte) else f"bits/byte {result.bits_per_byte:.4f}  "
    typer.echo(
        f"loss {result.loss:.4f}  perplexity {result.perplexity:.2f}  {bits}"
        f"({result.num_tokens:,} tokens, {result.num_bytes:,} bytes, {result.seconds:.1f} s)"
    )
    for layer, loads in enumerate(result.expert_load):
        typer.echo(f"layer {layer:>2} expert load  " + "  ".join(f"{load:5.1%}" for load in loads))


@app.command()
def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="A checkpoint of any format, rank folders, a run directory; or one folder a host, to join."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="The folder to write, or a file ending in .ckpt or .gguf.")],
    to: Annotated[str | None, typer.Option(help="hf, mistral, mindspore, mindspore-gmm, dcp or gguf.")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="The source's format, where it is not seen.")] = None,
    model: Annotated[str | None, typer.Option(help="A preset or a config.json, where sizes do not tell.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; the source's unless given.")] = None,
    keep_fp32: Annotated[bool, typer.Option("--keep-fp32", help="Norms and router in fp32 all the same.")] = False,
    tokenizer: TokenizerOption = None,
    strategy: Annotated[Path | None, typer.Option(help="MindSpore's strategy files, where not beside.")] = None,
    step: Annotated[int | None, typer.Option(help="Which step; the newest whole one unless given.")] = None,
    layout: Annotated[str | None, typer.Option(help="Write for a cluster: dp=8,tp=1,ep=8,pp=2.")] = None,
    host: Annotated[str | None, typer.Option(help="i/n: only what host i of n needs of the layout.")] = None,
    optimizer: Annotated[bool, typer.Option("--optimizer", help="MindSpore to MindSpore: keep its state.")] = False,
    qkv_concat: Annotated[bool, typer.Option("--qkv-concat", help="MindSpore: q, k and v in one.")] = False,
    quantize: Annotated[str | None, typer.Option(help="GGUF: f32, bf16, f16, q8_0 or q4_0.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read back from the disk and compare every bit.")] = False,
) -> None:
    """Write a checkpoint in another format; it appears whole or not at all."""
    from ostro.conversion import Request
    from ostro.conversion import convert as run_convert

    run_convert(
        Request(
            source=sources[0],
            others=tuple(sources[1:]),
            target=target,
            to=to,
            format=from_,
            model=model,
            strategy=strategy,
            step=step,
            dtype=dtype,
            keep_fp32=keep_fp32,
            tokenizer=tokenizer,
            layout=layout,
            host=host,
            optimizer=optimizer,
            qkv_concat=qkv_concat,
            quantize=quantize,
            verify=verify,
        ),
        typer.echo,
    )


@app.command()
def inspect(
    path: Model,
    from_: Annotated[str | None, typer.Option("--from", help="Its format, where it is not seen.")] = None,
    model: Annotated[str | None, typer.Option(help="A preset or a config.json, where sizes do not tell.")] = None,
    strategy: Annotated[Path | None, typer.Option(help="MindSpore's strategy files, where not beside.")] = None,
    step: Annotated[int | None, typer.Option(help="Which step; the newest whole one unless given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not read the values: no NaN count, no checksums.")] = False,
) -> None:
    """Show what a checkpoint holds, by kind, and what is missing, extra or NaN; exit 5 if it is unsound."""
    from ostro.errors import WeightsError
    from ostro.inspection import hints_of, rendered
    from ostro.inspection import inspect as run_inspect

    found = run_inspect(Path(path), hints_of(from_, model, strategy, step), quick=quick)
    typer.echo(rendered(found, quick=quick))
    if found.faults:
        raise WeightsError(" ".join(found.faults))


@app.command()
def download(
    repo: Annotated[str, typer.Argument(help="OWNER/NAME on the Hugging Face hub.")],
    directory: Annotated[Path | None, typer.Argument(help="The folder to fill; ./NAME unless given.")] = None,
    revision: Annotated[str, typer.Option(help="A branch, a tag or a commit.")] = "main",
    include: Annotated[list[str] | None, typer.Option(help="Fetch what this glob names; may be given again.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave out what this glob names.")] = None,
) -> None:
    """Fetch a model from the Hugging Face hub, or go on with it; no other verb fetches anything."""
    from ostro.weights.download import download as run_download

    folder = run_download(repo, directory, revision=revision, include=include or (), exclude=exclude or ())
    typer.echo(f"{folder} is whole and its checksums are right; next: ostro generate {folder} PROMPT")


@app.command()
def verify(
    a: Model,
    b: Model,
    from_: Annotated[str | None, typer.Option("--from", help="The format of one, where it is not seen.")] = None,
    model: Annotated[str | None, typer.Option(help="A preset or a config.json, where sizes do not tell.")] = None,
    strategy: Annotated[Path | None, typer.Option(help="MindSpore's strategy files, where not beside.")] = None,
    step: Annotated[int | None, typer.Option(help="Which step; the newest whole one unless given.")] = None,
) -> None:
    """Compare two checkpoints tensor by tensor, then their logits on a fixed input; exit 5 if they differ."""
    from ostro.errors import WeightsError
    from ostro.inspection import hints_of
    from ostro.verify import verify as run_verify

    result = run_verify(a, b, hints_of(from_, model, strategy, step))
    for row in result.differences:
        word = "equal" if row.equal_bits else "equal values, another dtype"
        if not row.is_same:
            word = f"differs by {row.max_absolute:.3g} ({row.max_relative:.2g} of the largest)"
        typer.echo(f"{row.kind:<62} {row.num_tensors:>4}  {word}")
    typer.echo(result.reason if result.logits is None else f"logits differ by {result.logits:.3g}")
    if not result.is_equal:
        raise WeightsError(f"{a} and {b} do not hold the same values.")


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts to complete.")] = None,
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="A file with a prompt a line.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write JSON Lines here instead of printing.")] = None,
    max_new_tokens: int = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all.")] = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: Annotated[int, typer.Option(help="Each prompt draws from a generator of its own with this seed.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text; may be given again.")] = None,
    tokenizer: TokenizerOption = None,
    dtype: Dtype = "auto",
) -> None:
    """Complete prompts; one alone is streamed."""
    from ostro.errors import RequestError
    from ostro.serve.engine import Engine, load_model, tokenizer_of
    from ostro.serve.sampling import Sampling

    texts = list(prompts or []) + (_read_prompts(prompts_file) if prompts_file else [])
    if not texts:
        raise RequestError("there is no prompt: give one or more, or --prompts FILE.")
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ()))
    if out is not None and (not out.parent.is_dir() or (out.exists() and not out.is_file())):
        raise RequestError(f"--out {out} cannot be written: name a file in a folder that exists.")
    engine = Engine(load_model(model, dtype), tokenizer_of(model, tokenizer))
    if len(texts) == 1 and out is None:
        _stream(engine, texts[0], sampling)
        return
    _write_completions(engine.generate(texts, sampling), out)


def _stream(engine: Engine, prompt: str, sampling: Sampling) -> None:
    untold = [prompt]  # shown with the first text, when nothing can be wrong with it any more

    def show(_: int, text: str) -> None:
        print(*[untold.pop()] if untold else [], text, sep="", end="", flush=True)

    engine.generate([prompt], sampling, show)
    print(*untold)


def _read_prompts(file: Path) -> list[str]:
    from ostro.errors import DataError

    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as text: {error}.") from None


def _write_completions(completions: list[Completion], out: Path | None) -> None:
    import json

    from ostro import log

    if out is None:
        typer.echo("\n\n".join(f"{c.prompt}{c.text}" for c in completions))
        return
    rows = [{"prompt": c.prompt, "text": c.text, "finish_reason": c.finish_reason} for c in completions]
    log.write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    typer.echo(f"wrote {len(rows)} completions to {out}")


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
) -> None:
    """Mixtral from text to a model that writes."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    from ostro.errors import Error, OutOfMemory

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = app(args=arguments, standalone_mode=False)
        return status if isinstance(status, int) else 0
    except Error as error:
        if "--debug" in arguments:
            raise
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted.", 130)
    except MemoryError:
        return _fail("this machine's memory is not enough.", OutOfMemory.exit_code)
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _foreign(error)


def _foreign(error: Exception) -> int:
    if isinstance(error, BrokenPipeError):  # whoever read our output has had enough
        sys.stdout = None
        return 0
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _FULL):
        return _fail(f"{error.filename or 'the disk'}: {error.strerror}.", 4 if error.errno in _FULL else 1)
    if isinstance(error, typer.Abort):
        return _fail("interrupted.", 130)
    show = getattr(error, "show", None)
    if show is not None:  # a usage error, of click or of the copy of it that newer typers carry
        show()
        return 2
    if any(words in str(error).lower() for words in ("out of memory", "can't allocate memory", "tried to allocate")):
        return _fail(f"the device's memory is not enough: {error}", 4)
    return _fail(f"{type(error).__name__}: {error} (a bug of Ostro's; --debug shows where)", 1)


def _fail(sentence: str, exit_code: int) -> int:
    import rich.console
    import rich.text

    console = rich.console.Console(stderr=True, soft_wrap=True)
    console.print(rich.text.Text("ostro: ", style="bold red") + rich.text.Text(sentence))
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
