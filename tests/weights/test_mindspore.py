"""MindSpore checkpoints: against what MindFormers left, against its names spelled out, and against other formats.

What ranks leave is in `test_mindspore_ranks.py`; the real MindSpore is asked in `tests/interop/mindspore.py`.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mindformers_files import (
    CLUSTER,
    FOUR,
    SCALARS,
    equal,
    held,
    moments,
    opened,
    refusal,
    run,
    save,
    theirs,
)
from small_models import TINY, Altered, mixtral, models, random
from torch import Tensor

from ostro.errors import WeightsError
from ostro.model.settings import ModelConfig
from ostro.model.spans import spans_of
from ostro.weights import (
    CastReader,
    ckpt_file,
    convert,
    detect,
    digest,
    mindspore,
    mindspore_layout,
    open_reader,
    stored,
)
from ostro.weights.ckpt_file import CkptFile
from ostro.weights.mindspore_layout import MindSporeDegrees
from ostro.weights.store import TensorInfo, same_bits
from ostro.weights.stored import StoredReader

SQUARE = dataclasses.replace(TINY, intermediate_size=TINY.hidden_size)


# What MindFormers and MindSpore left


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    return shared / "golden" / "mindformers"


@pytest.fixture(scope="module")
def whole(golden: Path) -> StoredReader:
    """MindFormers' own checkpoint; the config.json beside it leaves the model_type out."""
    fields = json.loads((golden / "config.json").read_text())
    return opened(golden / "model.ckpt", ModelConfig.from_hf({"model_type": "mixtral", **fields}))


def test_the_model_computes_what_mindformers_computed(golden: Path, whole: StoredReader) -> None:
    assert whole.format == "mindspore"
    expected = np.load(golden / "expected.npz")
    model, tokens = mixtral(whole), torch.from_numpy(expected["x"]).long()
    with torch.no_grad():
        logits = model.logits(model(tokens.reshape(-1), spans_of([tokens.shape[1]] * len(tokens))))
    torch.testing.assert_close(logits.view(*tokens.shape, -1), torch.from_numpy(expected["logits"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("place", ["", "checkpoint", "checkpoint/rank_3", "checkpoint/rank_11/*.ckpt"])
def test_the_ranks_of_mindformers_are_its_whole_model(golden: Path, whole: StoredReader, place: str) -> None:
    root = golden / "distributed"
    path = next(root.glob(place)) if place else root
    assert detect(path) == "mindspore"
    reader = opened(path, whole.model)
    assert digest(reader) == digest(whole)
    assert reader.notes[0].startswith("16 ranks in 2 stages of ")
    assert "step 5_1" in reader.notes
    assert "23 tensors and 2 scalars of the optimizer beside the weights" in reader.notes


def test_the_optimizer_of_mindformers_comes_along(golden: Path, whole: StoredReader, tmp_path: Path) -> None:
    reader = opened(golden / "distributed", whole.model)
    mindspore.write(reader, tmp_path / "x.ckpt", optimizer=reader)
    found, weights = held(tmp_path / "x.ckpt"), held(golden / "model.ckpt")
    zeros = {f"adam_m.{name}": torch.zeros_like(tensor) for name, tensor in weights.items()}
    scalars = {name: found.pop(name) for name in ("global_step", "epoch_num")}
    assert equal(found, weights | zeros)
    assert equal(scalars, {name: CkptFile(next(golden.glob("**/rank_7/*"))).tensor(name) for name in scalars})


def test_writing_repeats_the_tensors_of_mindformers(golden: Path, whole: StoredReader, tmp_path: Path) -> None:
    mindspore.write(whole, tmp_path / "x.ckpt")
    assert equal(held(tmp_path / "x.ckpt"), held(golden / "model.ckpt"))


@pytest.mark.parametrize("name", ["small.ckpt", "small_crc.ckpt", "small_async.ckpt", "small.safetensors"])
def test_files_of_mindspore_that_are_no_mixtral(shared: Path, name: str) -> None:
    path = shared / "golden" / "mindspore" / name
    stacked = torch.from_numpy(np.load(path.with_name("stacked.npy"))).bfloat16()
    assert any(same_bits(tensor, stacked) for tensor in held(path).values())
    assert detect(path) == ("mindspore" if path.suffix == ".ckpt" else "hf")
    assert "not a Mixtral" in refusal(path, format="mindspore") or "holds 1 layers" in refusal(path, format="mindspore")
    assert "fits no preset" in refusal(path, None, format="mindspore")


# One file


@settings(max_examples=40)
@given(
    config=models(),
    place=st.sampled_from(["x.ckpt", "x.safetensors", "x"]),
    is_gmm=st.booleans(),
    qkv_concat=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_files_and_folders(config: ModelConfig, place: str, is_gmm: bool, qkv_concat: bool, dtype: torch.dtype) -> None:
    source = CastReader(random(config), dtype)
    name = "mindspore-gmm" if is_gmm else "mindspore"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / place
        convert(source, path, to=name, qkv_concat=qkv_concat)
        file = path / "mixtral.ckpt" if place == "x" else path
        assert equal(held(file), theirs(source, is_gmm=is_gmm, qkv_concat=qkv_concat))
        assert detect(path) == "mindspore"
        # The folder says everything by its config.json, the file nothing but its tensors.
        reader = open_reader(path) if place == "x" else opened(path, config, format=name)
        assert reader.format == name
        assert digest(reader) == digest(source)
        assert (path / "config.json").exists() == (place == "x")


def test_a_file_without_a_configuration_is_known_by_its_sizes(tmp_path: Path) -> None:
    from ostro import config

    preset = next(name for name in config.preset_names() if config.preset(name).hidden_size <= 256)
    convert(random(config.preset(preset)), tmp_path / "x.ckpt", to="mindspore-gmm")
    reader = open_reader(tmp_path / "x.ckpt")
    assert (reader.format, reader.model) == ("mindspore-gmm", config.preset(preset))
    assert f"no configuration beside it: the sizes are those of {preset}" in reader.notes
    convert(random(), tmp_path / "y.ckpt", to="mindspore")
    assert "comes without a configuration and fits no preset (2 layers" in refusal(tmp_path / "y.ckpt", None)


@pytest.mark.parametrize("name", ["mindspore", "mindspore-gmm"])
def test_square_experts_must_be_told(tmp_path: Path, name: str) -> None:
    convert(random(SQUARE), tmp_path / "x.ckpt", to=name)
    assert "say --from mindspore or --from mindspore-gmm" in refusal(tmp_path / "x.ckpt", SQUARE)
    assert digest(opened(tmp_path / "x.ckpt", SQUARE, format=name)) == digest(random(SQUARE))
    convert(random(SQUARE), tmp_path / "x", to=name)  # whose config.json tells
    assert digest(open_reader(tmp_path / "x")) == digest(random(SQUARE))
    mindspore.write(random(SQUARE), tmp_path / "ranks", degrees=MindSporeDegrees(tp=2), is_gmm=name.endswith("gmm"))
    assert digest(open_reader(tmp_path / "ranks")) == digest(random(SQUARE))
    assert digest(open_reader(tmp_path / "ranks" / "checkpoint" / "rank_1")) == digest(random(SQUARE))


def test_the_router_of_dropless_training(tmp_path: Path) -> None:
    renamed = {name.replace("router.dense.", "router_dense."): t for name, t in theirs(random(), is_gmm=True).items()}
    reader = opened(save(tmp_path / "x.ckpt", renamed), TINY)
    assert (reader.format, digest(reader)) == ("mindspore-gmm", digest(random()))


def test_a_tensor_over_the_limit_of_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ckpt_file, "RECORD_BYTES", 333)
    monkeypatch.setattr(stored, "_BLOCK_BYTES", 150)
    for is_gmm in (False, True):
        source = random(CLUSTER)
        mindspore.write(source, tmp_path / f"{is_gmm}.ckpt", is_gmm=is_gmm)
        mindspore.write(source, tmp_path / f"{is_gmm}", is_gmm=is_gmm, degrees=FOUR)
        assert (tmp_path / f"{is_gmm}.ckpt").read_bytes().count(b"layers.1.feed_forward.ffn.w2.weight") == 8
        assert equal(held(tmp_path / f"{is_gmm}.ckpt"), theirs(source, is_gmm=is_gmm))
        assert digest(opened(tmp_path / f"{is_gmm}.ckpt")) == digest(source)
        assert digest(opened(tmp_path / f"{is_gmm}")) == digest(source)


def test_q_k_and_v_of_two_types_do_not_fit_one_tensor(tmp_path: Path) -> None:
    class Mixed:
        format, model, notes = "mixed", TINY, ()

        def names(self) -> dict[str, TensorInfo]:
            types = {True: torch.bfloat16, False: torch.float32}
            return {n: TensorInfo(i.shape, types["k_proj" in n]) for n, i in random().names().items()}

        def read(self, name: str, where: tuple[int | slice, ...] = ()) -> Tensor:
            return random().read(name, where).to(self.names()[name].dtype)

    with pytest.raises(WeightsError, match=r"q_proj.weight and its k and v differ in type"):
        mindspore.write(Mixed(), tmp_path / "x.ckpt", qkv_concat=True)
    mindspore.write(Mixed(), tmp_path / "y.ckpt")
    assert digest(opened(tmp_path / "y.ckpt", TINY)) == digest(Mixed())


def test_a_single_device_run_has_steps_too(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "checkpoint" / "rank_0"
    for seed, step in enumerate(("1_1", "2_1", "10_1")):
        save(folder / f"mixtral-8x7b_rank_0-{step}.ckpt", theirs(random(seed=seed)))
        save(tmp_path / "out/checkpoint_network/rank_0" / f"m_rank_0-network-{step}.ckpt", theirs(random(seed=9)))
    for path in (tmp_path / "out", tmp_path / "out" / "checkpoint", folder):
        reader = opened(path, TINY)
        assert digest(reader) == digest(random(seed=2))
        assert "the file is mixtral-8x7b_rank_0-10_1.ckpt" in reader.notes
        assert digest(opened(path, TINY, step=2)) == digest(random(seed=1))
        message = refusal(path, TINY, step=3)
        assert "holds no step 3; there are 10_1, 2_1, 1_1: choose one of those" in message
    assert digest(opened((folder / "mixtral-8x7b_rank_0-1_1.ckpt"), TINY)) == digest(random())
    assert "is a file: leave it out" in refusal(folder / "mixtral-8x7b_rank_0-10_1.ckpt", TINY, step=2)
    assert "is not in one: leave it out" in refusal(folder / "mixtral-8x7b_rank_0-10_1.ckpt", TINY, strategy=tmp_path)
    save((folder / "mixtral-8x7b_rank_0_1-10_1.ckpt"), theirs(random()))
    assert "holds 2 checkpoints, mixtral-8x7b_rank_0-10_1.ckpt and others" in refusal(folder, TINY)


# The optimizer


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A training checkpoint, whose moments stay in float32 beside weights in bfloat16."""
    weights = theirs(CastReader(random(CLUSTER), torch.bfloat16))
    return save(tmp_path / "training" / "mixtral.ckpt", weights | moments() | SCALARS)


@pytest.mark.parametrize("is_gmm", [False, True])
@pytest.mark.parametrize("opt", [0, 1])
def test_the_optimizer_goes_through_layouts_and_orientations(
    training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_gmm: bool, opt: int
) -> None:
    monkeypatch.setattr(mindspore_layout, "_OPT_THRESHOLD_BYTES", 0)
    degrees = MindSporeDegrees(dp=2, tp=2, ep=2, pp=2, opt=opt)
    first = opened(training)
    mindspore.write(first, tmp_path / "ranks", degrees=degrees, is_gmm=is_gmm, optimizer=first)
    second = opened(tmp_path / "ranks")
    assert f"{len(moments())} tensors and 3 scalars of the optimizer beside the weights" in second.notes
    for others in (False, True):
        mindspore.write(second, tmp_path / f"{others}.safetensors", is_gmm=others, optimizer=second)
        weights = theirs(CastReader(random(CLUSTER), torch.bfloat16), is_gmm=others)
        assert equal(held(tmp_path / f"{others}.safetensors"), weights | moments(is_gmm=others) | SCALARS)


def test_the_optimizer_with_q_k_and_v_in_one(training: Path, tmp_path: Path) -> None:
    first = opened(training)
    mindspore.write(first, tmp_path / "x.ckpt", qkv_concat=True, optimizer=first)
    weights = theirs(CastReader(random(CLUSTER), torch.bfloat16), qkv_concat=True)
    assert equal(held(tmp_path / "x.ckpt"), weights | moments(qkv_concat=True) | SCALARS)
    second = opened(tmp_path / "x.ckpt")
    mindspore.write(second, tmp_path / "y.ckpt", optimizer=second)
    assert equal(held(tmp_path / "y.ckpt"), held(training))


@pytest.mark.parametrize(
    ("prefixes", "scalars"),
    [
        (("moment1.", "moment2.", "vhat."), ("global_step", "learning_rate", "beta1_power", "beta2_power")),
        (("exp_avg.", "exp_avg_sq.", "max_exp_avg_sq."), ("state_step", "learning_rate_group_1")),
    ],
)
def test_the_moments_of_other_optimizers(tmp_path: Path, prefixes: tuple[str, ...], scalars: tuple[str, ...]) -> None:
    tensors = theirs(random())
    for seed, prefix in enumerate(prefixes):
        tensors |= theirs(random(seed=seed), prefix=prefix)
    for index, name in enumerate(scalars):
        tensors[name] = torch.full((1,) if name in ("global_step", "state_step") else (), index)
    reader = opened(save(tmp_path / "x.ckpt", tensors), TINY)
    assert digest(reader) == digest(random())
    mindspore.write(reader, tmp_path / "y.ckpt", optimizer=reader)
    assert equal(held(tmp_path / "y.ckpt"), tensors)


def test_the_optimizer_stays_behind_unless_it_is_asked_for(training: Path, tmp_path: Path) -> None:
    reader = opened(training)
    mindspore.write(reader, tmp_path / "x.ckpt")
    assert equal(held(tmp_path / "x.ckpt"), theirs(CastReader(random(CLUSTER), torch.bfloat16)))
    with pytest.raises(WeightsError, match=r"x.ckpt holds no optimizer: convert it without --optimizer\."):
        mindspore.write(reader, tmp_path / "y.ckpt", optimizer=opened(tmp_path / "x.ckpt"))
    tensors = held(training)
    del tensors["adam_v.model.layers.1.attention.wo.weight"]
    reader = opened(save(training, tensors))
    with pytest.raises(WeightsError, match=r"lacks 1 of .* first adam_v.model.layers.1.attention.wo.weight"):
        mindspore.write(reader, tmp_path / "y.ckpt", optimizer=reader)
    assert not (tmp_path / "y.ckpt").exists()


# The parts that unified_safetensors joins ranks into


@pytest.fixture
def unified(tmp_path: Path) -> Path:
    tensors = theirs(random())
    halves = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    for index, half in enumerate(halves):
        save(tmp_path / "unified" / f"part{index}.safetensors", half)
    save(tmp_path / "unified" / "hyper_param.safetensors", {"epoch_num": torch.tensor(3)})
    map = {name: f"part{index}.safetensors" for index, half in enumerate(halves) for name in half}
    content = {"metadata": {"total_size": 1}, "weight_map": map}
    (tmp_path / "unified" / "param_name_map.json").write_text(json.dumps(content))
    return tmp_path / "unified"


def test_unified_parts(unified: Path) -> None:
    assert detect(unified) == "mindspore"
    reader = opened(unified, TINY)
    assert digest(reader) == digest(random())
    assert "0 tensors and 1 scalars of the optimizer beside the weights" in reader.notes
    path = unified / "param_name_map.json"
    path.write_text(json.dumps(json.loads(path.read_text())["weight_map"]))  # as older versions have it
    assert digest(opened(unified, TINY)) == digest(random())


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("part7.safetensors", "part7.safetensors cannot be read (No such file or directory)"),
        ("part1.safetensors", "is in part1.safetensors, which lacks it: join the files again."),
        ("../part0.safetensors", "has '../part0.safetensors' for the file of "),
        (5, "has 5 for the file of "),
        (None, "lacks 1 of the model's"),
    ],
)
def test_a_map_of_parts_that_is_wrong(unified: Path, part: object, sentence: str) -> None:
    path = unified / "param_name_map.json"
    content = json.loads(path.read_text())
    content["weight_map"]["model.tok_embeddings.embedding_weight"] = part
    if part is None:
        del content["weight_map"]["model.tok_embeddings.embedding_weight"]
    path.write_text(json.dumps(content))
    assert sentence in refusal(unified, TINY)


# What it is taken for


def test_what_is_not_of_this_format(tmp_path: Path) -> None:
    convert(random(), tmp_path / "hf", to="hf")
    (tmp_path / "hf" / "rank_0").mkdir()  # as logs have it
    (tmp_path / "hf" / "rank_1").mkdir()
    (tmp_path / "hf" / "lightning.ckpt").write_bytes(b"PK\3\4 zip")
    convert(random(), tmp_path / "many" / "rank_0", to="hf")
    convert(random(), tmp_path / "many" / "rank_1", to="hf")
    for path in (tmp_path / "hf", tmp_path / "hf" / "model.safetensors", tmp_path / "many" / "rank_1"):
        assert not mindspore.detect(path)
        assert digest(open_reader(path)) == digest(random())
    run_folder = tmp_path / "run"
    checkpoints.save(run_folder / "checkpoints" / "step-00000003", {"a": torch.ones(2)}, {"step": 3})
    (tmp_path / "folder" / "x.ckpt").mkdir(parents=True)  # a folder of that name
    (tmp_path / "notes").mkdir()
    for path in (
        "run",
        "run/checkpoints",
        "run/checkpoints/step-00000003",
        "folder",
        "notes",
        "absent",
    ):
        assert not mindspore.detect(tmp_path / path), path


def test_what_is_of_this_format(tmp_path: Path) -> None:
    root = run(tmp_path / "out", "1_1")
    for suffix in (".ckpt", ".safetensors"):
        convert(random(), tmp_path / f"x{suffix}", to="mindspore")
        (tmp_path / suffix).mkdir()
        (tmp_path / suffix / "config.json").write_text("{}")  # as a converted tokenizer's folder has one
        shutil.copy(tmp_path / f"x{suffix}", tmp_path / suffix)
    for path in (root, root / "checkpoint", root / "checkpoint" / "rank_0", *tmp_path.glob(".*"), *tmp_path.glob("x*")):
        assert detect(path) == "mindspore", path


def test_a_foreign_ckpt_gets_a_sentence(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "lightning.ckpt")
    assert "cannot be read as a MindSpore checkpoint" in refusal(tmp_path / "lightning.ckpt")
    root = run(tmp_path / "out", "1_1")
    assert "give the folder that does" in refusal(root / "strategy", format="mindspore")
    refusal(root / "strategy" / "ckpt_strategy_rank_0.ckpt")


def test_values_pass_unchanged_whatever_they_are(tmp_path: Path) -> None:
    def odd(name: str, where: tuple[int | slice, ...], tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, float("nan")) if "w13" in name or "lm_head" in name else -0.0 * tensor

    source = Altered(random(CLUSTER), odd)
    mindspore.write(source, tmp_path / "x", degrees=FOUR)
    assert digest(opened(tmp_path / "x")) == digest(source)
