"""The verbs of a training run: prepare its data, train, plan it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ostro.verbs.options import TokenizerOption


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


def report(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """Write a run's report.html and pictures again, from what lies in its directory."""
    from ostro.report.run import closing_lines, write_report

    typer.echo("\n".join(closing_lines(write_report(run))))
