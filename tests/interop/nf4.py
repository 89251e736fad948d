"""bitsandbytes beside `ostro.model.quant`: codes, scales and values must be equal, bit for bit.

Not collected by pytest, as it needs bitsandbytes; to be run by a Python that has it and torch:

    python tests/interop/nf4.py [--write]

Compares matrices of many sizes and kinds, then one of Mixtral-8x7B's own, and prints how long both take. `--write`
records the small ones into tests/model/nf4.safetensors, which tests/model/test_quant.py holds Ostro against.
Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from ostro.model.quant import NF4  # noqa: E402

GOLDEN = ROOT / "tests" / "model" / "nf4.safetensors"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REAL = (14336, 4096)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"record {GOLDEN.relative_to(ROOT)}")
    arguments = parser.parse_args()
    theirs: Any = importlib.import_module("bitsandbytes.functional")
    torch.manual_seed(0)
    # Theirs adds up a mean in an order that depends on the number of threads; Ostro's is that of one.
    torch.set_num_threads(1)
    num_unequal = sum(_differs(name, matrix, theirs) for name, matrix in (_golden() | _others()).items())
    if arguments.write:
        tensors, hashes = {}, {}
        for name, matrix in _golden().items():
            held, hashes_of = _theirs(matrix, theirs)
            tensors |= {f"{name}.{key}": tensor for key, tensor in {"matrix": matrix, **held}.items()}
            hashes |= {f"{name}.{dtype}": digest for dtype, digest in hashes_of.items()}
        save_file(tensors, GOLDEN, metadata=hashes)
        print(f"wrote {GOLDEN.relative_to(ROOT)}, {GOLDEN.stat().st_size} bytes")
    torch.set_num_threads(2)
    _times(theirs)
    return int(num_unequal > 0)


def _golden() -> dict[str, torch.Tensor]:
    """Return small matrices whose absmaxes add up without rounding: their mean is the same on every machine."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.02

    blocks = normal(37, 448).bfloat16()  # 259 blocks: the last second-level block is a part of one
    blocks[3, 64:128] = 0
    exact = normal(5, 192).view(-1, 64)
    exact.scatter_(1, exact.abs().argmax(1, keepdim=True), 0.0625)
    exact[4] = -exact[4]
    return {
        "bf16": blocks,
        "fp32": exact.view(5, 192).contiguous(),
        "fp16": normal(6, 128).half(),
        "constant": torch.full((4, 128), 0.3, dtype=torch.bfloat16),
        "zeros": torch.zeros(2, 64),
    }


def _others() -> dict[str, torch.Tensor]:
    made = {}
    for dtype in DTYPES:
        for shape in ((3, 64), (300, 704), (1024, 4096), (999, 14336)):
            made[f"normal {list(shape)} {dtype}"] = (torch.randn(shape) * 0.02).to(dtype)
        for name, matrix in (
            ("wide", (torch.randn(64, 512).exp() ** 4).clamp(max=6e4)),
            ("tiny", torch.randn(64, 512) * 1e-36),
            ("denormal", torch.randn(64, 512) * 1e-42),
            ("uniform", torch.rand(70, 1024) - 0.5),
        ):
            made[f"{name} {dtype}"] = matrix.to(dtype)
    made["normal of real size"] = (torch.randn(REAL) * 0.02).bfloat16()
    return made


def _theirs(matrix: torch.Tensor, theirs: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return what bitsandbytes keeps of a matrix, and a hash of its values in each type."""
    codes, state = theirs.quantize_4bit(matrix, quant_type="nf4", blocksize=64, compress_statistics=True)
    hashes = {}
    for dtype in DTYPES:
        state.dtype = dtype
        hashes[str(dtype)] = digest(theirs.dequantize_4bit(codes, state))
    held = {"codes": codes, "absmax_codes": state.absmax, "scales": state.state2.absmax, "offsets": state.offset}
    return {name: tensor.flatten() for name, tensor in held.items()}, hashes


def digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _differs(name: str, matrix: torch.Tensor, theirs: Any) -> bool:
    held, hashes = _theirs(matrix, theirs)
    ours = NF4(tuple(matrix.shape))
    ours.fill((), matrix)
    unequal = [key for key, tensor in held.items() if not torch.equal(getattr(ours, key).flatten(), tensor)]
    unequal += [str(dtype) for dtype in DTYPES if digest(ours.dequantize((), dtype)) != hashes[str(dtype)]]
    print(f"{name}: {'equal' if not unequal else 'UNEQUAL ' + ', '.join(unequal)}", flush=True)
    return bool(unequal)


def _times(theirs: Any) -> None:
    matrix = (torch.randn(REAL) * 0.02).bfloat16()
    codes, state = theirs.quantize_4bit(matrix, quant_type="nf4", blocksize=64, compress_statistics=True)
    ours = NF4(REAL)
    ours.fill((), matrix)
    for name, mine, other in (
        (
            "quantise",
            lambda: ours.fill((), matrix),
            lambda: theirs.quantize_4bit(matrix, quant_type="nf4", blocksize=64, compress_statistics=True),
        ),
        ("dequantise", lambda: ours.dequantize((), torch.bfloat16), lambda: theirs.dequantize_4bit(codes, state)),
    ):
        seconds = [min(pair) for pair in zip(*((_seconds(mine), _seconds(other)) for _ in range(7)), strict=True)]
        rates = [matrix.nbytes / of / 1e9 for of in seconds]
        print(f"{name} {list(REAL)} bf16: Ostro {rates[0]:.2f} GB/s, bitsandbytes {rates[1]:.2f} GB/s")


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
