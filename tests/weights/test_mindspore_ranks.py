"""Ranks of a MindSpore cluster: against a slow cutter, and against what goes wrong on clusters."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from disk import on_a_full_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from mindformers_files import (
    CLUSTER,
    FOUR,
    equal,
    held,
    opened,
    rank_file,
    refusal,
    run,
    save,
    theirs,
)
from small_models import TINY, models, random
from torch import Tensor

from ostro.errors import ConfigError, LayoutError, WeightsError
from ostro.model.settings import ModelConfig
from ostro.weights import (
    CastReader,
    Hints,
    detect,
    digest,
    mindspore,
    mindspore_layout,
    mindspore_ranks,
    open_reader,
)
from ostro.weights.ckpt_file import write_ckpt
from ostro.weights.mindspore_layout import MindSporeDegrees
from ostro.weights.store import TensorInfo
from ostro.weights.stored import StoredReader
from ostro.weights.strategy import Strategy, read_strategies, write_merged, write_strategy

# Layouts


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ModelConfig, MindSporeDegrees]:
    """Draw a model and degrees that fit it, of at most sixteen ranks."""
    tp, ep, pp = (draw(st.sampled_from([1, 2, *more])) for more in ([], [4], [3]))
    dp = ep * draw(st.sampled_from([1, 2, 3]))
    degrees = MindSporeDegrees(dp, tp, ep, pp, opt=draw(st.integers(0, 1)), vocab=draw(st.integers(0, 1)))
    model = draw(models())
    model = dataclasses.replace(
        model,
        num_local_experts=ep * draw(st.integers(1, 2)),
        num_experts_per_tok=1,
        num_hidden_layers=pp * draw(st.integers(1, 2)),
        intermediate_size=model.intermediate_size * tp,
        num_attention_heads=model.num_attention_heads * tp,
        num_key_value_heads=model.num_key_value_heads * tp,
    )
    return model, degrees if degrees.num_ranks <= 16 else dataclasses.replace(degrees, dp=ep, pp=1)


def cut(name: str, whole: Tensor, rank: int, degrees: MindSporeDegrees, is_gmm: bool, threshold: int) -> Tensor:
    """Return what a rank of a stage holds, by the words of reference/seed_system.md §4.2, one slice after another."""
    dp, tp = divmod(rank, degrees.tp)
    repeats, which = degrees.dp * degrees.tp, rank  # all ranks hold what is not cut, and shard it in their order
    dim = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 1 + is_gmm, "w3": 1 + is_gmm, "w2": 2 - is_gmm}.get(
        name.split(".")[-2]
    )
    if name in ("model.tok_embeddings.embedding_weight", "lm_head.weight"):
        dim = 0 if degrees.vocab and whole.shape[0] % degrees.tp == 0 else None
    if dim is not None:
        whole = whole.chunk(degrees.tp, dim)[tp]
        repeats, which = degrees.dp, dp
    if ".ffn." in name:
        whole = whole.chunk(degrees.ep)[dp % degrees.ep]
        repeats, which = degrees.dp // degrees.ep, dp // degrees.ep
    if degrees.opt and whole.shape[0] % repeats == 0 and whole.nbytes >= threshold:
        whole = whole.chunk(repeats)[which]
    return whole.contiguous()


def stage_of(name: str, model: ModelConfig, degrees: MindSporeDegrees) -> int:
    if name.startswith("model.layers."):
        return int(name.split(".")[2]) // (model.num_hidden_layers // degrees.pp)
    return 0 if name.startswith("model.tok_") else degrees.pp - 1


@settings(max_examples=30)
@given(
    drawn=layouts(), is_gmm=st.booleans(), threshold=st.sampled_from([0, 100, 1 << 16]), dtype=st.sampled_from([2, 4])
)
def test_each_rank_holds_its_slices(
    drawn: tuple[ModelConfig, MindSporeDegrees], is_gmm: bool, threshold: int, dtype: int
) -> None:
    model, degrees = drawn
    source = CastReader(random(model), torch.float32 if dtype == 4 else torch.bfloat16)
    whole = theirs(source, is_gmm=is_gmm)
    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.object(mindspore_layout, "_OPT_THRESHOLD_BYTES", threshold),
    ):
        folder = Path(name) / "out"
        mindspore.write(source, folder, degrees=degrees, is_gmm=is_gmm)
        assert len(list(folder.glob("checkpoint/*"))) == degrees.num_ranks
        assert len(list(folder.glob("strategy/*"))) == degrees.pp
        for rank in range(degrees.num_ranks):
            stage, local = divmod(rank, degrees.dp * degrees.tp)
            mine = {n: t for n, t in whole.items() if stage_of(n, model, degrees) == stage}
            expected = {n: cut(n, t, local, degrees, is_gmm, threshold) for n, t in mine.items()}
            assert equal(held(folder / f"checkpoint/rank_{rank}/checkpoint_{rank}.ckpt"), expected)
        reader = open_reader(folder)
        assert isinstance(reader, StoredReader)
        reader.certify()
        assert (digest(reader), reader.format) == (digest(source), "mindspore-gmm" if is_gmm else "mindspore")


def test_the_threshold_of_the_shipped_yamls(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, vocab_size=1024)  # whose embedding, and nothing else, has 64 KiB
    mindspore.write(random(config), tmp_path / "x", degrees=MindSporeDegrees(dp=2, opt=1))
    found = held(rank_file(tmp_path / "x", 1))
    assert {n for n, t in found.items() if t.shape != theirs(random(config))[n].shape} == {
        "model.tok_embeddings.embedding_weight",
        "lm_head.weight",
    }


@pytest.mark.parametrize(
    ("degrees", "sentence"),
    [
        ({"dp": 4, "ep": 3}, "ep=3 does not divide dp=4: MindFormers' experts lie within dp; change one."),
        ({"dp": 3, "ep": 3}, "ep=3 does not divide num_local_experts=4: use ep 1, 2, 4."),
        ({"pp": 3}, "pp=3 does not divide num_hidden_layers=2: use pp 1, 2."),
        ({"tp": 4}, "tp=4 does not divide num_key_value_heads=2: use tp 1, 2."),
        ({"opt": 3}, "opt=3 must be 0 (not cut) or 1 (cut)."),
        ({"vocab": 4}, "vocab=4 must be 0 (not cut) or 1 (cut)."),
    ],
)
def test_degrees_that_do_not_fit(tmp_path: Path, degrees: dict[str, int], sentence: str) -> None:
    with pytest.raises(LayoutError) as caught:
        mindspore.write(random(CLUSTER), tmp_path / "x", degrees=MindSporeDegrees(**degrees))
    assert str(caught.value) == sentence
    assert not list(tmp_path.iterdir())


def test_tp_must_divide_the_experts_inner_dim(tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match=r"tp=2 does not divide intermediate_size=9: use tp 1, 3, 9\."):
        mindspore.write(
            random(dataclasses.replace(TINY, intermediate_size=9)), tmp_path / "x", degrees=MindSporeDegrees(tp=2)
        )


@pytest.mark.parametrize(("name", "qkv_concat"), [("x.ckpt", False), ("x.safetensors", False), ("x", True)])
def test_what_a_layout_cannot_be_written_as(tmp_path: Path, name: str, qkv_concat: bool) -> None:
    with pytest.raises(ConfigError, match="--layout writes folders, with q, k and v apart: name a folder"):
        mindspore.write(random(CLUSTER), tmp_path / name, degrees=FOUR, qkv_concat=qkv_concat)
    assert not list(tmp_path.iterdir())


def test_a_host_writes_its_own_ranks(tmp_path: Path) -> None:
    degrees = MindSporeDegrees(dp=2, tp=2, ep=2, pp=2)
    mindspore.write(random(CLUSTER), tmp_path / "all", degrees=degrees)
    for host, ranks in enumerate((range(4), range(4, 8))):
        mindspore.write(random(CLUSTER), tmp_path / f"{host}", degrees=degrees, host_ranks=ranks)
    for path in (tmp_path / "all").rglob("*"):
        if not path.is_file():
            continue
        place = path.relative_to(tmp_path / "all")
        rank = int(path.parent.name.removeprefix("rank_")) if path.parent.name.startswith("rank_") else None
        for host in (0, 1):
            there = tmp_path / f"{host}" / place
            assert there.exists() == (rank is None or rank // 4 == host)
            assert not there.exists() or there.read_bytes() == path.read_bytes()
    shutil.copytree(tmp_path / "1", tmp_path / "0", dirs_exist_ok=True)
    assert digest(opened(tmp_path / "0")) == digest(random(CLUSTER))


@pytest.mark.parametrize("degrees", [None, FOUR])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, degrees: MindSporeDegrees | None) -> None:
    source = random(CLUSTER)
    if degrees is None:
        for name in ("x.ckpt", "x.safetensors"):
            assert on_a_full_disk(20_000, mindspore.write, source, tmp_path / name)[0] == "OutOfMemory"
    kind, message = on_a_full_disk(5_000, lambda: mindspore.write(source, tmp_path / "x", degrees=degrees))
    assert kind == "OutOfMemory"
    assert message.endswith("free some space or choose another disk.")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    for name in ("x.ckpt", "x.safetensors"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(WeightsError, match="exists: choose another name"):
            mindspore.write(random(), tmp_path / name)
        assert (tmp_path / name).read_text() == "precious"
    with pytest.raises(WeightsError, match="exists and is not empty"):
        mindspore.write(random(CLUSTER), tmp_path, degrees=FOUR)


# Which step


def test_the_newest_step_is_taken(tmp_path: Path) -> None:
    root = run(tmp_path / "out", "9_1", "10_1", "2_1")
    for path in (root, root / "checkpoint", root / "checkpoint" / "rank_2"):
        reader = opened(path)
        assert digest(reader) == digest(random(CLUSTER, 1))
        assert "step 10_1" in reader.notes
        assert digest(opened(path, step=2)) == digest(random(CLUSTER, 2))
        assert "holds no step 3; there are 10_1, 9_1, 2_1: choose one of those" in refusal(path, step=3)
    file = root / "checkpoint" / "rank_1" / "mixtral-8x7b_rank_1-9_1.ckpt"
    assert digest(opened(file)) == digest(random(CLUSTER, 0))
    assert "is a file: leave it out" in refusal(file, step=9)


def test_epochs_have_steps_of_their_own(tmp_path: Path) -> None:
    root = run(tmp_path / "out", "1_20", "2_20", "2_10")
    assert digest(opened(root)) == digest(random(CLUSTER, 1))
    assert digest(opened(root, step=10)) == digest(random(CLUSTER, 2))
    assert "holds several steps 20; there are 2_20, 2_10, 1_20" in refusal(root, step=20)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("harm", "said"),
    [(cut_off, "mixtral-8x7b_rank_3-2_1.ckpt cannot be read"), (Path.unlink, "there is no file of it from rank 3")],
)
def test_a_step_that_is_not_whole_is_passed_over(tmp_path: Path, harm: Callable[[Path], None], said: str) -> None:
    root = run(tmp_path / "out", "1_1", "2_1")
    harm(root / "checkpoint" / "rank_3" / "mixtral-8x7b_rank_3-2_1.ckpt")
    reader = opened(root)
    assert digest(reader) == digest(random(CLUSTER, 0))
    assert "step 1_1" in reader.notes
    assert any(note.startswith("step 2_1 is passed over: ") and said in note for note in reader.notes)
    message = refusal(root, step=2)
    assert "step 2_1 is not whole on all ranks: " in message
    assert said in message
    harm(root / "checkpoint" / "rank_0" / "mixtral-8x7b_rank_0-1_1.ckpt")
    assert "holds no step that is whole on all ranks: step 2_1 is passed over" in refusal(root)


def test_a_run_that_was_started_again(tmp_path: Path) -> None:
    root = run(tmp_path / "out", "5_1")
    run(tmp_path / "again", "5_1", "6_1")
    for file in (tmp_path / "again" / "checkpoint").glob("*/*"):  # MindSpore adds _1, where the first run's name is
        stem = file.name.replace("-5_1", "_1-5_1").replace("-6_1", "_1-6_1")
        tensors = held(file)
        if "5_1" in stem:
            tensors["model.norm_out.weight"] = tensors["model.norm_out.weight"] * 3
        os.utime(save(root / "checkpoint" / file.parent.name / stem, tensors), (9, 9))
    assert digest(opened(root)) == digest(random(CLUSTER, 1))
    assert opened(root, step=5).read("model.norm.weight")[0] == 3  # of two the newer
    folder = root / "checkpoint" / "rank_2"
    assert digest(opened(folder / "mixtral-8x7b_rank_2-5_1.ckpt")) == digest(random(CLUSTER, 0))
    assert opened(folder / "mixtral-8x7b_rank_2_1-5_1.ckpt").read("model.norm.weight")[0] == 3


def test_ranks_without_files(tmp_path: Path) -> None:
    root = run(tmp_path / "out", "1_1")
    for file in root.glob("checkpoint/*/*"):
        file.unlink()
    assert "has rank folders without a .ckpt or .safetensors file" in refusal(root, format="mindspore")


# What ranks hold


def change(path: Path, name: str, to: Callable[[Tensor], Tensor]) -> None:
    tensors = held(path)
    save(path, tensors | {name: to(tensors[name])})


def nudge(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[-1] += 1e-3
    return changed


def test_ranks_that_disagree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = run(tmp_path / "out", "1_1")
    file = rank_file(root, 2)
    sound = file.read_bytes()
    for name, other in (("model.norm_out.weight", 0), ("model.layers.1.attention.wo.weight", 0)):
        change(file, name, nudge)
        message = refusal(root)
        assert f"rank_{other} and rank_2 should hold the same values of {name} and do not" in message
        file.write_bytes(sound)
    change(file, "model.norm_out.weight", Tensor.bfloat16)
    assert "model.norm_out.weight is 16 of float32 by rank_0 and 16 of bfloat16 by rank_2" in refusal(root)
    file.write_bytes(sound)
    change(file, "model.layers.0.attention.wq.weight", lambda tensor: tensor[:4])
    assert "wq.weight is 16×16 of float32 by rank_0 and 8×16 of float32 by rank_2" in refusal(root)
    # Large copies are compared when the reader is asked to certify.
    file.write_bytes(sound)
    change(file, "model.norm_out.weight", nudge)
    monkeypatch.setattr(mindspore_ranks, "_SMALL_BYTES", 0)
    reader = open_reader(root, Hints(model=CLUSTER))
    assert isinstance(reader, StoredReader)
    with pytest.raises(WeightsError, match=r"rank_0 and rank_2 should hold the same values of model\.norm_out"):
        reader.certify()


def test_ranks_of_different_steps_are_found_by_their_scalars(tmp_path: Path) -> None:
    root = run(tmp_path / "out", "1_1")
    for rank in range(4):
        file = rank_file(root, rank)
        save(file, held(file) | {"global_step": torch.tensor([5 + rank // 3], dtype=torch.int32)})
    assert "rank_0 and rank_3 should hold the same values of global_step" in refusal(root)


def test_a_missing_rank(tmp_path: Path) -> None:
    root = run(tmp_path / "out", "1_1", degrees=MindSporeDegrees(dp=4, tp=2, ep=2))
    for rank in (1, 4, 6):  # of whose parts rank 5, 0 and 2 have copies
        shutil.rmtree(root / "checkpoint" / f"rank_{rank}")
        assert digest(opened(root)) == digest(random(CLUSTER))
    shutil.rmtree(root / "checkpoint" / "rank_0")  # the experts of tp 0, ep 0
    message = refusal(root)
    assert "only 480 of the 640 values of model.layers.0.feed_forward.ffn.w1.weight are here" in message
    assert message.endswith("the folders of ranks 0, 1, 4, 6 are missing: copy them beside these.")


def test_more_ranks_than_the_strategy_has(tmp_path: Path) -> None:
    root = run(tmp_path / "out", "1_1", degrees=MindSporeDegrees(tp=2, pp=2))
    (root / "strategy" / "ckpt_strategy_rank_2.ckpt").unlink()
    assert "has a rank_2, the strategy is for 2 ranks" in refusal(root)


def test_a_foreign_strategy(tmp_path: Path) -> None:
    root = run(tmp_path / "out", "1_1")
    other = run(tmp_path / "other", "1_1", degrees=MindSporeDegrees(dp=4, ep=4))
    assert "do not: the files are of different steps or runs, or the strategy is" in refusal(
        root, strategy=other / "strategy"
    )
    foreign = theirs(random(CLUSTER)) | {"model.norm_out.weight": torch.ones(2, 8)}
    for rank in range(4):
        save(rank_file(root, rank), {"model.norm_out.weight": foreign["model.norm_out.weight"]})
    message = refusal(root)
    assert "rank_0 holds model.norm_out.weight, but a tensor of shape [2, 8] cannot be cut" in message


def test_strategies_elsewhere_or_nowhere(tmp_path: Path) -> None:
    root = run(tmp_path / "out", "1_1")
    moved = (root / "strategy").rename(tmp_path / "elsewhere")
    for path in (root, root / "checkpoint", root / "checkpoint" / "rank_1", rank_file(root, 1)):
        message = refusal(path)
        assert "holds the parts of 4 ranks and no strategy files lie beside it" in message
        assert message.endswith("give MindFormers' output/strategy with --strategy.")
        assert digest(opened(path, strategy=moved)) == digest(random(CLUSTER))
    write_merged(tmp_path / "merged.ckpt", read_strategies(moved))
    assert digest(opened(root, strategy=tmp_path / "merged.ckpt")) == digest(random(CLUSTER))
    assert "cannot be read" in refusal(root, strategy=tmp_path / "absent")


def test_a_parameter_that_the_strategy_leaves_out_is_whole(tmp_path: Path) -> None:
    root = run(tmp_path / "out", "1_1")
    strategy = read_strategies(root / "strategy")[0]
    left = {name: layout for name, layout in strategy.layouts.items() if "norm" not in name}
    assert len(left) == len(strategy.layouts) - 5
    write_strategy(root / "strategy" / "ckpt_strategy_rank_0.ckpt", Strategy(0, left), 1)
    assert digest(opened(root)) == digest(random(CLUSTER))


def test_safetensors_of_ranks_with_redundancy_removed(tmp_path: Path) -> None:
    root = run(tmp_path / "out", "3_1", degrees=MindSporeDegrees(dp=4, tp=2, ep=2, pp=2))
    seen: set[tuple[int, str, bytes]] = set()
    for rank in range(16):
        file, mine = rank_file(root, rank), {"epoch_num": torch.tensor(3)}
        for name, tensor in held(file).items():
            key = (rank // 8, name, tensor.contiguous().view(torch.uint8).numpy().tobytes())
            if key not in seen:
                mine[name] = tensor
            seen.add(key)
        save(file.with_suffix(".safetensors"), mine)
        file.unlink()
    assert list(held(rank_file(root, 7))) == ["epoch_num"]
    for path in (root, root / "checkpoint", root / "checkpoint" / "rank_7", rank_file(root, 7)):
        assert detect(path) == "mindspore"
        assert digest(opened(path)) == digest(random(CLUSTER))


def test_a_checksum_of_a_rank_is_looked_at(tmp_path: Path) -> None:
    root = run(tmp_path / "out", "1_1")
    file = rank_file(root, 3)
    tensors = {name: tensor.clone() for name, tensor in held(file).items()}
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_ckpt(file, infos, lambda name: [tensors[name]], crc=True)
    assert digest(opened(root)) == digest(random(CLUSTER))
    expert = tensors["model.layers.1.feed_forward.ffn.w1.weight"].numpy().tobytes()
    data = bytearray(file.read_bytes())
    data[data.index(expert)] ^= 1  # in no copy, as no other rank has this part
    file.write_bytes(data)
    assert "has the checksum" in refusal(root)


# Damage


@settings(max_examples=40)
@given(data=st.data())
def test_damage_is_a_sentence(data: st.DataObject) -> None:
    """Cut off, a run is the same model or refused; with bytes changed, which may be values, it is read or refused."""
    with tempfile.TemporaryDirectory() as name:
        root = run(Path(name) / "out", "1_1", degrees=MindSporeDegrees(tp=2, pp=2))
        file = data.draw(st.sampled_from(sorted(root.rglob("*.ckpt"), reverse=True)).map(str).map(Path), label="file")
        content = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, min(len(content) - 1, 2000)), label="at")
        is_cut = data.draw(st.booleans(), label="cut off")
        if is_cut:
            del content[at:]
        else:
            content[at] ^= data.draw(st.integers(1, 255), label="bits")
        file.write_bytes(content)
        with contextlib.suppress(WeightsError):
            found = digest(opened(root))
            assert not is_cut or found == digest(random(CLUSTER))
