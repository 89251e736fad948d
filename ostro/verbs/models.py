"""The verbs that use a model: evaluate it, let it write."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ostro.verbs.options import AdapterOption, Dtype, ModelOrRecipe, TokenizerOption

if TYPE_CHECKING:
    from ostro.data.tokenizer import Tokenizer
    from ostro.model.mixtral import Mixtral
    from ostro.serve.engine import Completion, Engine
    from ostro.serve.sampling import Sampling


def evaluate(
    model: ModelOrRecipe,
    data: Annotated[list[str] | None, typer.Argument(help="Prepared data, or text.")] = None,
    seq_length: Annotated[int, typer.Option(help="Tokens a row.")] = 1024,
    kind: Annotated[str, typer.Option(help="auto, text or jsonl.")] = "auto",
    tasks: Annotated[str | None, typer.Option(help="lm-eval's tasks instead of data: hellaswag,arc_easy")] = None,
    tasks_dir: Annotated[Path | None, typer.Option(help="A folder with task files (YAML) of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question; the task's own.")] = None,
    batch_size: Annotated[int, typer.Option(help="Contexts at once; 0 by their tokens.")] = 0,
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template", help="Ask as in a chat.")] = False,
    template: Annotated[str, typer.Option(help="Which: auto, mistral-v1, mistral-v3, vicuna, tokenizer.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the tasks' results here as well.")] = None,
    tokenizer: TokenizerOption = None,
    dtype: Dtype = "auto",
    adapter: AdapterOption = None,
) -> None:
    """Print loss, perplexity, bits per byte and expert load; or what lm-eval's tasks say."""
    from ostro.errors import ConfigError
    from ostro.serve.engine import Engine
    from ostro.serve.load import checkpoint_of, load_model, tokenizer_of

    if bool(data) == bool(tasks):
        raise ConfigError("name data to score or --tasks: ostro evaluate MODEL FILE, or MODEL --tasks hellaswag.")
    model = checkpoint_of(model)
    words = tokenizer_of(model, tokenizer)
    if data:
        _evaluate_data(load_model(model, dtype, adapter=adapter), words, data, seq_length, kind)
        return
    from ostro.serve.chat import template_for
    from ostro.serve.harness import Harness, run, table

    render = template_for(model, template, words)[1] if apply_chat_template else None
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    engine = Engine(load_model(model, dtype, adapter=adapter), words)
    results = run(Harness(engine, render, batch_size), names, tasks_dir=tasks_dir, limit=limit, num_fewshot=num_fewshot)
    if json_file is not None:
        import json

        from ostro import log

        log.write_text(json_file, json.dumps(results, indent=1, default=str) + "\n")
    typer.echo(table(results))


def _evaluate_data(loaded: Mixtral, words: Tokenizer, data: list[str], seq_length: int, kind: str) -> None:
    import tempfile

    from ostro.data import shards
    from ostro.data.prepare import prepare as run_prepare
    from ostro.data.tasks import Settings
    from ostro.dataset import check_data
    from ostro.errors import ConfigError
    from ostro.evaluate import evaluate as run_evaluate

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


def routing(
    model: ModelOrRecipe,
    data: Annotated[list[str], typer.Argument(help="Prepared data, or text; each is a domain.")],
    out: Annotated[Path, typer.Option(help="The folder for tables, figures and the page.")],
    seq_length: Annotated[int, typer.Option(help="Tokens a row.")] = 1024,
    most_tokens: Annotated[int, typer.Option(help="Read so much of each.")] = 65536,
    kind: Annotated[str, typer.Option(help="auto, text or jsonl.")] = "auto",
    tokenizer: TokenizerOption = None,
    dtype: Dtype = "auto",
) -> None:
    """Say which experts take which tokens: load, repetition, figures, and text coloured by expert."""
    import tempfile

    import rich

    from ostro import log
    from ostro.report import routing as analysis
    from ostro.report.routing_page import console_tables, draw_routing, write_routing_page
    from ostro.serve.load import checkpoint_of, load_model, tokenizer_of

    _require_folder(out)
    model = checkpoint_of(model)
    loaded = load_model(model, dtype)
    words = tokenizer_of(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        domains = [
            analysis.route(
                loaded,
                name,
                analysis.open_domain(path, Path(folder) / str(i), words, kind, loaded.config),
                seq_length,
                most_tokens,
            )
            for i, (name, path) in enumerate(zip(analysis.domain_names(data), data, strict=True))
        ]
        analysis.write_tables(domains, out)
        draw_routing(domains, out)
        write_routing_page(domains, words, Path(model).resolve().name, out)
    for title, table in console_tables(domains).items():
        log.say(title, style="bold")
        rich.print(table)
    typer.echo(f"wrote tables and figures to {out}; look at {out / 'routing.html'}")


def _require_folder(out: Path) -> None:
    from ostro.errors import RequestError

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--out {out} cannot be written: {error.strerror}; name a folder.") from None


def generate(
    model: ModelOrRecipe,
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
    adapter: AdapterOption = None,
) -> None:
    """Complete prompts; one alone is streamed."""
    from ostro.errors import RequestError
    from ostro.serve.engine import Engine
    from ostro.serve.load import checkpoint_of, load_model, tokenizer_of
    from ostro.serve.sampling import Sampling

    texts = list(prompts or []) + (_read_prompts(prompts_file) if prompts_file else [])
    if not texts:
        raise RequestError("there is no prompt: give one or more, or --prompts FILE.")
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ()))
    if out is not None and (not out.parent.is_dir() or (out.exists() and not out.is_file())):
        raise RequestError(f"--out {out} cannot be written: name a file in a folder that exists.")
    model = checkpoint_of(model)
    engine = Engine(load_model(model, dtype, adapter=adapter), tokenizer_of(model, tokenizer))
    if len(texts) == 1 and out is None:
        _stream(engine, texts[0], sampling)
        return
    _write_completions(engine.generate(texts, sampling), out)


def chat(
    model: ModelOrRecipe,
    adapter: AdapterOption = None,
    system: Annotated[str, typer.Option(help="A system prompt.")] = "",
    template: Annotated[str, typer.Option(help="auto, mistral-v1, mistral-v3, vicuna or tokenizer.")] = "auto",
    prompts_file: Annotated[Path | None, typer.Option("--prompts", help="A file with a turn a line.")] = None,
    max_new_tokens: int = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 keeps all.")] = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: Annotated[int, typer.Option(help="What sampling starts from.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End an answer at this text; may be given again.")] = None,
    tokenizer: TokenizerOption = None,
    dtype: Dtype = "auto",
) -> None:
    """Talk with a model: on a terminal, or a line a turn on stdin."""
    from ostro.serve.chat import Dialogue, converse, template_for
    from ostro.serve.engine import Engine
    from ostro.serve.load import checkpoint_of, load_model, tokenizer_of
    from ostro.serve.sampling import Sampling

    model = checkpoint_of(model)
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, tuple(stop or ()))
    prompts = None if prompts_file is None else _read_prompts(prompts_file)
    words = tokenizer_of(model, tokenizer)
    name, render, note = template_for(adapter or model, template, words)
    engine = Engine(load_model(model, dtype, adapter=adapter), words)
    positions = engine.model.config.max_position_embeddings
    title = f"{model}, template {name}, {positions:,} positions"
    converse(Dialogue(engine, render, sampling, system), title, note, prompts)


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
