"""Whether two checkpoints, of any formats, are the same model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ostro.model.spans import spans_of
from ostro.serve.engine import load_model
from ostro.weights import open_reader
from ostro.weights.store import Difference, compare

# Tokens of the fixed input the logits are compared on.
_NUM_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class Verification:
    """Differences by kind of parameter, and the largest difference of the fp32 logits on a fixed input."""

    differences: list[Difference]
    logits: float

    @property
    def is_equal(self) -> bool:
        """Whether all values are the same bits."""
        return all(row.equal_bits for row in self.differences)


def verify(a: str | Path, b: str | Path) -> Verification:
    """Compare the tensors of two checkpoints, then what they compute; other architectures raise WeightsError."""
    reader_a, reader_b = open_reader(a), open_reader(b)
    differences = compare(reader_a, reader_b)
    generator = torch.Generator().manual_seed(0)
    tokens_T = torch.randint(reader_a.model.vocab_size, (_NUM_TOKENS,), generator=generator)
    outs = []
    for reader in (reader_a, reader_b):
        model = load_model(reader, "fp32", torch.device("cpu"))
        with torch.inference_mode():
            outs.append(model.logits(model(tokens_T, spans_of([_NUM_TOKENS]))))
    return Verification(differences, (outs[0] - outs[1]).abs().max().item())
