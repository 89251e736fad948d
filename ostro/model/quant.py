"""NF4 with double quantisation (QLoRA, arXiv 2305.14314): matrices that are not trained, in 4.13 bits a value.

Bit for bit bitsandbytes 0.50's values as its CPU path computes them, in pure torch. 64 consecutive values of a row
share their largest magnitude, `absmax`, and each is the nearest of 16 multiples of it, the quantiles of a normal
distribution. The absmaxes are quantised in turn: less their mean over the matrix, in blocks of 256, to an 8-bit code.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from ostro.errors import WeightsError

BLOCK = 64  # values that share an absmax
_ABSMAXES = 256  # absmaxes that share a scale
# Quantiles of the normal distribution, 0 among them (QLoRA's appendix E).
_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Values taken at once: on a CPU the intermediate results shall stay in its caches.
_CPU_CHUNK, _CHUNK = 1 << 20, 1 << 24


def why_not(whole_cols: int, held_cols: int) -> str | None:
    """Return why matrices of `whole_cols` columns, of which a rank holds `held_cols`, cannot be held so, or None."""
    if whole_cols % BLOCK:
        return f"its rows have {whole_cols} values, and NF4 takes them in blocks of {BLOCK}"
    if held_cols % BLOCK:
        return f"its rows of {whole_cols} values are cut into {held_cols} a rank, and NF4 takes blocks of {BLOCK}"
    return None


class NF4(nn.Module):
    """Matrices of 4-bit values: shape [*stack, rows, cols], each [rows, cols] quantised by itself.

    A rank may hold a box of them: `shape` is what is held, `whole_shape` all of it and `offsets` where the box begins.
    Its values are those of the whole, wherever it is cut. Columns, held columns and their offset are multiples of 64.
    """

    codes: Tensor  # [*stack, rows, cols / 2] uint8: two values a byte, the first in the high bits
    absmax_codes: Tensor  # [*stack, rows, cols / 64] uint8
    scales: Tensor  # [*stack, whole blocks / 256] fp32: of the whole matrix, whatever is held of it
    offsets: Tensor  # [*stack] fp32

    def __init__(
        self,
        shape: tuple[int, ...],
        whole_shape: tuple[int, ...] | None = None,
        offsets: tuple[int, ...] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self._whole = tuple(whole_shape or shape)[-2:]
        self.begins = tuple(offsets or [0] * len(shape))
        self._first_row, first_col = self.begins[-2:]
        self._first_block = first_col // BLOCK
        *stack, rows, cols = self.shape
        assert why_not(self._whole[1], cols) is None, (shape, whole_shape)
        assert first_col % BLOCK == 0, offsets
        num_scales = math.ceil(math.prod(self._whole) / BLOCK / _ABSMAXES)
        for name, held, dtype in (
            ("codes", (*stack, rows, cols // 2), torch.uint8),
            ("absmax_codes", (*stack, rows, cols // BLOCK), torch.uint8),
            ("scales", (*stack, num_scales), torch.float32),
            ("offsets", tuple(stack), torch.float32),
        ):
            self.register_buffer(name, torch.zeros(held, dtype=dtype, device=device), persistent=False)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @torch.no_grad()
    def fill(self, stack: tuple[int, ...], matrix: Tensor) -> None:
        """Quantise a whole matrix [whole rows, whole cols] of any float type and keep the held box of it.

        `stack` is its place in what is held. Raises WeightsError for values that are not finite.
        """
        assert matrix.shape == self._whole, (matrix.shape, self._whole)
        assert len(stack) == len(self.shape) - 2, (stack, self.shape)
        codes, absmax = _quantize(matrix.detach().to(self.codes.device))
        absmax_codes, scales, offset = _quantize_absmax(absmax)
        rows = slice(self._first_row, self._first_row + self.shape[-2])
        blocks = slice(self._first_block, self._first_block + self.shape[-1] // BLOCK)
        self.codes[stack] = codes.view(self._whole[0], -1, BLOCK // 2)[rows, blocks].flatten(1)
        self.absmax_codes[stack] = absmax_codes.view(self._whole[0], -1)[rows, blocks]
        self.scales[stack] = scales
        self.offsets[stack] = offset

    def dequantize(self, stack: tuple[int, ...], dtype: torch.dtype, *, passing: bool = False) -> Tensor:
        """Return what is held of one matrix, or, where `stack` is shorter than the leading dims, of a stack of them.

        `passing` ones are for a product at once: on a CPU the next one is written over them. Blocks of a quarter of a
        gigabyte that come and go leave a heap in pieces, which grew by gigabytes a step.
        """
        held = (self.codes[stack], self.absmax_codes[stack], self.scales[stack], self.offsets[stack])
        shape = torch.Size((*held[0].shape[:-1], self.shape[-1]))
        out = _passing(self.codes, shape, dtype) if passing else self.codes.new_empty(shape, dtype=dtype)
        _dequantize(*held, [*self._whole], self._first_row, self._first_block, out)
        return out


def _quantize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [values / 2] uint8 and the absmax of every block in fp32."""
    values = matrix.flatten()
    codes = torch.empty(values.numel() // 2, dtype=torch.uint8, device=values.device)
    absmaxes = []
    chunk = _CPU_CHUNK if values.device.type == "cpu" else _CHUNK
    for values_of, codes_of in zip(values.split(chunk), codes.split(chunk // 2), strict=True):
        scaled = values_of.float().view(-1, BLOCK)
        absmax = scaled.abs().amax(1)
        absmaxes.append(absmax)
        scaled = scaled * (1 / absmax.clamp(min=1e-38))[:, None]
        # The code of a value is the number of midpoints below it; 15 passes are faster than a binary search each.
        code = torch.zeros(scaled.shape, dtype=torch.uint8, device=scaled.device)
        for midpoint in _midpoints():
            code += scaled > midpoint
        torch.add(code.view(-1, 2)[:, 1], code.view(-1, 2)[:, 0], alpha=16, out=codes_of)
    absmax = torch.cat(absmaxes)
    if not absmax.isfinite().all():
        row, col = (~matrix.isfinite()).nonzero()[0].tolist()
        raise WeightsError(
            f"A matrix of {list(matrix.shape)} holds {matrix[row, col].item()} in row {row}, column {col}: it cannot "
            "be quantised, and its checkpoint is damaged."
        )
    return codes, absmax


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the code of every block [blocks], the scale of 256 of them each, and the offset."""
    # Summed as one thread does it, on a CPU: then neither threads nor devices change a bit. torch splits a sum of one
    # result over its threads, one of two results it does not.
    offset = absmax.cpu().expand(2, -1).mean(1)[0].to(absmax.device)
    centred = absmax - offset
    padded = nn.functional.pad(centred, (0, -len(absmax) % _ABSMAXES)).view(-1, _ABSMAXES)
    scales = padded.abs().amax(1)
    # A block of zeros takes code 0 everywhere, as there: 0 · 1/0 is no number.
    unit = (padded * (1 / scales)[:, None]).nan_to_num(nan=-1.0).clamp(-1, 1)
    # To 65,536 steps first, in one rounding (theirs is a fused multiply-add), then to the nearest code.
    step = (((unit + 1) * 0.5).double() * 65535 + 0.5).float().int()
    dynamic = dynamic_values(True)
    midpoints = ((dynamic[1:] + dynamic[:-1]) / 2).to(absmax.device)
    codes = torch.bucketize(step * 2 / 65535 - 1, midpoints).to(torch.uint8)
    return codes.flatten()[: len(absmax)], scales, offset


@torch.library.custom_op("ostro::dequantize_nf4", mutates_args=("out",))
def _dequantize(
    codes: Tensor,
    absmax_codes: Tensor,
    scales: Tensor,
    offsets: Tensor,
    whole: list[int],
    first_row: int,
    first_block: int,
    out: Tensor,
) -> None:
    """Write the values of a stack of matrices; one operator, so that who counts shapes does not see its chunks."""
    absmax = _dequantize_absmax(absmax_codes, scales, offsets, whole, first_row, first_block).view(-1, 1)
    chunk = min(_CPU_CHUNK if codes.device.type == "cpu" else _CHUNK, out.numel())
    pair = _pairs(codes.device)
    index_of = torch.empty(chunk // 2, dtype=torch.int64, device=codes.device)
    values_of = torch.empty(chunk, dtype=torch.float32, device=codes.device)
    parts = zip(codes.flatten().split(chunk // 2), absmax.split(chunk // BLOCK), out.view(-1).split(chunk), strict=True)
    for codes_in, absmax_in, out_in in parts:
        index, values = index_of[: len(codes_in)], values_of[: len(out_in)]
        index.copy_(codes_in)
        # Two values at once, as one of 8 bytes; in rows, since a CPU's threads share out rows.
        rows = (BLOCK // 2, -1)
        torch.gather(pair.expand(*rows), 1, index.view(rows), out=values.view(torch.float64).view(rows))
        values.view(-1, BLOCK).mul_(absmax_in)
        out_in.copy_(values)


@_dequantize.register_fake
def _(
    codes: Tensor,
    absmax_codes: Tensor,
    scales: Tensor,
    offsets: Tensor,
    whole: list[int],
    first_row: int,
    first_block: int,
    out: Tensor,
) -> None:
    return None


_scratch: dict[torch.dtype, Tensor] = {}


def _passing(like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return memory of a CPU for a matrix, the same each time and as large as the largest was."""
    if like.device.type != "cpu" or type(like) is not Tensor:  # a GPU's allocator does this; fake ones have none
        return like.new_empty(shape, dtype=dtype)
    held = _scratch.get(dtype)
    if held is None or held.numel() < shape.numel():
        held = _scratch[dtype] = torch.empty(shape.numel(), dtype=dtype)
    return held[: shape.numel()].view(shape)


def _dequantize_absmax(
    codes: Tensor, scales: Tensor, offsets: Tensor, whole: list[int], first_row: int, first_block: int
) -> Tensor:
    """Return absmax [*stack, rows, blocks] in fp32."""
    rows, blocks = whole[0], whole[1] // BLOCK
    of_whole = scales[..., None].expand(*scales.shape, _ABSMAXES).flatten(-2)[..., : rows * blocks]
    box = of_whole.unflatten(-1, (rows, blocks))[..., first_row:, first_block:]
    values = dynamic_values(True).to(codes.device).index_select(0, codes.flatten().int()).view(codes.shape)
    return values.mul_(box[..., : codes.shape[-2], : codes.shape[-1]]).add_(offsets[..., None, None])


@functools.cache
def _midpoints() -> list[float]:
    values = torch.tensor(_VALUES, device="cpu")
    return ((values[1:] + values[:-1]) / 2).tolist()


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """Return the two values of each byte as [1, 256] of 8 bytes."""
    values = torch.tensor(_VALUES, device="cpu")
    return torch.cartesian_prod(values, values).view(torch.float64).view(1, 256).to(device)


@functools.cache
def dynamic_values(is_signed: bool) -> Tensor:
    """Return the 256 values of the 8-bit code: seven decades, each in twice the steps of the one below (1511.04561)."""
    decades = []
    for exponent in range(7):
        num_steps = 2 ** (exponent + (not is_signed))
        edges = torch.linspace(0.1, 1, num_steps + 1, dtype=torch.float32, device="cpu")
        decades.append(10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2))
    positive, ends = torch.cat(decades), torch.tensor((0.0, 1.0), device="cpu")
    return torch.cat((*([-positive] if is_signed else []), positive, ends)).sort().values
