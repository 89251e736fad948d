"""MindSpore's half of `mindspore.py`: runs a list of jobs in a Python that has mindspore, and neither torch nor Ostro.

    python -P mindspore_side.py JOBS.json

Beside JOBS.json it leaves JOBS.json.done, with the error of each job, or "". Tensors come and go in .npz files: in
float32 on the way in, as unsigned integers of the same bits on the way out, with `name|dtype` for a name.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ms: Any = importlib.import_module("mindspore")  # not the file of this name beside this one


def save(source: str, path: str, dtype: str, **settings: Any) -> None:
    """Save float32 arrays as `dtype` with `save_checkpoint`."""
    ms.save_checkpoint(_parameters(source, dtype), path, **settings)
    deadline = time.monotonic() + 30  # an asynchronous one is renamed to its place when it is whole
    while not Path(path).exists() and time.monotonic() < deadline:
        time.sleep(0.01)


OPTIMIZERS = {
    "nn.AdamWeightDecay": lambda weights: ms.nn.AdamWeightDecay(weights, learning_rate=1e-3),
    "nn.Adam": lambda weights: ms.nn.Adam(weights, use_amsgrad=True),
    "mint.optim.AdamW": lambda weights: ms.mint.optim.AdamW(weights, lr=1e-3),
}


def save_optimizer(source: str, path: str, dtype: str, kind: str, moments: str) -> None:
    """Save an optimizer over the weights, after putting values into its moments, as a training run would."""
    weights = [ms.Parameter(item["data"], name=item["name"]) for item in _parameters(source, dtype)]
    optimizer = OPTIMIZERS[kind](weights)
    held = np.load(moments)
    by_name = {parameter.name: parameter for parameter in optimizer.get_parameters()}
    for name in held.files:
        by_name[name].set_data(ms.Tensor(held[name], by_name[name].dtype))
    ms.save_checkpoint(optimizer, path, append_dict={"epoch_num": 3, "loss_scale": 1024.0})


def load(path: str, out: str, **settings: Any) -> None:
    """Load with `load_checkpoint`, and hand over the bits."""
    found = {}
    for name, parameter in ms.load_checkpoint(path, **settings).items():
        array = np.ascontiguousarray(parameter.asnumpy())
        bits = array.reshape(-1).view(f"u{array.itemsize}").reshape(array.shape)
        found[f"{name}|{str(parameter.dtype).lower()}"] = bits
    np.savez(out, **found)


def merge(source: str, out: str) -> None:
    """Merge the strategies of the stages."""
    ms.merge_pipeline_strategys(source, out)


def transform(source: str, target: str, **settings: Any) -> None:
    """Cut, join or recut the files of ranks."""
    ms.transform_checkpoints(source, target, "checkpoint_", **settings)


def to_safetensors(source: str, target: str) -> None:
    """Turn the .ckpt files of ranks into .safetensors."""
    ms.ckpt_to_safetensors(source, target, processes_num=1)


def unify(source: str, strategy: str, target: str) -> None:
    """Join the .safetensors of ranks into parts of whole tensors."""
    ms.parallel.unified_safetensors(source, strategy, target, max_process_num=1)


JOBS = {
    function.__name__: function for function in (save, save_optimizer, load, merge, transform, to_safetensors, unify)
}


def _parameters(source: str, dtype: str) -> list[dict[str, Any]]:
    held = np.load(source)
    return [{"name": name, "data": ms.Tensor(held[name], getattr(ms, dtype))} for name in held.files]


def main() -> None:
    """Run the jobs of the file; one that fails does not stop the others."""
    ms.set_device("CPU")
    path = Path(sys.argv[1])
    errors = []
    for name, settings in json.loads(path.read_text()):
        try:
            JOBS[name](**settings)
            errors.append("")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}".splitlines()[0])
    path.with_name(f"{path.name}.done").write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
