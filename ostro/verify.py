"""Whether two checkpoints, of any formats, are the same model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from ostro.errors import WeightsError
from ostro.model import layout, ops
from ostro.model.spans import spans_of
from ostro.serve.load import empty_model
from ostro.weights import FORMATS, Reader, detect, open_reader
from ostro.weights.store import NO_HINTS, Difference, Hints, cast, compare, pieces, require_finite

# Tokens of the fixed input the logits are compared on.
_NUM_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Verification:
    """Differences by kind of parameter, and the largest difference of the fp32 logits on a fixed input."""

    differences: list[Difference]
    logits: float | None
    reason: str = ""  # why there are no logits

    @property
    def is_equal(self) -> bool:
        """Whether all values are the same, be it in another dtype."""
        return all(row.is_same for row in self.differences)


def verify(a: str | Path, b: str | Path, hints: Hints = NO_HINTS) -> Verification:
    """Compare the tensors of two checkpoints, then what they compute; other architectures raise WeightsError.

    `hints` are for whichever of the two can use them. One layer is in memory at a time. Equal values compute the same:
    their logits are not computed, nor are those of NaN.
    """
    reader_a, reader_b = open_reader(a, _usable(a, hints)), open_reader(b, _usable(b, hints))
    found = Verification(compare(reader_a, reader_b), 0.0)
    if found.is_equal:
        return found
    generator = torch.Generator().manual_seed(0)
    tokens_T = torch.randint(reader_a.model.vocab_size, (_NUM_TOKENS,), generator=generator)
    try:
        gap = (logits(reader_a, tokens_T) - logits(reader_b, tokens_T)).abs().max().item()
    except WeightsError as error:
        return dataclasses.replace(found, logits=None, reason=str(error))
    return dataclasses.replace(found, logits=gap)


def _usable(path: str | Path, hints: Hints) -> Hints:
    """Return those of the hints that the format of a checkpoint can use."""
    format = detect(path)
    fields = {name: getattr(hints, name) for name in FORMATS[format].hints}
    is_its = hints.format is not None and hints.format.startswith(format)
    return Hints(format=hints.format if is_its else None, **fields)


@torch.inference_mode()
def logits(reader: Reader, tokens_T: Tensor) -> Tensor:
    """Return the fp32 logits [T, V] of one document, computed on the CPU with one layer in memory at a time."""
    model = reader.model
    window = empty_model(dataclasses.replace(model, num_hidden_layers=1), torch.float32, torch.device("cpu"))
    targets = dict(window.named_parameters())

    def load(parameter: layout.Parameter, source: str) -> None:
        for stack in pieces(parameter):
            value = reader.read(source, stack)
            require_finite(value, source)
            targets[parameter.name][stack].copy_(cast(value, torch.float32, source))

    for parameter in layout.parameters(window.config):
        if parameter.layer is None:
            load(parameter, parameter.name)
    spans = spans_of([len(tokens_T)])
    rope = ops.rope_tables(spans.positions_T, model.head_dim, model.rope_theta, torch.float32)
    x_TD = window.model.embed_tokens(tokens_T)
    for layer in range(model.num_hidden_layers):
        for parameter in layout.parameters(window.config):
            if parameter.layer is not None:
                load(parameter, parameter.kind.name.format(layer=layer))
        x_TD, _, _ = window.blocks[0](x_TD, rope, spans)
    return window.logits(window.model.norm(x_TD))
