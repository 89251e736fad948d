"""What the model says as it trains: prompts of a file completed greedily, on whatever ranks it trains on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ostro import log
from ostro.batch import batch_of
from ostro.data.loader import Row
from ostro.data.tokenizer import Tokenizer
from ostro.errors import DataError
from ostro.model import ops
from ostro.parallel.apply import World

FILE = "samples.jsonl"


def read_prompts(path: str) -> list[str]:
    """Return the lines of a file that are not blank."""
    try:
        prompts = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"train.samples={path} cannot be read ({error}): name a text file.") from None
    if not prompts:
        raise DataError(f"train.samples={path} has no line that is not blank: write a prompt on each line.")
    return prompts


def write(run_dir: Path, step: int, prompts: Sequence[str], texts: Sequence[str]) -> None:
    """Append a step's completions, one JSON object a line."""
    if log.is_main_rank():
        with (run_dir / FILE).open("a", encoding="utf-8") as file:
            for prompt, text in zip(prompts, texts, strict=True):
                file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")


def complete(world: World, tokenizer: Tokenizer, prompts: Sequence[str], num_tokens: int) -> list[str]:
    """Return what follows each prompt, up to `num_tokens` tokens or the end; every rank calls it.

    All ranks compute the same tokens, all prompts at once and without a cache: where parameters are gathered, that is
    what takes the time. Rank 0 chooses, since ranks may round differently.
    """
    ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    starts = [len(each) for each in ids]
    most = world.model.max_position_embeddings
    was_training = world.is_training
    world.train(False)
    running = [at for at, start in enumerate(starts) if start < most]
    for _ in range(num_tokens):
        if not running:
            break
        chosen = _next_tokens(world, [ids[at] for at in running])
        for at, token in zip(running, chosen, strict=True):
            ids[at].append(token)
        running = [at for at in running if ids[at][-1] != tokenizer.eos_token_id and len(ids[at]) < most]
    world.train(was_training)
    return [_text(tokenizer, each, start) for each, start in zip(ids, starts, strict=True)]


def _next_tokens(world: World, ids: Sequence[Sequence[int]]) -> list[int]:
    """Return the likeliest token after each row."""
    mesh, model = world.mesh, world.pipeline.stages[0].model
    chosen = torch.zeros(len(ids), dtype=torch.int64, device=mesh.device)
    lasts = torch.tensor(np.cumsum([len(row) for row in ids]) - 1, device=mesh.device)

    def choose(x_TD: Tensor, head_VD: Tensor, *_: Any) -> Tensor:
        chosen.copy_(ops.linear(x_TD[lasts], head_VD).argmax(dim=-1))
        return x_TD.new_zeros((), dtype=torch.float32)

    before, model.head_loss = model.head_loss, choose
    try:
        world.score(batch_of([_row(row) for row in ids], mesh.device))
    finally:
        model.head_loss = before
    if mesh.degrees.num_ranks > 1:
        dist.broadcast(chosen, src=0)
    return chosen.tolist()


def _row(ids: Sequence[int]) -> Row:
    tokens = np.asarray(ids, np.int64)
    return Row(tokens, np.zeros_like(tokens), np.zeros(len(tokens), np.float32), (len(tokens),))


def _text(tokenizer: Tokenizer, ids: Sequence[int], start: int) -> str:
    stream = tokenizer.stream()
    for token in ids[:start]:  # whether the answer begins with a space depends on what stands before it
        stream.push(token)
    new = [token for token in ids[start:] if token != tokenizer.eos_token_id]
    return "".join([*(stream.push(token) for token in new), stream.flush()])
