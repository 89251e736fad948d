"""Sparse upcycling (arXiv 2212.05055): a dense Mistral, read as the Mixtral that training starts from.

Every expert is the dense feed-forward layer, and the routers are drawn; all else is as it was. A token's experts are
equal and their weights sum to 1, so that, before it is trained, the model computes what the dense one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ostro.errors import WeightsError
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights import hf
from ostro.weights.hf_config import model_of, read_json
from ostro.weights.located import located
from ostro.weights.mapped import TensorFile
from ostro.weights.store import RandomReader, TensorInfo, Where, match_depth
from ostro.weights.stored import Source, StoredReader

# MistralConfig's own values, where a config.json leaves out what it has in common with them.
_ABSENT = {"max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096}
_DENSE = {0: "gate_proj", 1: "up_proj"}  # which half of w13 is which of a dense layer's matrices
_ADVICE = "the download is incomplete, or config.json belongs to another model"
_DRAWN = (layout.GATE, layout.SELECTION_BIAS)


def open_upcycled(path: str | Path, model: ModelConfig | None = None, seed: int = 0) -> StoredReader:
    """Open a Hugging Face folder of a dense Mistral as a Mixtral with the experts and the router of `model`.

    Without `model` these are Mixtral's: 8, of which each token takes 2. The routers are those that `RandomReader` draws
    with `seed`, in the type of the embedding. Raises WeightsError for anything but a whole dense Mistral.
    """
    path = located(path)
    found = _dense_fields(path)
    of_experts = model or ModelConfig()
    kept = {name: getattr(of_experts, name) for name in ("num_local_experts", "num_experts_per_tok", "router")}
    mixtral = model_of(path / "config.json", _ABSENT | found | kept | {"model_type": "mixtral"})
    files = {name: file for name, file in hf.open_files(path).items() if not name.endswith(".inv_freq")}
    match_depth(str(path), files, mixtral)  # before the table, which would be endless for an absurd number of layers
    routers = _Drawn(path, RandomReader(mixtral, seed), files)
    files |= dict.fromkeys(routers.infos, routers)
    notes = (f"upcycled: each of {mixtral.num_local_experts} experts is the dense layer, routers from seed {seed}",)
    reader = StoredReader("hf", path, mixtral, files, _source, notes=notes, advice=_ADVICE)
    reader.check()
    return reader


def _dense_fields(path: Path) -> dict[str, Any]:
    """Return the config.json of a dense Mistral."""
    if not (path / "config.json").is_file():
        raise WeightsError(
            f"{path} has no config.json: what is upcycled is a Hugging Face folder of a dense Mistral (model_type "
            "'mistral')."
        )
    found = read_json(path / "config.json")
    kind = found.get("model_type")
    if kind == "mixtral":
        raise WeightsError(f"{path} is a Mixtral and has its experts: leave out upcycle, which is for a dense Mistral.")
    if kind != "mistral":
        raise WeightsError(f"{path} is of model_type {kind!r}, and what can be upcycled is a dense 'mistral'.")
    return found


def _source(parameter: layout.Parameter, stack: tuple[int, ...]) -> Source:
    """Return where a piece stands: whichever expert's it is, in the one dense layer."""
    shape = parameter.shape[len(stack) :]
    dense = f"model.layers.{parameter.layer}.mlp."
    if parameter.kind is layout.W13:
        return Source(f"{dense}{_DENSE[stack[1]]}.weight", shape)
    if parameter.kind is layout.W2:
        return Source(f"{dense}down_proj.weight", shape)
    return Source(parameter.name, shape)


class _Drawn:
    """The routers, which no file holds, as a file of them."""

    def __init__(self, path: Path, source: RandomReader, files: Mapping[str, TensorFile]) -> None:
        self.path = path
        self._source = source
        embedding = files.get(layout.EMBEDDING.name)
        dtype = embedding.infos[layout.EMBEDDING.name].dtype if embedding is not None else torch.float32
        self.infos = {
            parameter.name: TensorInfo(parameter.shape, dtype)
            for parameter in layout.parameters(source.model)
            if parameter.kind in _DRAWN
        }

    def tensor(self, name: str, where: Where = ()) -> Tensor:
        """Draw `tensor[where]`."""
        return self._source.read(name, where).to(self.infos[name].dtype)
