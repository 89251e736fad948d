"""The real MindSpore beside Ostro: what either writes, the other must read with every bit the same.

Not collected by pytest, as it needs a Python of its own with mindspore 2.10 and numpy below 2 (`make interop` makes
one):

    python tests/interop/mindspore.py --mindspore-python PATH_OF_THAT_PYTHON [--json FILE]

A small random Mixtral is written in every form and layout. MindSpore loads, merges and cuts what Ostro wrote; Ostro
reads what MindSpore saved, cut and joined, and converts it to Hugging Face's. Tensors are compared by name, type, shape
and bits, against names and shapes spelled out here. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ostro import degrees as degree_rules
from ostro.errors import Error
from ostro.model.settings import ModelConfig
from ostro.weights import RandomReader, Reader, ckpt_file, digest, hf, mindspore
from ostro.weights.mindspore_layout import MindSporeDegrees
from ostro.weights.mindspore_ranks import open_file
from ostro.weights.store import CastReader, Hints, TensorInfo, same_bits

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=8,
    num_experts_per_tok=2,
)
LAYOUTS = (
    "tp=2",
    "dp=2,ep=2",
    "dp=8,ep=8,pp=2",
    "dp=8,ep=8,pp=2,opt=1",
    "dp=4,tp=2,ep=4",
    "dp=4,tp=2,ep=2,opt=1",
    "dp=2,tp=2,ep=2,pp=2,opt=1,vocab=1",
    "tp=2,pp=4,vocab=1",
    "dp=8,opt=1",
)
RECUTS = (("dp=8,ep=8,pp=2,opt=1", "dp=4,tp=2,ep=2,opt=1"), ("tp=2", "dp=2,tp=2,ep=2,pp=2,opt=1,vocab=1"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIMIZERS = {
    "nn.AdamWeightDecay": ("adam_m.", "adam_v."),
    "nn.Adam": ("moment1.", "moment2.", "vhat."),
    "mint.optim.AdamW": ("exp_avg.", "exp_avg_sq."),
}
OUT, IN = "Ostro → MindSpore", "MindSpore → Ostro"

Named = dict[str, Tensor]


@dataclasses.dataclass
class Case:
    """One line of the table: jobs for MindSpore, and what is compared when they are done ("" or what differs)."""

    what: str
    direction: str
    jobs: list[tuple[str, dict[str, Any]]]
    compare: Callable[[], str]


def main() -> int:
    """Print the table; return the exit code."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mindspore-python", required=True, help="a Python that has mindspore and numpy below 2")
    options.add_argument("--json", type=Path, help="write the table here as well")
    given = options.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = [*_files(folder), *_optimizers(folder), *_layouts(folder), *_recuts(folder), *_safetensors(folder)]
        errors = iter(_ask(given.mindspore_python, folder, [job for case in cases for job in case.jobs]))
        rows = [_row(case, [next(errors) for _ in case.jobs]) for case in cases]
    print("| case | direction | result |\n|---|---|---|")
    for row in rows:
        print(f"| {row['case']} | {row['direction']} | {row['result']} |")
    failed = sum(row["result"] != "equal" for row in rows)
    print(f"\n{len(rows) - failed} of {len(rows)} equal, {time.perf_counter() - start:.0f} s")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return int(failed > 0)


def _row(case: Case, errors: list[str]) -> dict[str, str]:
    result = next((f"MindSpore: {error}" for error in errors if error), "")
    if not result:
        try:
            result = case.compare()
        except (Error, OSError) as error:
            result = f"{type(error).__name__}: {error}"
    return {"case": case.what, "direction": case.direction, "result": result or "equal"}


def _ask(python: str, folder: Path, jobs: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Run the jobs in the other Python, and return the error of each, or ""."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    side = Path(__file__).resolve().with_name("mindspore_side.py")
    # -P, and a working folder without modules: a file named mindspore.py lies beside that script.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment = outside | {"OMP_NUM_THREADS": "1", "GLOG_v": "3"}
    done = subprocess.run(
        [python, "-P", str(side), str(path)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    answer = path.with_name(f"{path.name}.done")
    if done.returncode or not answer.exists():
        sys.exit(f"{python} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(answer.read_text())


# What is expected


def _source(dtype: str, seed: int = 0) -> Reader:
    return CastReader(RandomReader(MODEL, seed), DTYPES[dtype])


def _expected(reader: Reader, *, is_gmm: bool = False, qkv_concat: bool = False, prefix: str = "") -> Named:
    """Return MindFormers' tensors of a model, spelled out (research/mixtral/convert_weight.py of r1.7.0)."""
    found = {"model.tok_embeddings.embedding_weight": reader.read("model.embed_tokens.weight")}
    for i in range(MODEL.num_hidden_layers):
        ours, theirs = f"model.layers.{i}.", f"model.layers.{i}."
        found[theirs + "attention_norm.weight"] = reader.read(ours + "input_layernorm.weight")
        q, k, v, o = (reader.read(f"{ours}self_attn.{letter}_proj.weight") for letter in "qkvo")
        if qkv_concat:
            heads = [one.view(MODEL.num_key_value_heads, -1, MODEL.hidden_size) for one in (q, k, v)]
            found[theirs + "attention.w_qkv.weight"] = torch.cat(heads, 1).reshape(-1, MODEL.hidden_size)
        else:
            found |= {f"{theirs}attention.w{letter}.weight": one for letter, one in zip("qkv", (q, k, v), strict=True)}
        found[theirs + "attention.wo.weight"] = o
        found[theirs + "ffn_norm.weight"] = reader.read(ours + "post_attention_layernorm.weight")
        found[theirs + "feed_forward.router.dense.weight"] = reader.read(ours + "block_sparse_moe.gate.weight")
        w13 = reader.read(ours + "block_sparse_moe.experts.w13")
        w2 = reader.read(ours + "block_sparse_moe.experts.w2")
        for name, stack in (("w1", w13[:, 0]), ("w3", w13[:, 1]), ("w2", w2)):
            found[f"{theirs}feed_forward.ffn.{name}.weight"] = stack.transpose(1, 2) if is_gmm else stack
    found["model.norm_out.weight"] = reader.read("model.norm.weight")
    found["lm_head.weight"] = reader.read("lm_head.weight")
    return {prefix + name: tensor.contiguous() for name, tensor in found.items()}


def _differs(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    for name in dict.fromkeys([*expected, *found]):
        if name not in found or name not in expected:
            return f"{name} is {'missing' if name not in found else 'too much'}"
        if not same_bits(expected[name], found[name]):
            return f"{name} differs"
    return ""


def _loaded(path: Path) -> Named:
    """Return what MindSpore loaded, of its bits."""
    held, found = np.load(path), {}
    for key in held.files:
        name, _, dtype = key.rpartition("|")
        signed = held[key].view(held[key].dtype.str.replace("u", "i"))
        found[name] = torch.from_numpy(signed).view(getattr(torch, dtype))
    return found


def _held(path: Path) -> Named:
    """Return the tensors of a file."""
    file = open_file(path)
    return {name: file.tensor(name) for name in file.infos}


def _rank_file(folder: Path, rank: int) -> Path:
    return next((folder / f"rank_{rank}").glob("checkpoint_*"))


def _reads(path: Path, source: Reader, folder: Path, **hints: Any) -> str:
    """Open what MindSpore wrote, and convert it; return what is wrong with either."""
    reader = mindspore.open_reader(path, Hints(model=MODEL, **hints))
    reader.check()
    reader.certify()
    if digest(reader) != digest(source):
        return "the model read differs"
    hf.write(reader, folder)
    opened = hf.open_reader(folder)
    opened.check()
    return "" if digest(opened) == digest(source) else "the model converted to Hugging Face's differs"


def _send(named: Mapping[str, Tensor], path: Path) -> str:
    arrays: dict[str, Any] = {name: tensor.float().numpy() for name, tensor in named.items()}
    np.savez(path, **arrays)
    return str(path)


# Single files


def _files(folder: Path) -> list[Case]:
    cases = []
    for dtype in DTYPES:
        for is_gmm, qkv_concat, suffix in (
            (False, False, ".ckpt"),
            (True, False, ".ckpt"),
            (False, True, ".ckpt"),
            (False, False, ".safetensors"),
            (True, False, ".safetensors"),
        ):
            cases.append(_loads(folder, dtype, is_gmm, qkv_concat, suffix))
        for how, suffix, settings in (
            ("sync", ".ckpt", {"append_dict": {"epoch_num": 3, "loss_scale": 1024.0, "flag": True, "note": "π"}}),
            ("async", ".ckpt", {"async_save": True}),
            ("crc_check", ".ckpt", {"crc_check": True}),
            ("sync", ".safetensors", {"format": "safetensors", "append_dict": {"epoch_num": 3}}),
        ):
            cases.append(_saves(folder, dtype, how, suffix, settings))
    cases.append(_pieces(folder))
    return cases


def _loads(folder: Path, dtype: str, is_gmm: bool, qkv_concat: bool, suffix: str) -> Case:
    source, stem = _source(dtype), f"out-{dtype}-{is_gmm}-{qkv_concat}"
    path = folder / f"{stem}{suffix}"
    mindspore.write(source, path, is_gmm=is_gmm, qkv_concat=qkv_concat)
    out = folder / f"{path.name}.npz"
    settings = {"format": suffix.removeprefix(".")} | ({"crc_check": False} if suffix == ".ckpt" else {})
    what = f"{suffix}, {dtype}" + (", gmm" if is_gmm else "") + (", qkv_concat" if qkv_concat else "")
    expected = _expected(source, is_gmm=is_gmm, qkv_concat=qkv_concat)
    return Case(
        f"load_checkpoint: {what}",
        OUT,
        [("load", {"path": str(path), "out": str(out), **settings})],
        lambda: _differs(expected, _loaded(out)),
    )


def _pieces(folder: Path) -> Case:
    """Records shorter than tensors, as of one over 512 MiB."""
    source, path = _source("float32"), folder / "pieces.ckpt"
    usual, ckpt_file.RECORD_BYTES = ckpt_file.RECORD_BYTES, 100_001
    try:
        mindspore.write(source, path)
    finally:
        ckpt_file.RECORD_BYTES = usual
    out = folder / "pieces.npz"
    return Case(
        "load_checkpoint: .ckpt of tensors in several records",
        OUT,
        [("load", {"path": str(path), "out": str(out)})],
        lambda: _differs(_expected(source), _loaded(out)),
    )


def _saves(folder: Path, dtype: str, how: str, suffix: str, settings: dict[str, Any]) -> Case:
    source = _source(dtype)
    stem = f"in-{dtype}-{how}{suffix.replace('.', '-')}"
    sent, path = _send(_expected(source), folder / f"{stem}.npz"), folder / f"{stem}{suffix}"
    return Case(
        f"save_checkpoint: {suffix}, {dtype}, {how}",
        IN,
        [("save", {"source": sent, "path": str(path), "dtype": dtype, **settings})],
        lambda: _reads(path, source, folder / f"{stem}-hf"),
    )


# The optimizer


def _optimizers(folder: Path) -> list[Case]:
    trained = _with_optimizer(folder / "training.ckpt")
    return [
        *(_trained(folder, kind) for kind in OPTIMIZERS),
        *(_merged(folder, text, "float32", trained) for text in ("dp=8,ep=8,pp=2,opt=1", "dp=4,tp=2,ep=2,opt=1")),
    ]


def _trained(folder: Path, kind: str) -> Case:
    """Ostro turns the moments of what an optimizer of MindSpore's saved."""
    source, prefixes = _source("float32"), OPTIMIZERS[kind]
    stem = folder / f"optimizer-{kind.replace('.', '-')}"
    path = stem.with_suffix(".ckpt")
    sent = _send(_expected(source), stem.with_suffix(".weights.npz"))
    moments = _send(_moments(prefixes), stem.with_suffix(".moments.npz"))
    job = {"source": sent, "path": str(path), "dtype": "float32", "kind": kind, "moments": moments}

    def compare() -> str:
        problem = _reads(path, source, stem.with_suffix(".hf"))
        if problem:
            return problem
        reader = mindspore.open_reader(path, Hints(model=MODEL))
        mindspore.write(reader, stem.with_suffix(".gmm.ckpt"), is_gmm=True, optimizer=reader)
        held, saved = _held(stem.with_suffix(".gmm.ckpt")), _held(path)
        turned = _expected(source, is_gmm=True) | _moments(prefixes, is_gmm=True)
        scalars = {name: saved[name] for name in saved if name not in turned}
        if (scalars["epoch_num"].item(), scalars["loss_scale"].item()) != (3, 1024.0):
            return f"the scalars are {scalars}"
        return _differs(turned | scalars, held)

    return Case(f"save_checkpoint of {kind}, moments turned for gmm", IN, [("save_optimizer", job)], compare)


def _moments(prefixes: tuple[str, ...] = ("adam_m.", "adam_v."), *, is_gmm: bool = False) -> Named:
    found: Named = {}
    for seed, prefix in enumerate(prefixes, 1):
        found |= _expected(_source("float32", seed), is_gmm=is_gmm, prefix=prefix)
    return found


def _with_optimizer(path: Path) -> tuple[Path, Named]:
    """Write a training checkpoint by hand; return it and its tensors."""
    scalars = {"global_step": torch.tensor([7], dtype=torch.int32), "epoch_num": torch.tensor(3)}
    held = _expected(_source("float32")) | _moments() | scalars
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()}
    ckpt_file.write_ckpt(path, infos, lambda name: [held[name]])
    return path, held


# Ranks


def _degrees(text: str) -> MindSporeDegrees:
    return degree_rules.parse(text, MindSporeDegrees)


def _layouts(folder: Path) -> list[Case]:
    cases = []
    for dtype in ("float32", "bfloat16"):
        for text in LAYOUTS:
            cases += [_merged(folder, text, dtype), _cut(folder, text, dtype)]
    gmm = "dp=4,tp=2,ep=2,opt=1"
    return [*cases, _merged(folder, gmm, "float32", is_gmm=True), _cut(folder, gmm, "float32", is_gmm=True)]


def _written(folder: Path, text: str, dtype: str, **settings: Any) -> tuple[Path, list[tuple[str, dict[str, Any]]]]:
    """Write rank folders once; return their folder, and the job that merges their strategies."""
    root = folder / "-".join(["ranks", dtype, text, *settings])
    if not root.exists():
        mindspore.write(_source(dtype), root, degrees=_degrees(text), **settings)
    return root, [("merge", {"source": str(root / "strategy"), "out": str(root / "merged.ckpt")})]


def _merged(
    folder: Path, text: str, dtype: str, optimizer: tuple[Path, Named] | None = None, *, is_gmm: bool = False
) -> Case:
    """MindSpore merges the rank folders that Ostro wrote."""
    settings: dict[str, Any] = {"is_gmm": True} if is_gmm else {}
    expected = _expected(_source(dtype), is_gmm=is_gmm)
    if optimizer:
        path, expected = optimizer
        settings["optimizer"] = mindspore.open_reader(path, Hints(model=MODEL))
    root, jobs = _written(folder, text, dtype, **settings)
    job = {
        "source": str(root / "checkpoint"),
        "target": str(root / "whole"),
        "src_strategy_file": str(root / "merged.ckpt"),
    }
    what = f"merge_pipeline_strategys, transform_checkpoints: {text.replace(',', ' ')}, {dtype}"
    return Case(
        what + (", gmm" if is_gmm else "") + (", with optimizer" if optimizer else ""),
        OUT,
        [*jobs, ("transform", job)],
        lambda: _differs(expected, _held(_rank_file(root / "whole", 0))),
    )


def _cut(folder: Path, text: str, dtype: str, *, is_gmm: bool = False) -> Case:
    """MindSpore cuts a whole file by Ostro's strategies: Ostro reads it, and each rank's file is what Ostro wrote."""
    source = _source(dtype)
    root, _ = _written(folder, text, dtype, **({"is_gmm": True} if is_gmm else {}))
    whole = folder / f"whole-{dtype}-{is_gmm}" / "rank_0" / "checkpoint_0.ckpt"
    jobs = []
    if not whole.parent.exists():
        whole.parent.mkdir(parents=True)
        sent = _send(_expected(source, is_gmm=is_gmm), whole.parent.parent / "sent.npz")
        jobs = [("save", {"source": sent, "path": str(whole), "dtype": dtype})]
    target = root / "cut"
    job = {
        "source": str(whole.parent.parent),
        "target": str(target),
        "dst_strategy_file": str(root / "merged.ckpt"),
    }

    def compare() -> str:
        for rank in range(_degrees(text).num_ranks):
            problem = _differs(_held(_rank_file(root / "checkpoint", rank)), _held(_rank_file(target, rank)))
            if problem:
                return f"rank {rank}: {problem}"
        return _reads(target, source, root / "hf")

    what = f"transform_checkpoints: {text.replace(',', ' ')}, {dtype}" + (", gmm" if is_gmm else "")
    return Case(what, IN, [*jobs, ("transform", job)], compare)


def _recuts(folder: Path) -> list[Case]:
    """MindSpore turns one layout into another, with the strategies of both by Ostro."""
    cases = []
    for first, second in RECUTS:
        (one, _), (other, _) = (_written(folder, text, "float32") for text in (first, second))
        target = other / f"from-{first}"
        job = {
            "source": str(one / "checkpoint"),
            "target": str(target),
            "src_strategy_file": str(one / "merged.ckpt"),
            "dst_strategy_file": str(other / "merged.ckpt"),
        }
        cases.append(
            Case(
                f"transform_checkpoints: {first.replace(',', ' ')} to {second.replace(',', ' ')}",
                IN,
                [("transform", job)],
                lambda target=target, other=other: _reads(
                    target, _source("float32"), target / "hf", strategy=other / "strategy"
                ),
            )
        )
    return cases


def _safetensors(folder: Path) -> list[Case]:
    """Ranks' .safetensors as MindSpore makes them, and joined in its unified form.

    It cuts whole .safetensors right along dim 0 alone (2.10.0; of others it writes the first bytes of the whole, as
    its slices are not contiguous): the layout with tp goes through .ckpt files.
    """
    cases = []
    for dtype, text in (("float32", "dp=4,tp=2,ep=2,opt=1"), ("bfloat16", "dp=8,ep=8,pp=2,opt=1")):
        source = _source(dtype)
        root, _ = _written(folder, text, dtype)
        target = root / "safetensors"
        words = f"{text.replace(',', ' ')}, {dtype}"
        cases.append(
            Case(
                f"ckpt_to_safetensors of Ostro's ranks: {words}",
                IN,
                [("to_safetensors", {"source": str(root / "checkpoint"), "target": str(target)})],
                lambda target=target, source=source: _reads(target, source, target / "hf"),
            )
        )
        unified = root / "unified"
        job = {"source": str(target), "strategy": str(root / "merged.ckpt"), "target": str(unified)}
        cases.append(
            Case(
                f"unified_safetensors: {words}",
                IN,
                [("unify", job)],
                lambda unified=unified, source=source: _reads(unified, source, unified / "hf"),
            )
        )
    return [*cases, _cut_safetensors(folder, "bfloat16", "dp=8,ep=8,pp=2,opt=1")]


def _cut_safetensors(folder: Path, dtype: str, text: str) -> Case:
    source = _source(dtype)
    root, _ = _written(folder, text, dtype)
    whole, target = root / "whole-safetensors", root / "cut-safetensors"
    (whole / "rank_0").mkdir(parents=True)
    saved = {
        "source": _send(_expected(source), root / "sent.npz"),
        "path": str(whole / "rank_0" / "checkpoint_0.safetensors"),
        "dtype": dtype,
        "format": "safetensors",
        "append_dict": {"epoch_num": 3},
    }
    cut = {
        "source": str(whole),
        "target": str(target),
        "dst_strategy_file": str(root / "merged.ckpt"),
        "output_format": "safetensors",
    }
    return Case(
        f"transform_checkpoints to .safetensors: {text.replace(',', ' ')}, {dtype}",
        IN,
        [("save", saved), ("transform", cut)],
        lambda: _reads(target, source, target / "hf"),
    )


if __name__ == "__main__":
    sys.exit(main())
