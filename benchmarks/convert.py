"""Convert a Mixtral of real layer shapes between formats, beside `cp` of the same bytes: time and memory.

    python benchmarks/convert.py            # 3 layers, 9.2 GB, five rounds
    python benchmarks/convert.py --quick    # 1 layer, two rounds

Both sides end with everything on the disk and start with the source in the page cache (where it fits). The contenders
are interleaved; medians and the range are shown. Every file is removed at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from ostro.config import preset
from ostro.model.settings import ModelConfig
from ostro.weights import FORMATS, Reader, TensorInfo, Where, convert, open_reader
from ostro.weights.mindspore_layout import MindSporeDegrees

RANKS = MindSporeDegrees(dp=8, ep=8, pp=1, tp=2, opt=1)  # 16 ranks of one stage: works for any number of layers

CASES = {
    "HF → MindSpore": ("hf", "mindspore", {}),
    "MindSpore → HF": ("mindspore", "hf", {}),
    "HF → MindSpore gmm": ("hf", "mindspore-gmm", {}),
    "16 rank folders → HF": ("ranks", "hf", {}),
    "HF → Mistral": ("hf", "mistral", {}),
}


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """bf16 weights of the real shapes, the same few MB over and over: enough to copy, quick to make."""

    model: ModelConfig
    format = "synthetic"
    notes = ()

    def names(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(info.shape, torch.bfloat16) for name, info in self._source.names().items()}

    @property
    def _source(self) -> Reader:
        return FORMATS["random"].open_reader(self.model, 0)

    def read(self, name: str, where: Where = ()) -> torch.Tensor:
        shape = torch.empty(self.names()[name].shape, device="meta")[where].shape
        count = shape.numel()
        return NOISE.repeat(-(-count // len(NOISE)))[:count].view(shape)


NOISE = torch.randn((1 << 20) + 7, generator=torch.Generator().manual_seed(0)).bfloat16()


def warm(path: Path) -> int:
    """Read every file into the page cache; return the bytes."""
    total = 0
    buffer = bytearray(1 << 22)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while count := opened.readinto(buffer):
                    total += count
    return total


def remove(path: Path) -> None:
    """Remove a file or a folder, and let the disk settle."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    os.sync()


class Peak:
    """The largest anonymous plus shared memory of this process, sampled every 5 ms."""

    def __enter__(self) -> Peak:
        self.num_bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            kb = sum(int(status[key].split()[0]) for key in ("RssAnon", "RssShmem"))
            self.num_bytes = max(self.num_bytes, kb * 1024)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def timed_convert(source: Path, target: Path, to: str, settings: dict[str, Any]) -> tuple[float, int]:
    """Return the seconds of one conversion in a fresh process, start-up excluded, and its peak memory."""
    code = (
        "import sys, json; sys.path[:0] = [sys.argv[1]]; import convert as b; "
        "print(json.dumps(b.in_process(sys.argv[2], sys.argv[3], sys.argv[4], json.loads(sys.argv[5]))))"
    )
    arguments = [str(Path(__file__).parent), str(source), str(target), to, json.dumps(settings)]
    out = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True).stdout
    seconds, num_bytes = json.loads(out)
    return seconds, num_bytes


def in_process(source: str, target: str, to: str, settings: dict[str, Any]) -> tuple[float, int]:
    """Convert; return seconds and peak bytes."""
    with Peak() as peak:
        start = time.perf_counter()
        convert(open_reader(source), target, to=to, **settings)
        seconds = time.perf_counter() - start
    return seconds, peak.num_bytes


def timed_cp(source: Path, target: Path) -> float:
    """Return the seconds that cp and sync of the same bytes take."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(target)], check=True)
    files = [str(target), *(str(file) for file in target.rglob("*"))] if target.is_dir() else [str(target)]
    subprocess.run(["sync", *files], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer, two rounds")
    parser.add_argument("--layers", type=int, help="layers of the synthetic model (2.9 GB each)")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--dir", type=Path, help="where to write; its disk is what is measured")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    options = parser.parse_args()
    layers = options.layers or (1 if options.quick else 3)
    rounds = options.rounds or (2 if options.quick else 5)
    model = dataclasses.replace(preset("mixtral-8x7b"), num_hidden_layers=layers)
    stack_bytes = model.num_local_experts * 2 * model.intermediate_size * model.hidden_size * 2
    rows = []
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        place = Path(folder)
        convert(Synthetic(model), place / "hf", to="hf")
        size = warm(place / "hf")
        print(f"{layers} layers of Mixtral-8x7B in bf16, {size / 1e9:.1f} GB; {rounds} rounds, medians (range)")
        print(f"largest stack {stack_bytes / 1e6:,.0f} MB; torch alone is about {torch_alone() / 1e6:,.0f} MB\n")
        print("| conversion | seconds | cp + sync | ratio | RssAnon + RssShmem at most |\n|---|---|---|---|---|")
        for name, (source, to, settings) in CASES.items():
            if options.only and options.only not in name:
                continue
            if not (place / source).exists():
                degrees = {"degrees": RANKS} if source == "ranks" else {}
                convert(place / "hf", place / source, to="mindspore", **degrees)
            rows.append(measure(name, place, source, to, settings, rounds))
            if source != "hf":
                remove(place / source)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def measure(name: str, place: Path, source: str, to: str, settings: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Time one case against cp, round by round, and print its row."""
    ours, theirs, peaks = [], [], []
    for _ in range(rounds):
        warm(place / source)
        theirs.append(timed_cp(place / source, place / "copy"))
        remove(place / "copy")
        warm(place / source)
        seconds, peak = timed_convert(place / source, place / "out", to, settings)
        ours.append(seconds)
        peaks.append(peak)
        remove(place / "out")
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(f"| {name} | {spread(ours)} | {spread(theirs)} | {ratio:.2f} | {max(peaks) / 1e6:,.0f} MB |", flush=True)
    return {"case": name, "seconds": ours, "cp_seconds": theirs, "ratio": ratio, "peak_bytes": max(peaks)}


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def torch_alone() -> int:
    code = "import torch, ostro.weights; print(open('/proc/self/status').read())"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return sum(int(line.split()[1]) * 1024 for line in out.splitlines() if line.startswith(("RssAnon", "RssShmem")))


if __name__ == "__main__":
    main()
