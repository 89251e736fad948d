"""Pieces of a model on many ranks: saved at one layout, loaded at another, and no rank asks for more than its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from small_models import TINY, random
from torch import Tensor
from worlds import run_in_world

from ostro.degrees import Degrees, stage_of
from ostro.errors import WeightsError
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights import Hints, Reader, TensorInfo, Where, convert, digest, open_reader
from ostro.weights.mindspore_layout import MindSporeDegrees
from ostro.weights.parts import Held, hold, load_held, load_weights
from ostro.weights.reshard import Box
from ostro.weights.saver import Saver, every_name

MODEL = dataclasses.replace(TINY, num_local_experts=4, intermediate_size=12, vocab_size=50)  # ragged where fsdp cuts
LAYOUTS = (
    Degrees(),
    Degrees(fsdp=2),
    Degrees(dp=2),
    Degrees(pp=2),
    Degrees(fsdp=2, ep=2),
    Degrees(tp=2, etp=2),
    Degrees(fsdp=3),
    Degrees(fsdp=2, tp=2, ep=2, etp=2),
    Degrees(pp=2, fsdp=2, ep=2),
    Degrees(dp=2, cp=2, ep=2),
)
NORM = "model.model.norm.weight"
STATE = {"step": 3, "model": MODEL.as_fields(), "rng": "x"}


def full(salt: int = 0, model: ModelConfig = MODEL) -> dict[str, Tensor]:
    """Return all tensors of a run, whole."""
    weights, moments = random(model, seed=salt), random(model, seed=salt + 1)
    found = {f"model.{name}": weights.read(name) for name in weights.names()}
    for name in weights.names():
        found |= {
            f"optim.{name}.step": torch.tensor(float(salt)),
            f"optim.{name}.exp_avg": moments.read(name).bfloat16(),
            f"optim.{name}.exp_avg_sq": -moments.read(name),
        }
    return found


def cut(tensors: Mapping[str, Tensor], degrees: Degrees, rank: int, *, blank: bool = False) -> dict[str, Held]:
    """Return what a rank holds: of a parameter and its moments the same box, of the step all, of other stages none."""
    found = {}
    table = layout.table(MODEL)
    for name, tensor in tensors.items():
        parameter = table[
            name.removeprefix("model.").removeprefix("optim.").removesuffix(".step").partition(".exp_avg")[0]
        ]
        stage = 0 if parameter.kind is layout.EMBEDDING else degrees.pp - 1
        if parameter.layer is not None:
            stage = stage_of(parameter.layer, MODEL.num_hidden_layers, degrees.pp)
        if rank // (degrees.num_ranks // degrees.pp) != stage:
            continue
        shape = tuple(tensor.shape)
        box = ((), ())
        if shape:
            box = degrees.box(rank, parameter.kind.dims, shape, stage) or ((0,) * len(shape), (0, *shape[1:]))
        piece = tensor[Box(*box).where]
        if blank:
            piece = torch.full_like(piece, 7)
        found[name] = Held(piece, Box(*box), shape)
    return found


def _save(directory: Path, degrees: Degrees, salt: int, asynchronous: bool = False) -> int:
    saver = Saver(directory, 2, dist.group.WORLD, asynchronous=asynchronous)
    saver.save(3, cut(full(salt), degrees, dist.get_rank()), STATE)
    (saved,) = saver.finish()
    assert saved.error is None, saved.error
    return saved.step


def _load(folder: Path, degrees: Degrees, salt: int) -> None:
    wanted = full(salt)
    held = cut(wanted, degrees, dist.get_rank(), blank=True)
    assert load_held(folder, held, every_name(held, dist.group.WORLD)) == STATE
    for name, piece in held.items():
        assert torch.equal(piece.tensor, wanted[name][piece.box.where]), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[Degrees, Path]:
    """A checkpoint of each layout."""
    found = {}
    for number, degrees in enumerate(LAYOUTS):
        directory = tmp_path_factory.mktemp("saved")
        assert set(run_in_world(degrees.num_ranks, _save, directory, degrees, number, number % 2 == 1)) == {3}
        found[degrees] = directory / "step-00000003"
        assert [path.name for path in directory.iterdir()] == ["step-00000003"]
    return found


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("at", range(len(LAYOUTS)), ids=lambda at: str(LAYOUTS[at].num_ranks))
def test_what_one_layout_saves_another_loads(saved: dict[Degrees, Path], at: int) -> None:
    folder = saved[LAYOUTS[at]]
    for degrees in (LAYOUTS[at], LAYOUTS[(at + 3) % len(LAYOUTS)], LAYOUTS[(at + 7) % len(LAYOUTS)]):
        run_in_world(degrees.num_ranks, _load, folder, degrees, at)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in full().items()}
    torch_dcp.load(loaded, checkpoint_id=folder, no_dist=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in full(at).items())
    assert digest(open_reader(folder)) == digest(random(MODEL, seed=at))


@pytest.mark.parametrize("degrees", [Degrees(dp=2), Degrees(dp=2, cp=2, ep=2)], ids=lambda d: str(d.num_ranks))
def test_what_several_ranks_hold_is_written_once_and_by_turns(saved: dict[Degrees, Path], degrees: Degrees) -> None:
    files = sorted(saved[degrees].glob("*.distcp"))
    assert [file.name for file in files] == [f"__{rank}_0.distcp" for rank in range(degrees.num_ranks)]
    sizes = [file.stat().st_size for file in files]
    alone = (saved[Degrees()] / "__0_0.distcp").stat().st_size
    assert sum(sizes) < 1.5 * alone  # each item has a head of its own, and cut ones are more
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize(
    ("change", "names", "sentence"),
    [
        ({"extra": torch.ones(1)}, None, r"lacks 1 of the model's \d+ tensors, first extra"),
        ({NORM: None}, None, r"holds 1 tensor that the model does not have, first model.model.norm.weight"),
        ({NORM: None}, {"extra"}, r"lacks 1 of the model's \d+ tensors, first extra"),
        ({NORM: torch.ones(3)}, None, r"holds model.model.norm.weight with shape 16 where the model has 3"),
        ({NORM: torch.ones(16).half()}, None, r"as torch.float32, the run has it as torch.float16"),
    ],
)
def test_loading_is_exact_or_an_error(saved: dict[Degrees, Path], change: dict, names: Any, sentence: str) -> None:
    wanted = {name: tensor for name, tensor in (full() | change).items() if tensor is not None}
    every = set(full()) | names if names else None
    with pytest.raises(WeightsError, match=sentence + r".*: resume with the settings it was saved with\.$"):
        load_held(saved[Degrees(fsdp=3)], hold(wanted), every)


def test_a_rank_without_a_name_leaves_it_to_the_others(saved: dict[Degrees, Path]) -> None:
    mine = hold({NORM: torch.zeros(16)})
    assert load_held(saved[Degrees(pp=2)], mine, set(full())) == STATE
    assert torch.equal(mine[NORM].tensor, full(3)[NORM])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_that_dcp_itself_wrote_are_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000003"
    torch_dcp.save(full(5), checkpoint_id=folder, no_dist=True)
    (folder / "state.json").write_text("{}")
    filled = {name: torch.zeros_like(tensor) for name, tensor in full().items()}
    load_held(folder, hold(filled))
    assert all(torch.equal(filled[name], tensor) for name, tensor in full(5).items())


# Start weights


class Counted:
    """Another reader, and which elements of each tensor were asked for."""

    def __init__(self, source: Reader) -> None:
        self.format, self.model, self.notes = source.format, source.model, source.notes
        self._source = source
        self.asked = {name: torch.zeros(info.shape, dtype=torch.int32) for name, info in source.names().items()}
        self.largest = 0

    def names(self) -> Mapping[str, TensorInfo]:
        return self._source.names()

    def read(self, name: str, where: Where = ()) -> Tensor:
        self.asked[name][where] += 1
        self.largest = max(self.largest, self.asked[name][where].numel())
        return self._source.read(name, where)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same weights in every format."""
    folder = tmp_path_factory.mktemp("sources")
    found: dict[str, Any] = {"random": random(MODEL)}
    for name in ("hf", "mistral", "mindspore", "mindspore-gmm", "dcp"):
        convert(random(MODEL), folder / name, to=name)
        found[name] = folder / name
    convert(random(MODEL), folder / "ranks", to="mindspore", degrees=MindSporeDegrees(dp=4, ep=4, pp=2, opt=1))
    return found | {"ranks": folder / "ranks"}


@pytest.mark.parametrize("format", ["random", "hf", "mistral", "mindspore", "mindspore-gmm", "ranks", "dcp"])
def test_each_rank_asks_for_its_own_slices_of_the_start_weights(sources: dict[str, Any], format: str) -> None:
    whole = {name: random(MODEL).read(name) for name in random(MODEL).names()}
    for degrees in (Degrees(fsdp=2, tp=2, ep=2, etp=2), Degrees(pp=2, fsdp=3)):
        for rank in range(degrees.num_ranks):
            reader = Counted(sources[format] if format == "random" else open_reader(sources[format]))
            held = cut({f"model.{name}": tensor for name, tensor in whole.items()}, degrees, rank, blank=True)
            mine = {name.removeprefix("model."): piece for name, piece in held.items()}
            load_weights(reader, mine)
            for name, piece in mine.items():
                assert torch.equal(piece.tensor, whole[name][piece.box.where]), name
                asked = reader.asked[name]
                assert asked.sum() == asked[piece.box.where].sum() == piece.box.num_elements
            assert not any(counts.any() for name, counts in reader.asked.items() if name not in mine)
            assert reader.largest <= max(w[(0,) * (w.ndim - 2)].numel() for w in whole.values() if w.ndim > 1)


# Where there is no shared disk, a host has what its own ranks need


@pytest.mark.parametrize("to", ["mindspore", "dcp"])
def test_a_hosts_own_part_is_enough_to_start(tmp_path: Path, to: str) -> None:
    degrees = Degrees(pp=2, fsdp=2, ep=2)
    whole = {name: random(MODEL).read(name) for name in random(MODEL).names()}
    for host in (0, 1):
        mine: dict[str, Any] = {"degrees": degrees, "host": (host, 2)}
        if to == "mindspore":
            mine = {"degrees": MindSporeDegrees(dp=2, ep=2, pp=2, opt=1), "host_ranks": [2 * host, 2 * host + 1]}
        convert(random(MODEL), tmp_path / str(host), to=to, **mine)
        with pytest.raises(WeightsError):
            open_reader(tmp_path / str(host))
        hints = Hints(partial=True, model=MODEL) if to == "mindspore" else Hints(partial=True)
        for rank in range(4):
            reader = open_reader(tmp_path / str(host), hints)
            held = cut({f"model.{name}": tensor for name, tensor in whole.items()}, degrees, rank, blank=True)
            own = {name.removeprefix("model."): piece for name, piece in held.items()}
            if rank // 2 != host:
                with pytest.raises(WeightsError):
                    load_weights(reader, own)
                continue
            load_weights(reader, own)
            assert all(torch.equal(piece.tensor, whole[name][piece.box.where]) for name, piece in own.items())


def test_what_is_not_on_this_host_is_never_made_up(tmp_path: Path) -> None:
    convert(random(MODEL), tmp_path / "x", to="dcp", degrees=Degrees(fsdp=2), host=(0, 2))
    reader = open_reader(tmp_path / "x", Hints(partial=True))
    with pytest.raises(WeightsError, match=r"lm_head.weight: \d+ of \d+ values that were asked for are not here"):
        reader.read("lm_head.weight")


def test_a_part_of_the_ranks_may_have_one_step_only(tmp_path: Path) -> None:
    degrees = MindSporeDegrees(dp=2, ep=2, pp=2, opt=1)
    convert(random(MODEL), tmp_path / "x", to="mindspore", degrees=degrees, host_ranks=[0, 1])
    for rank in (0, 1):
        folder = tmp_path / "x" / "checkpoint" / f"rank_{rank}"
        (folder / f"checkpoint_{rank}-1_7.ckpt").write_bytes((folder / f"checkpoint_{rank}.ckpt").read_bytes())
    with pytest.raises(WeightsError, match="has a part of the ranks, and of 2 steps"):
        open_reader(tmp_path / "x", Hints(partial=True, model=MODEL))
