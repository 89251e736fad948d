"""Activation recompute: what a backward pass makes again instead of keeping it.

selective: what lies inside the experts, by far the most of a Mixtral's activations; nothing is sent twice. full: whole
blocks, of which only the input is kept. Routing is a pure function of its input, so it comes out the same.
"""

from __future__ import annotations

import functools
from typing import Any

from torch.utils.checkpoint import checkpoint

from ostro.model.mixtral import Mixtral


def blocks(model: Mixtral) -> None:
    """Wrap whole blocks; comes after the meshes' functions, before FSDP."""
    for block in model.blocks.values():
        block.forward = functools.partial(_again, block.forward)  # pyright: ignore[reportAttributeAccessIssue]


def experts(model: Mixtral) -> None:
    """Wrap the experts of this process alone; comes before expert parallel wraps them."""
    for block in model.blocks.values():
        held = block.block_sparse_moe.experts
        held.dispatch = functools.partial(_again, held.dispatch)


def _again(function: Any, *args: Any) -> Any:
    # Nothing is drawn from a generator: jitter is counted, not drawn.
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
