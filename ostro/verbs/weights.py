"""The verbs of checkpoints: convert, inspect, fetch, compare."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ostro.verbs.options import AdapterOption, Model, TokenizerOption


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
    adapter: AdapterOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read back from the disk and compare every bit.")] = False,
    *,
    upcycle: Annotated[bool, typer.Option("--upcycle", help="Make experts of a dense Mistral's layers.")] = False,
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
            adapter=adapter,
            upcycle=upcycle,
        ),
        typer.echo,
    )


def merge_lora(
    base: Model,
    adapter: Annotated[str, typer.Argument(help="A folder of PEFT's, or a run directory that has one.")],
    target: Annotated[Path, typer.Argument(help="The folder to write, or a file ending in .ckpt or .gguf.")],
    to: Annotated[str | None, typer.Option(help="hf, mistral, mindspore, mindspore-gmm, dcp or gguf.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; the base's unless given.")] = None,
    tokenizer: TokenizerOption = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read back from the disk and compare every bit.")] = False,
) -> None:
    """Write a model with a LoRA adapter merged into it, and show how far each matrix moved."""
    from ostro.conversion import Request
    from ostro.conversion import convert as run_convert

    asked = Request(base, target, to=to, dtype=dtype, tokenizer=tokenizer, verify=verify, adapter=adapter)
    run_convert(asked, typer.echo)


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
    name = shlex.quote(str(folder))
    typer.echo(f"{folder} is whole and its checksums are right; next:")
    if not (folder / "adapter_config.json").is_file():
        typer.echo(f"  ostro chat {name}")
        typer.echo(f"  ostro train mixtral-8x7b/qlora weights.path={name} data.path=chat.jsonl   # ostro recipes ls")


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
