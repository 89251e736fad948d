"""The one file that names devices and their backends; everything else asks here."""

from __future__ import annotations

import functools
import os
import time

import torch

from ostro.errors import LayoutError
from ostro.machine import memory_limit_bytes, usable_cores

# Dense bf16 peak, TFLOP/s, by a word of the device's name; from the makers' data sheets (no sparsity).
_PEAK_TFLOPS = {
    "H200": 989.4,
    "H100": 989.4,
    "A100": 312.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "4090": 165.2,
    "910B": 376.0,
}


def accelerator() -> torch.device:
    """Return the accelerator torch sees (CUDA, Ascend NPU …), or the CPU: also beside MPS, which has no float64."""
    if torch.accelerator.is_available():
        current = torch.accelerator.current_accelerator()
        if current is not None and current.type != "mps":
            return current
    return torch.device("cpu")


def is_cuda(device: torch.device | str) -> bool:
    """Whether CUDA's kernels (varlen attention, grouped products) run on `device`."""
    return torch.device(device).type == "cuda"


def backend(device: torch.device) -> str:
    """Return what carries collectives: the device's own library, and gloo beside it for tensors in host memory."""
    libraries = {"cuda": "nccl", "npu": "hccl"}
    return "gloo" if device.type not in libraries else f"cpu:gloo,{device.type}:{libraries[device.type]}"


def has_fused_optimizer(device: torch.device) -> bool:
    """Whether torch updates parameters on `device` in one pass over them."""
    return device.type == "cpu" or is_cuda(device)


def select(device: torch.device, index: int) -> None:
    """Make the accelerator number `index` of this host the current one; a CPU is one device.

    Raises LayoutError where the host has fewer.
    """
    if device.type == "cpu":
        return
    there = torch.accelerator.device_count()
    if index >= there:
        raise LayoutError(
            f"this host has {there} accelerators and its process number {index} wants one: lower --nproc-per-node."
        )
    torch.accelerator.set_device_index(index)


def name(device: torch.device) -> str:
    """Return the device's own name."""
    if is_cuda(device):
        return torch.cuda.get_device_name(device)
    return f"{usable_cores()} CPU cores" if device.type == "cpu" else device.type


def set_deterministic(device: torch.device) -> None:
    """Make training on `device` give the same bits every time; a CPU does so by itself."""
    if device.type != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Poisons what is fresh, a pass over memory each time; nothing here reads what it has not written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def memory_bytes(device: torch.device) -> int:
    """Return the memory of the device, or of this machine for the CPU and where a device does not tell."""
    if is_cuda(device):
        return torch.cuda.get_device_properties(device).total_memory
    return memory_limit_bytes()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has held: the device's own, or the resident set on a CPU."""
    if is_cuda(device):
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@functools.cache
def bf16_is_fast() -> bool:
    """Whether this CPU has units for bf16 products (AMX, AVX512-bf16, Arm's bf16).

    Read from the processor's flags rather than timed: the answer decides how products round, so it must not depend
    on how busy the machine is.
    """
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()))


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the rate of a large dense product in FLOP/s: the data sheet's where known, else measured once (0.3 s)."""
    label = name(device)
    for word, tflops in _PEAK_TFLOPS.items():
        if device.type != "cpu" and word in label:
            return tflops * 1e12 * (0.5 if dtype == torch.float32 else 1.0)
    if device.type == "cpu" and (dtype == torch.float16 or not bf16_is_fast()):
        dtype = torch.float32  # products of 16-bit operands are computed in fp32 there: ops.linear
    return _rate(device, dtype, 1536 if device.type == "cpu" else 8192, 5)
