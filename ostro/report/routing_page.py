"""The routing of tokens to look at: figures as in the Mixtral paper, and text coloured by expert on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ostro import log
from ostro.data.tokenizer import Tokenizer
from ostro.report import charts
from ostro.report.page import render
from ostro.report.pictures import FAINT, bar, plotting, show_load
from ostro.report.routing import Domain, chosen_layers, random_repetition

_DOMAINS = ("#2563a8", "#c2571a", "#3c8a5a", "#8a4fa3", "#b08a00", "#0f8a98", "#b8436b", "#6b6f7a")


def draw_routing(domains: Sequence[Domain], folder: Path) -> None:
    """Write load.png (figure 7), layers.png (the same of all layers) and repetition.png (table 5 of all layers)."""
    with plotting() as plt:
        for name, draw in {"load": _bars, "layers": _heat, "repetition": _repetition}.items():
            draw(plt, domains).savefig(folder / f"{name}.png", dpi=150)


def _bars(plt: Any, domains: Sequence[Domain]) -> Any:
    num_layers, _, num_experts = domains[0].choices_LAE.shape
    layers = chosen_layers(num_layers)
    figure, grid = plt.subplots(
        len(layers), 1, figsize=(8, 0.9 + 1.7 * len(layers)), squeeze=False, sharex=True, layout="constrained"
    )
    width = 0.8 / len(domains)
    for layer, axes in zip(layers, grid[:, 0], strict=True):
        for i, domain in enumerate(domains):
            places = np.arange(num_experts) + (i - (len(domains) - 1) / 2) * width
            color = _DOMAINS[i % len(_DOMAINS)]
            axes.bar(places, domain.load[layer], width * 0.9, color=color, label=domain.name)
        axes.axhline(1 / num_experts, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_title(f"layer {layer}")
        axes.yaxis.set_major_formatter(lambda value, _: charts.share(value))
        axes.grid(visible=True, axis="y")
        axes.tick_params(length=0)
    grid[-1, 0].set_xticks(range(num_experts))
    grid[-1, 0].set_xlabel("expert; the dashed line is an even share of the choices")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=min(4, len(domains)), loc="outside upper center")
    return figure


def _heat(plt: Any, domains: Sequence[Domain]) -> Any:
    num_layers, _, num_experts = domains[0].choices_LAE.shape
    columns = min(4, len(domains))
    lines = -(-len(domains) // columns)
    size = (1.2 + 2.2 * columns, lines * (0.9 + min(3.6, max(1.5, 0.16 * num_layers))))
    figure, grid = plt.subplots(
        lines, columns, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    image = None
    for axes, domain in zip(grid.flat, domains, strict=False):
        image = show_load(axes, domain.load * num_experts)
        axes.set_title(domain.name)
        axes.set_yticks(sorted({*range(0, num_layers, 1 if num_layers <= 8 else 8), num_layers - 1}))
        axes.set_xticks(range(num_experts) if num_experts <= 8 else [0, num_experts - 1])
        for spine in axes.spines.values():
            spine.set_visible(False)
    for axes in grid.flat[len(domains) :]:
        axes.axis("off")
    grid[0, 0].set_ylabel("layer")
    grid[-1, 0].set_xlabel("expert")
    bar(figure, image, grid)
    return figure


def _repetition(plt: Any, domains: Sequence[Domain]) -> Any:
    num_layers, num_choices, num_experts = domains[0].choices_LAE.shape
    titles = ("same first expert as the token before", "an expert in common with the token before")
    figure, grid = plt.subplots(1, 2, figsize=(10, 3.4), sharex=True, layout="constrained")
    for which, (axes, title) in enumerate(zip(grid, titles, strict=True)):
        for i, domain in enumerate(domains):
            color = _DOMAINS[i % len(_DOMAINS)]
            axes.plot(domain.repetition[:, which], "o-", color=color, ms=4, lw=1.6, label=domain.name)
        axes.axhline(
            random_repetition(num_experts, num_choices)[which],
            color=FAINT,
            linewidth=0.9,
            linestyle=(0, (4, 3)),
            label="at random",
        )
        axes.set_title(title)
        axes.set_xlabel("layer")
        axes.set_xticks(range(num_layers) if num_layers <= 8 else range(0, num_layers, 4))
        axes.yaxis.set_major_formatter(lambda value, _: charts.share(value))
        axes.grid(visible=True, axis="y")
        axes.tick_params(length=0)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=min(5, len(labels)), loc="outside lower center")
    return figure


def write_routing_page(domains: Sequence[Domain], tokenizer: Tokenizer, model: str, folder: Path) -> None:
    """Write routing.html: each domain's first tokens in the colours of their experts, at any layer."""
    num_layers, num_choices, num_experts = domains[0].choices_LAE.shape
    start = (num_layers - 1) // 2
    content = {
        "model": model,
        "facts": [
            f"{num_layers} layers of {num_experts} experts",
            f"{num_choices} a token",
            f"{charts.count(sum(domain.num_tokens for domain in domains))} tokens read",
        ],
        "num_layers": num_layers,
        "hues": [round(360 * expert / num_experts + 20) for expert in range(num_experts)],
        "start": start,
        "domains": [
            {
                "name": domain.name,
                "tokens": list(zip(_texts(tokenizer, domain.tokens_T), domain.experts_LTA[start, :, 0].tolist())),
            }
            for domain in domains
        ],
        "experts": [domain.experts_LTA.tolist() for domain in domains],
        "table": _table(domains),
    }
    log.write_text(folder / "routing.html", render("routing.html", **content))


def _texts(tokenizer: Tokenizer, tokens_T: np.ndarray) -> list[str]:
    """Return what each token adds to the text; a character of several tokens appears with its last."""
    stream = tokenizer.stream()
    texts = [stream.push(int(token)) for token in tokens_T]
    texts[-1] += stream.flush()
    return [text.replace("\r", "") for text in texts]  # which a browser would show as a line's end of its own


def _table(domains: Sequence[Domain]) -> dict[str, Any]:
    """Return table 5: a line a domain, the chosen layers twice; last what two blind choices would give."""
    num_layers, num_choices, num_experts = domains[0].choices_LAE.shape
    layers, blind = chosen_layers(num_layers), random_repetition(num_experts, num_choices)
    rows = [
        (domain.name, [[charts.share(domain.repetition[layer, which]) for layer in layers] for which in (0, 1)])
        for domain in domains
    ]
    return {"layers": layers, "rows": [*rows, ("at random", [[charts.share(each)] * len(layers) for each in blind])]}


def console_tables(domains: Sequence[Domain]) -> dict[str, Any]:
    """Return the repetitions and the busiest expert's load at the chosen layers, tables of rich's by their titles."""
    from rich.table import Table

    num_layers, _, num_experts = domains[0].choices_LAE.shape
    layers, rows = chosen_layers(num_layers), _table(domains)["rows"]
    busiest = [[charts.share(domain.load[layer].max()) for layer in layers] for domain in domains]
    even = [charts.share(1 / num_experts)] * len(layers)
    found = {
        "the next token has the same first expert": [shares[0] for _, shares in rows],
        "the next token has an expert in common": [shares[1] for _, shares in rows],
        "the busiest expert's share of the choices": [*busiest, even],
    }
    tables = {}
    for title, shares in found.items():
        tables[title] = table = Table(box=None, pad_edge=False)
        for name in ("text", *[f"layer {layer}" for layer in layers]):
            table.add_column(name, justify="left" if name == "text" else "right", header_style="dim")
        for (name, _), line in zip(rows, shares, strict=True):
            table.add_row(name, *line)
    return tables
