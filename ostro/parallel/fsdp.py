"""Sharded data parallel: FSDP2 over what is large; norms, routers and biases are whole on every rank.

The small parameters are a few in 100,000 of a Mixtral's. Left whole they need no gathering, their gradients are summed
once a step in one message, sequence parallel's sums included, and the router stays fp32 where FSDP would hand it over
in bf16. MindFormers does likewise (parallel_optimizer_threshold).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from ostro.model import layout
from ostro.model.mixtral import Block, Mixtral
from ostro.parallel.mesh import Mesh


def apply(
    stage: nn.Module,
    model: Mixtral,
    table: Mapping[str, layout.Parameter],
    mesh: Mesh,
    together: int,
    reshard: bool,
) -> None:
    """Shard the large parameters of a stage, which wraps `model`, over its meshes; one rank's are left as they are.

    Blocks are gathered and reduced `together` at a time. `reshard` frees gathered parameters after the forward pass, to
    be gathered again for the backward pass. Gradients are summed, never averaged: the loss is divided by the labels of
    the whole step.
    """
    blocks: list[Block] = list(model.blocks.values())
    dtype = model.compute_dtype
    kinds = {p: table[name].kind for name, p in model.named_parameters()}
    small = {p for p, kind in kinds.items() if kind.is_small or kind.is_low_rank}
    # Those in 4 bits are whole where tp and ep leave them, and none of torch's parameters.
    experts = [block.block_sparse_moe.experts for block in blocks]
    of_experts = {p for module in experts for p in module.parameters()} - small
    if not of_experts:
        experts = []
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if mesh.sparse is not None:
        by_expert = not experts or experts[0].w13.shape[0] % mesh.degrees.efsdp == 0
        for some in _runs(experts, together):
            fully_shard(
                some,
                mesh=mesh.sparse,
                mp_policy=policy,
                reshard_after_forward=reshard,
                shard_placement_fn=None if by_expert else lambda _: Shard(2),
                ignored_params=small,
            )
    ignored = small | of_experts if mesh.sparse is None else small
    if mesh.dense is not None and any(isinstance(block.self_attn.q_proj.weight, nn.Parameter) for block in blocks):
        for some in _runs(blocks, together):
            fully_shard(some, mesh=mesh.dense, mp_policy=policy, reshard_after_forward=reshard, ignored_params=ignored)
    root = mesh.whole or mesh.sparse
    if root is not None:  # the words' own, and whatever has a part: all are told through it what to do
        if mesh.dense is None:
            ignored |= {p for block in blocks for p in block.parameters()} - (of_experts if mesh.sparse else set())
        if mesh.whole is None:
            ignored |= set(stage.parameters()) - of_experts
        fully_shard(stage, mesh=root, mp_policy=policy, reshard_after_forward=False, ignored_params=ignored)
    for module in _sharded(stage):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def set_reducing(stage: nn.Module, is_reducing: bool, reshards: bool) -> None:
    """Say whether coming backward passes reduce gradients or add them up, and whether they free what is gathered."""
    if isinstance(stage, FSDPModule):
        stage.set_requires_gradient_sync(is_reducing)
        stage.set_reshard_after_backward(reshards)
        # When a backward pass ends FSDP forgets the order of forward passes, by which it gathers ahead; told that
        # another is to come it would gather what was last, once more. A pipeline has other passes under way.
        stage.set_is_last_backward(reshards)


def reshard(stage: nn.Module) -> None:
    """Free what a forward pass without a backward pass has left gathered."""
    for module in _sharded(stage):
        module.reshard()


def collect(stage: nn.Module, is_reducing: bool) -> None:
    """Take over gradients that were written beside autograd (weights' that came later), and reduce them if so set.

    FSDP2 does this when a backward pass ends and has no public name for it; so does torch's own pipeline.
    """
    if not isinstance(stage, FSDPModule):
        return
    state = fully_shard.state(stage)  # pyright: ignore[reportFunctionMemberAccess]
    for each in state._state_ctx.all_states:
        for group in each._fsdp_param_groups:
            group.post_backward()
    if is_reducing:
        state._root_post_backward_final_callback()


def _sharded(stage: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in stage.modules() if isinstance(module, FSDPModule))


def _runs(modules: Sequence[nn.Module], together: int) -> Iterator[list[nn.Module]]:
    return (list(modules[i : i + together]) for i in range(0, len(modules), together))
