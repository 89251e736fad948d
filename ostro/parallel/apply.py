"""All that makes one model span many ranks, in the only order that works, and what a training step asks of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ostro.batch import Batch
from ostro.config import Config
from ostro.degrees import stage_layers
from ostro.model import layout, ops
from ostro.model.balance import update_bias
from ostro.model.lora import add as add_lora
from ostro.model.lora import replace_by_nf4
from ostro.model.mixtral import Mixtral
from ostro.model.quant import NF4
from ostro.model.settings import LoraConfig, ModelConfig
from ostro.optim import Place, block_box, is_of_blocks, local, parameter_of
from ostro.parallel import context, expert, fsdp, recompute, tensor
from ostro.parallel.mesh import Mesh, open_mesh
from ostro.parallel.mesh import alone as one_process
from ostro.parallel.pipeline import Pipeline, Stage, split
from ostro.weights.fresh import FreshAdapter
from ostro.weights.parts import Held, load_quantized, load_weights
from ostro.weights.reshard import Box
from ostro.weights.store import Reader


@dataclasses.dataclass(eq=False)
class World:
    """A model over the ranks of a mesh: this rank's stages, and what is summed over all ranks."""

    mesh: Mesh
    model: ModelConfig
    pipeline: Pipeline
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        # Once: while they are gathered, modules name others in their place.
        stages = self.pipeline.stages
        self._parameters = {name: p for stage in stages for name, p in stage.model.named_parameters()}
        self._adapters = layout.adapter_table(self.model, self.lora)
        self._table = {**layout.table(self.model), **self._adapters}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return this rank's parameters by canonical name, LoRA's among them; of the sharded ones it holds a part."""
        return self._parameters

    def saved_parameters(self) -> dict[str, nn.Parameter]:
        """Return what a training checkpoint holds: all parameters, or LoRA's alone."""
        return {name: p for name, p in self.parameters().items() if self.lora is None or name in self._adapters}

    def held_parameters(self) -> dict[str, Held]:
        """Return this rank's parts of the model's own parameters, with their places; of some it may have nothing."""
        own = self.parameters().items()
        return self._held({name: (name, p.detach()) for name, p in own if name not in self._adapters})

    def held_adapters(self) -> dict[str, Held]:
        """Return this rank's parts of LoRA's parameters, with their places."""
        own = self.parameters().items()
        return self._held({name: (name, p.detach()) for name, p in own if name in self._adapters})

    def quantized(self) -> dict[str, NF4]:
        """Return the parameters that are kept in 4 bits, which are no parameters to torch, by canonical name."""
        modules = (found for stage in self.pipeline.stages for found in stage.model.named_modules())
        return {name: module for name, module in modules if isinstance(module, NF4)}

    def places(self) -> dict[str, Place]:
        """Return where this rank's parts of the parameters begin."""
        held = {**self.held_parameters(), **self.held_adapters()}
        return {name: Place(piece.box.offsets, piece.shape) for name, piece in held.items()}

    def held(self, tensors: Mapping[str, Tensor]) -> dict[str, Held]:
        """Return this rank's parts of a training checkpoint's tensors (`optim.state_tensors`), with their places."""
        return self._held({key: (parameter_of(key), value) for key, value in tensors.items()})

    def _held(self, tensors: Mapping[str, tuple[str, Tensor]]) -> dict[str, Held]:
        found = {}
        for key, (name, value) in tensors.items():
            parameter, values = self._table[name], local(value)
            if not values.shape:  # a count of steps
                found[key] = Held(values, Box((), ()), ())
                continue
            box = self.mesh.degrees.box(self.mesh.rank, parameter.kind.dims, parameter.shape, None)
            if box is None:
                assert not values.numel(), key
            else:
                part = block_box(*box, parameter.shape) if is_of_blocks(key) else (*box, parameter.shape)
                assert tuple(values.shape) == part[1], (key, values.shape, part)
                found[key] = Held(values, Box(*part[:2]), part[2])
        return found

    def load(self, reader: Reader) -> None:
        """Fill the model's own parameters from a checkpoint."""
        load_weights(reader, self.held_parameters())
        load_quantized(reader, self.quantized())

    def load_fresh_adapter(self, base: Reader, seed: int) -> None:
        """Fill LoRA's parameters with what a training starts from."""
        if self.lora is not None:
            load_weights(FreshAdapter(base, self.lora, seed), self.held_adapters(), self._adapters)

    def any_rank(self, number: int) -> int:
        """Return the largest of all ranks' numbers."""
        if self.mesh.degrees.num_ranks == 1:
            return number
        most = torch.tensor(number, device=self.mesh.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    def forward_backward(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """Add gradients of `scale` times the loss; return this rank's part of it, which `sum_over_ranks` completes."""
        loss = self.pipeline.run([context.share(batch, self.mesh) for batch in batches], scale)
        self._sum_gradients()
        return self._counted(loss)

    def _counted(self, loss: Tensor) -> Tensor:
        # Where the words are cut every rank of tp knows the whole loss of its tokens.
        is_counted = self.mesh.tp_rank == 0 or bool(self.mesh.degrees.vocab_emb_dp)
        return loss if is_counted else torch.zeros_like(loss)

    def score(self, batch: Batch) -> Tensor:
        """Return this rank's part of a micro-batch's loss, without gradients; every rank calls it equally often."""
        return self._counted(self.pipeline.score(context.share(batch, self.mesh)))

    @property
    def multiple(self) -> int:
        """The number of tokens that rows are padded to a multiple of: each rank of a sequence gets equally many."""
        cp, tp = self.mesh.degrees.cp, self.mesh.degrees.tp
        return (2 * cp if cp > 1 else 1) * tp

    @property
    def counts_data(self) -> bool:
        """Whether this rank is the one that counts its data rank's rows, of which several ranks have a part."""
        return self.mesh.pp_rank == self.mesh.tp_rank == self.mesh.cp_rank == 0

    @property
    def is_training(self) -> bool:
        """Whether the stages are set to train."""
        return self.pipeline.stages[0].model.training

    def train(self, is_training: bool) -> None:
        """Set every stage to train, or to compute as a finished model does."""
        for stage in self.pipeline.stages:
            stage.train(is_training)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the sum of every rank's values."""
        if self.mesh.degrees.num_ranks > 1:
            dist.all_reduce(values)
        return values

    def squared_grad_norm(self) -> Tensor:
        """Return this rank's part of the gradient's squared norm, fp64; what others hold as well counts once."""
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        # A CPU adds in fp32 one after another: of ten million values 4e-4 goes astray. GPUs add in trees.
        accumulated = torch.float64 if self.mesh.device.type == "cpu" else torch.float32
        norms = [
            torch.linalg.vector_norm(local(p.grad), dtype=accumulated)
            for name, p in self.parameters().items()
            if p.grad is not None and self._is_counted(name)
        ]
        return total + torch.stack(norms).double().square().sum() if norms else total

    def update_biases(self, stats_LS: Tensor, rate: float) -> None:
        """Move the routers' selection biases, if any, by the loads of a whole step (`balance.update_bias`)."""
        for stage in self.pipeline.stages if self.lora is None else ():
            for layer, block in stage.model.blocks.items():
                bias_E = block.block_sparse_moe.gate.selection_bias
                if bias_E is not None:
                    update_bias(bias_E, stats_LS[layer, : len(bias_E)], rate)

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients."""
        gradients = [local(p.grad) for p in self.parameters().values() if p.grad is not None]
        torch._foreach_mul_(gradients, factor)

    def _is_counted(self, name: str) -> bool:
        """Whether of all ranks that hold this part of a parameter this is the first."""
        degrees, place, kind = self.mesh.degrees, self.mesh.place, self._table[name].kind
        if kind is layout.EMBEDDING and self._has_second_embedding():
            return False
        if kind.is_low_rank:
            copies = self.mesh.copies.get(kind.dims)
            return copies is None or copies.is_first
        if kind.is_small:
            return place == 0
        return not place // (degrees.fsdp * degrees.cp * degrees.tp)  # the others are replicas

    def _has_second_embedding(self) -> bool:
        """Whether this rank's embedding is the head of a pipeline whose first stage has it as well."""
        is_tied = self.model.tie_word_embeddings and self.mesh.degrees.pp > 1
        return is_tied and any(stage.model.is_last for stage in self.pipeline.stages)

    def _sum_gradients(self) -> None:
        """Sum what FSDP does not: small parameters' over the stage, LoRA's over the ranks with the same part, a tied
        embedding's over both ends."""
        if self.mesh.stage is not None:
            groups: dict[dist.ProcessGroup, list[Tensor]] = {}
            for name, p in self.parameters().items():
                kind = self._table[name].kind
                group = self.mesh.copies[kind.dims].group if kind.is_low_rank else self.mesh.stage
                if p.grad is not None and group is not None and (kind.is_small or kind.is_low_rank):
                    groups.setdefault(group, []).append(p.grad)
            for group, gradients in groups.items():
                _sum_together(gradients, group)
        if self.mesh.ends is not None and self.model.tie_word_embeddings:
            held = self.parameters().get(layout.EMBEDDING.name)
            if held is not None and held.grad is not None:
                dist.all_reduce(local(held.grad), group=self.mesh.ends)


def mesh_of(config: Config, device: torch.device) -> Mesh:
    """Build the meshes and groups that a config needs, which every rank does at the same time."""
    lora = None if config.lora is None else config.lora.settings()
    return open_mesh(
        config.parallel.degrees(),
        device,
        is_tied=config.model.tie_word_embeddings,
        copied=(parameter.kind.dims for parameter in layout.adapter_table(config.model, lora).values()),
    )


def parallelize(config: Config, mesh: Mesh, dtype: torch.dtype) -> World:
    """Build this rank's part of a model, uninitialised, and apply every dimension of parallelism to it."""
    # Of tensors without values only shapes are made anyway.
    blank = torch.device("meta") if ops.has_values() else mesh.device
    parallel, degrees = config.parallel, mesh.degrees
    degrees.check(config.model, for_run=True)
    chunks = parallel.virtual_stages
    lora = None if config.lora is None else config.lora.settings()
    table = {**layout.table(config.model), **layout.adapter_table(config.model, lora)}
    layers = stage_layers(config.model.num_hidden_layers, degrees.pp * chunks, parallel.stage_layers)
    stages = []
    for chunk in range(chunks):
        index = chunk * degrees.pp + mesh.pp_rank
        with blank:
            model = Mixtral(config.model, config.moe.settings(), dtype, config.train.exact)
            if lora is not None:
                add_lora(model, config.model, lora)
        model = split(model, layers[index], index == 0, index == len(layers) - 1)
        _cut_parameters(model, mesh, table, lora, _kept_dtype(config, dtype))
        if config.train.recompute == "selective":
            recompute.experts(model)
        expert.apply(model, mesh)
        tensor.apply(model, mesh)
        context.apply(model, mesh)
        if config.train.recompute == "full":
            recompute.blocks(model)
        if config.train.compile:
            _compile(model)
        stage = Stage(model, index)
        reshard = degrees.pp == 1
        fsdp.apply(stage, model, table, mesh, parallel.gradient_aggregation_group, reshard)
        stages.append(stage if blank == mesh.device else stage.to_empty(device=mesh.device))
    pipeline = Pipeline(stages, mesh, len(layers), parallel.schedule, parallel.gradient_accumulation_shard)
    return World(mesh, config.model, pipeline, lora)


def alone(model: Mixtral) -> World:
    """Return a whole model in this one process as a world."""
    mesh = one_process(model.head_weight.device)
    return World(mesh, model.config, Pipeline([Stage(model, 0)], mesh, 1, "1f1b"))


def _compile(model: Mixtral) -> None:
    """Compile what lies between the products: norms, rotary positions, casts. Lengths of documents stay outside."""
    for block in model.blocks.values():
        attend: Any = torch.compiler.disable(block.self_attn.attend)
        block.self_attn.attend = attend
        block.self_attn.compile(dynamic=True)


def _kept_dtype(config: Config, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the large parameters: the masters', or of those that LoRA leaves the one computed in."""
    if config.lora is not None:
        return dtype
    return torch.bfloat16 if config.train.master_dtype == "bf16" else torch.float32


def _cut_parameters(
    model: Mixtral, mesh: Mesh, table: Mapping[str, layout.Parameter], lora: LoraConfig | None, dtype: torch.dtype
) -> None:
    """Replace each parameter (on meta) by what tp, ep and etp leave of it, the large ones in `dtype` or 4 bits."""
    for module_name, module in list(model.named_modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            parameter = table[f"{module_name}.{name}"]
            kind = parameter.kind
            offsets, shape = mesh.degrees.cut(mesh.rank, kind.dims, parameter.shape)
            if lora is not None and lora.quantize and kind in layout.QUANTIZED:
                replace_by_nf4(module, name, NF4(shape, parameter.shape, offsets, p.device))
                continue
            kept = p.new_empty(shape, dtype=torch.float32 if kind.is_small or kind.is_low_rank else dtype)
            module.register_parameter(name, nn.Parameter(kept, requires_grad=p.requires_grad))


def _sum_together(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors over a group in one message."""
    if not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat, group=group)
    for t, part in zip(tensors, _split_like(flat, tensors), strict=True):
        t.copy_(part)


def _split_like(flat: Tensor, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    parts = flat.split([t.numel() for t in tensors])
    return (part.view_as(t) for part, t in zip(parts, tensors, strict=True))
