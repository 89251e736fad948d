"""How MindFormers cuts a Mixtral over ranks: degrees in, MindSpore's tensor layouts out.

The rules are those of MindFormers r1.7.0's Llama and MoE layers under semi-automatic parallelism: attention and the
experts' inner dim are cut by `tp` (its model_parallel), experts by `ep`, layers by `pp`; `dp` repeats, and holds `ep`.
"""

from __future__ import annotations

import dataclasses
import math

from ostro import degrees as degree_rules
from ostro.errors import LayoutError
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights.store import Shape
from ostro.weights.stored import FileTensor
from ostro.weights.strategy import Strategy, TensorLayout

_OPT_THRESHOLD_BYTES = 64 << 10  # parallel_optimizer_threshold of the shipped YAMLs: smaller ones stay whole


@dataclasses.dataclass(frozen=True)
class MindSporeDegrees:
    """MindFormers' data_parallel, model_parallel, expert_parallel and pipeline_stage.

    `opt` 1 cuts what is repeated once more (enable_parallel_optimizer, which all shipped YAMLs set); 0 does not.
    `vocab` 1 cuts embedding and head by tp (vocab_emb_dp False); 0 does not.
    """

    dp: int = 1
    tp: int = 1
    ep: int = 1
    pp: int = 1
    opt: int = 0
    vocab: int = 0

    @property
    def num_ranks(self) -> int:
        return self.dp * self.tp * self.pp

    @property
    def ranks_per_stage(self) -> int:
        return self.dp * self.tp

    def check(self, model: ModelConfig) -> None:
        """Raise LayoutError for degrees that MindFormers could not cut the model by."""
        if self.dp % self.ep:
            raise LayoutError(
                f"ep={self.ep} does not divide dp={self.dp}: MindFormers' experts lie within dp; change one."
            )
        for name in ("opt", "vocab"):
            if getattr(self, name) > 1:
                raise LayoutError(f"{name}={getattr(self, name)} must be 0 (not cut) or 1 (cut).")
        values = dataclasses.asdict(self)
        degree_rules.require_divides(
            values,
            {
                "ep": ("num_local_experts", model.num_local_experts),
                "pp": ("num_hidden_layers", model.num_hidden_layers),
            },
        )
        for setting in ("num_key_value_heads", "intermediate_size"):
            degree_rules.require_divides(values, {"tp": (setting, getattr(model, setting))})


def strategies(tensors: dict[str, FileTensor], model: ModelConfig, degrees: MindSporeDegrees) -> list[Strategy]:
    """Return one strategy a stage, with the layout of each tensor of that stage."""
    table = layout.table(model)
    found: list[dict[str, TensorLayout]] = [{} for _ in range(degrees.pp)]
    for tensor in tensors.values():
        parameter = table[tensor.pieces[0].name]
        is_transposed = tensor.pieces[0].source.order.is_transposed
        found[_stage(parameter, model, degrees)][tensor.name] = _layout(tensor, parameter.kind, is_transposed, degrees)
    return [Strategy(stage, layouts) for stage, layouts in enumerate(found)]


def _stage(parameter: layout.Parameter, model: ModelConfig, degrees: MindSporeDegrees) -> int:
    if parameter.layer is not None:
        return degree_rules.stage_of(parameter.layer, model.num_hidden_layers, degrees.pp)
    return 0 if parameter.kind is layout.EMBEDDING else degrees.pp - 1


def _layout(tensor: FileTensor, kind: layout.Kind, is_transposed: bool, degrees: MindSporeDegrees) -> TensorLayout:
    # Axes are counted from the right: tp is 0, then ep and what dp holds beside it, or dp alone.
    if kind in (layout.W13, layout.W2):
        matrix: Shape = (degrees.dp // degrees.ep, degrees.ep, degrees.tp)
        cut_rows = (kind is layout.W13) != is_transposed
        map: tuple[Shape, ...] = ((1,), (0,), ()) if cut_rows else ((1,), (), (0,))
    else:
        matrix = (degrees.dp, degrees.tp)
        cut = {layout.Q: 0, layout.K: 0, layout.V: 0, layout.O: 1}.get(kind)
        if kind in (layout.EMBEDDING, layout.HEAD) and degrees.vocab and tensor.info.shape[0] % degrees.tp == 0:
            cut = 0
        map = tuple((0,) if dim == cut else () for dim in range(len(tensor.info.shape)))
    step, size = _opt(tensor, matrix, map) if degrees.opt else (0, 0)
    return TensorLayout(matrix, map, step, size)


def _opt(tensor: FileTensor, matrix: Shape, map: tuple[Shape, ...]) -> tuple[int, int]:
    """Return step and size of the optimizer's shard: over all repeats, where they divide what a rank holds."""
    used = {axis for dim in map for axis in dim}
    free = [axis for axis in range(len(matrix)) if axis not in used and matrix[-1 - axis] > 1]
    repeats = math.prod(matrix[-1 - axis] for axis in free)
    local = TensorLayout(matrix, map, 0, 0).local_shape(tensor.info.shape)
    num_bytes = math.prod(local) * tensor.info.dtype.itemsize
    if repeats == 1 or local[0] % repeats or num_bytes < _OPT_THRESHOLD_BYTES:
        return 0, 0
    return math.prod(matrix[len(matrix) - free[0] :]), repeats
