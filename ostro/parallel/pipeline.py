"""Pipeline parallel: stages of a model on different ranks, and the executor that walks a schedule.

What flows between stages is [tokens, D] hidden states forwards and their gradients backwards, through communicators of
which a rank uses each for one direction to or from one other rank (`Mesh.edge`). Micro-batches are `Batch`es that every
rank of a pipeline has; they may differ in length.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ostro.batch import Batch
from ostro.model import ops
from ostro.model.mixtral import Mixtral
from ostro.parallel import fsdp
from ostro.parallel.mesh import Group, Mesh
from ostro.parallel.schedule import SCHEDULES, Action


def split(model: Mixtral, layers: range, is_first: bool, is_last: bool) -> Mixtral:
    """Take from a model what a stage does not have, and return it."""
    model.is_first, model.is_last = is_first, is_last
    for layer in list(model.blocks):
        if layer not in layers:
            del model.model.layers[str(layer)]
    is_tied = model.config.tie_word_embeddings
    if not is_first and not (is_last and is_tied):  # a tied embedding is the head as well
        del model.model.embed_tokens
    if not is_last:
        del model.model.norm
        if not is_tied:
            del model.lm_head
    return model


class Stage(nn.Module):
    """A run of a model's layers, called with a micro-batch; the last gives the loss, others hidden states."""

    def __init__(self, model: Mixtral, index: int) -> None:
        super().__init__()
        self.model, self.index = model, index

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        if self.model.is_last:
            return self.model.loss(x, batch.spans, batch.labels_T, batch.weights_T)
        return self.model(x, batch.spans)


@dataclasses.dataclass(eq=False)
class Pipeline:
    """This rank's stages, and how they work through micro-batches. `num_stages` counts those of all ranks."""

    stages: Sequence[Stage]
    mesh: Mesh
    num_stages: int
    schedule: str
    reduce_each: bool = False

    def actions(self, num_micro: int) -> list[Action]:
        """Return what this rank does for so many micro-batches, in order."""
        return SCHEDULES[self.schedule](self.mesh.degrees.pp, self.mesh.pp_rank, len(self.stages), num_micro)

    def run(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """Run forward and backward over micro-batches, whose losses are multiplied by `scale`; return their sum.

        Gradients are added to the parameters'; where parameters are sharded they are reduced with the last
        micro-batch, or with each of them. Ranks without the last stage return 0.
        """
        step = _Step(self, batches, scale)
        actions = self.actions(len(batches))
        # With one there is nothing to save, and the copies would outlive their layers.
        with ops.weights_cast_once() if len(batches) > 1 else contextlib.nullcontext():
            for action, following in zip(actions, [*actions[1:], None], strict=True):
                step.expect(action)
                if following is not None:
                    step.expect(following)
                step.do(action)
        step.finish()
        return step.loss

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """Run forward alone over one micro-batch; return the loss, on ranks without the last stage 0."""
        step = _Step(self, [batch], 1.0)
        for chunk in range(len(self.stages)):
            step.expect(Action("forward", chunk, 0))
            step.do(Action("forward", chunk, 0))
        step.finish()
        for stage in self.stages:
            fsdp.reshard(stage)
        return step.loss


class _Step:
    """One step's traffic: what is under way, and what backward passes still need."""

    def __init__(self, pipeline: Pipeline, batches: Sequence[Batch], scale: float) -> None:
        self.pipeline, self.batches, self.scale = pipeline, batches, scale
        self.mesh = pipeline.mesh
        self.loss = torch.zeros((), dtype=torch.float32, device=self.mesh.device)
        self.splits = pipeline.schedule == "zero_bubble"
        self._kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._later: dict[tuple[int, int], ops.Later] = {}
        self._arriving: dict[tuple[str, int, int], tuple[dist.Work | None, Tensor]] = {}
        self._leaving: list[tuple[dist.Work, Tensor]] = []
        self._left = {stage.index: len(batches) for stage in pipeline.stages}
        for stage in pipeline.stages:
            self._set_reducing(stage)

    def _set_reducing(self, stage: Stage, is_last: bool = False) -> None:
        # Stages keep what they have gathered until a step ends: another micro-batch comes at any moment.
        fsdp.set_reducing(stage, is_last or self.pipeline.reduce_each, is_last or self.mesh.degrees.pp == 1)

    def do(self, action: Action) -> None:
        stage = self.pipeline.stages[action.chunk]
        if action.kind == "forward":
            self._forward(stage, action.micro)
        elif action.kind == "backward":
            self._backward(stage, action.micro)
        else:
            self._weights(stage, action.micro)
        # Where nobody receives, what is sent is taken to arrive at once.
        self._leaving = [(work, x) for work, x in self._leaving if ops.has_values() and not work.is_completed()]

    def expect(self, action: Action) -> None:
        """Start to receive what an action needs from another rank."""
        stage, is_forward = self.pipeline.stages[action.chunk], action.kind == "forward"
        source = stage.index - 1 if is_forward else stage.index + 1
        key = (action.kind, stage.index, action.micro)
        if action.kind == "weights" or not 0 <= source < self.pipeline.num_stages or key in self._arriving:
            return
        rank = self._rank(source)
        if rank == self.mesh.rank:  # its own other chunk leaves it there
            return
        spans, model = self.batches[action.micro].spans, stage.model
        x = torch.empty(
            len(spans.sequence_ids_T), model.config.hidden_size, dtype=model.compute_dtype, device=self.mesh.device
        )
        tag = action.micro * self.pipeline.num_stages + source
        self._arriving[key] = (dist.irecv(x, rank, self._group(is_forward, rank), tag), x)

    def finish(self) -> None:
        for work, _ in self._leaving:
            work.wait()
        assert not self._kept
        assert not self._arriving
        assert not self._later

    def _forward(self, stage: Stage, micro: int) -> None:
        batch = self.batches[micro]
        x = batch.tokens_T if stage.model.is_first else self._received("forward", stage.index, micro)
        if torch.is_grad_enabled() and not stage.model.is_first:
            x.requires_grad_()
        with self._split():
            out = stage(x, batch)
        if stage.model.is_last:
            self.loss += out.detach() * self.scale
        else:
            self._send("forward", out.detach(), stage.index + 1, stage.index, micro)
        if torch.is_grad_enabled():
            self._kept[stage.index, micro] = x, out

    def _backward(self, stage: Stage, micro: int) -> None:
        if stage.model.is_last:
            grad = torch.full_like(self.loss, self.scale)
        else:
            grad = self._received("backward", stage.index, micro)
        x, out = self._kept.pop((stage.index, micro))
        self._left[stage.index] -= 1
        if not self._left[stage.index] and not self.splits:
            self._set_reducing(stage, is_last=True)
        with self._split() as later:
            if out.requires_grad:  # a first stage may have nothing that LoRA trains
                torch.autograd.backward(out, grad)
        if later is not None:
            self._later[stage.index, micro] = later
        if not stage.model.is_first:
            assert x.grad is not None
            self._send("backward", x.grad, stage.index - 1, stage.index, micro)

    def _weights(self, stage: Stage, micro: int) -> None:
        ops.run_later(self._later.pop((stage.index, micro)))
        is_last = not any(index == stage.index for index, _ in self._later) and not self._left[stage.index]
        self._set_reducing(stage, is_last)
        fsdp.collect(stage, is_last or self.pipeline.reduce_each)

    @contextlib.contextmanager
    def _split(self) -> Iterator[ops.Later | None]:
        if not self.splits:
            yield None
            return
        with ops.weights_later() as later:
            yield later

    def _send(self, kind: str, x: Tensor, to_stage: int, stage: int, micro: int) -> None:
        rank = self._rank(to_stage)
        if rank == self.mesh.rank:
            self._arriving[kind, to_stage, micro] = (None, x)
            return
        tag = micro * self.pipeline.num_stages + stage
        x = x.contiguous()  # and kept until it has left
        work = dist.isend(x, rank, self._group(kind == "forward", self.mesh.rank), tag)
        assert work is not None
        self._leaving.append((work, x))

    def _received(self, kind: str, stage: int, micro: int) -> Tensor:
        work, x = self._arriving.pop((kind, stage, micro))
        if work is not None:
            work.wait()
        return x

    def _rank(self, stage: int) -> int:
        return self.mesh.peer(stage % self.mesh.degrees.pp)

    def _group(self, is_forward: bool, source: int) -> Group:
        return self.mesh.edge(is_forward, source // self.mesh.num_stage_ranks)
