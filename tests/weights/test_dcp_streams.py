"""Training checkpoints against torch.distributed.checkpoint itself: what either writes the other reads, and only
what a host needs goes to it."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from layouts import EXPERTS, SMALL, coordinates, cuts_of, held_indexes, held_mask, stages_of
from small_models import TINY, random
from torch import Tensor

from ostro.degrees import Degrees, host_ranks
from ostro.errors import LayoutError, WeightsError
from ostro.model import layout
from ostro.model.settings import ModelConfig
from ostro.weights import CastReader, convert, dcp, digest, open_reader
from ostro.weights.dcp_file import open_tensors
from ostro.weights.reshard import Box
from ostro.weights.store import pieces

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch")

PREFIX = dcp.WEIGHTS_PREFIX
# Sizes that no number of ranks from 2 to 4 divides everywhere.
RAGGED = ModelConfig(
    vocab_size=13,
    hidden_size=10,
    intermediate_size=7,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=2,
    num_local_experts=5,
    initializer_range=0.3,
)


def canonical(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return random weights by the names that DCP's files have for them."""
    reader = CastReader(random(config), dtype)
    return {PREFIX + name: reader.read(name) for name in reader.names()}


def with_state(folder: Path, config: ModelConfig) -> Path:
    (folder / "state.json").write_text(json.dumps({"model": config.as_fields()}))
    return folder


# Worlds of processes


def in_world(size: int, folder: Path, function: Callable[..., None], *args: Any) -> None:
    """Run `function(rank, *args)` in forked processes that talk over gloo; fail if one of them fails."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    processes = [
        context.Process(target=_rank, args=(send, rank, size, folder, function, args), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    send.close()
    told = []
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
            told.append("a rank did not end")
    while receive.poll():
        try:
            told.append(receive.recv())
        except EOFError:
            break
    assert not told, told
    assert all(process.exitcode == 0 for process in processes)


def _rank(send: Any, rank: int, size: int, folder: Path, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # the parent's threads are not in a forked child
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=size)
        function(rank, *args)
        dist.destroy_process_group()
    except BaseException as error:
        send.send(f"rank {rank}: {type(error).__name__}: {error}")
        raise


def _save_sharded(rank: int, folder: Path, config: ModelConfig, shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
    """Save every parameter as a DTensor, cut along `dims` of it where it has them."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", shape)
    state = {}
    for name, value in canonical(config).items():
        placements = [Shard(dim) if dim < value.dim() else Replicate() for dim in dims]
        state[name] = distribute_tensor(value, mesh, placements)
    torch_dcp.save(state, checkpoint_id=folder)


def _save_replicated(rank: int, folder: Path, config: ModelConfig) -> None:
    torch_dcp.save(canonical(config), checkpoint_id=folder)


# What Ostro writes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [TINY, RAGGED], ids=["tiny", "ragged"])
def test_torch_loads_what_convert_writes(tmp_path: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    convert(random(config), tmp_path / "x", to="dcp", dtype=dtype)
    wanted = canonical(config, dtype)
    loaded = {name: torch.full_like(value, 9) for name, value in wanted.items()}
    torch_dcp.load(loaded, checkpoint_id=tmp_path / "x", no_dist=True)
    for name, value in wanted.items():
        assert torch.equal(loaded[name], value), name


def test_torch_finds_exactly_our_tensors_in_it(tmp_path: Path) -> None:
    convert(random(), tmp_path / "x", to="dcp")
    metadata = torch_dcp.FileSystemReader(tmp_path / "x").read_metadata()
    assert list(metadata.state_dict_metadata) == [PREFIX + name for name in random().names()]


def test_torch_turns_what_convert_writes_into_one_file(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    convert(random(), tmp_path / "x", to="dcp")
    dcp_to_torch_save(tmp_path / "x", tmp_path / "x.pt")
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    flat = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Tensor):
            flat[prefix] = value
        else:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)

    walk("", found)
    for name, value in canonical(TINY).items():
        assert torch.equal(flat[name], value)


def test_ranks_load_what_convert_writes(tmp_path: Path) -> None:
    convert(random(RAGGED), tmp_path / "x", to="dcp")
    in_world(3, tmp_path, _load_sharded, tmp_path / "x", RAGGED)


def _load_sharded(rank: int, folder: Path, config: ModelConfig) -> None:
    from torch.distributed.tensor import Shard, init_device_mesh, zeros

    mesh = init_device_mesh("cpu", (3,))
    wanted = canonical(config)
    state = {name: zeros(value.shape, device_mesh=mesh, placements=[Shard(0)]) for name, value in wanted.items()}
    torch_dcp.load(state, checkpoint_id=folder)
    for name, value in wanted.items():
        assert torch.equal(state[name].full_tensor(), value), name


# What torch writes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_tensors_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    torch_dcp.save(canonical(RAGGED, dtype), checkpoint_id=tmp_path / "x", no_dist=True)
    reader = open_reader(with_state(tmp_path / "x", RAGGED))
    assert digest(reader) == digest(CastReader(random(RAGGED), dtype))


@pytest.mark.parametrize(
    ("mesh", "dims"),
    [((3,), (0,)), ((3,), (1,)), ((2,), (2,)), ((2, 2), (0, 1)), ((2, 2), (1, 1))],
)
def test_shards_are_read(tmp_path: Path, mesh: tuple[int, ...], dims: tuple[int, ...]) -> None:
    in_world(math.prod(mesh), tmp_path, _save_sharded, tmp_path / "x", RAGGED, mesh, dims)
    reader = open_reader(with_state(tmp_path / "x", RAGGED))
    assert len(list((tmp_path / "x").glob("*.distcp"))) == math.prod(mesh)
    assert digest(reader) == digest(random(RAGGED))
    for parameter in layout.parameters(RAGGED):
        whole = random(RAGGED).read(parameter.name)
        slices = [(slice(1, None, 2),), (-1,), (slice(0, 0),), (slice(None), *[1] * (whole.dim() - 1))]
        for where in [*pieces(parameter), *slices]:
            assert torch.equal(reader.read(parameter.name, where), whole[where]), (parameter.name, where)


def test_replicated_tensors_are_read(tmp_path: Path) -> None:
    in_world(2, tmp_path, _save_replicated, tmp_path / "x", RAGGED)
    assert digest(open_reader(with_state(tmp_path / "x", RAGGED))) == digest(random(RAGGED))


def test_a_run_of_many_ranks_goes_on_as_another_format(tmp_path: Path) -> None:
    in_world(2, tmp_path, _save_sharded, tmp_path / "x", RAGGED, (2,), (0,))
    convert(with_state(tmp_path / "x", RAGGED), tmp_path / "hf", to="hf")
    assert digest(open_reader(tmp_path / "hf")) == digest(random(RAGGED))


# Memory


def resident_bytes() -> dict[str, int]:
    """Return this process's memory of its own, and what of mapped files is in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {key: int(rest.split()[0]) << 10 for key, _, rest in (line.partition(":") for line in lines) if "Rss" in key}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the resident memory there")
def test_one_expert_of_a_large_stack_is_all_that_is_read(tmp_path: Path) -> None:
    stack = torch.zeros(100, 1024, 1024, dtype=torch.bfloat16)
    stack[37] = 3
    torch_dcp.save({"w2": stack}, checkpoint_id=tmp_path / "x", no_dist=True)
    del stack
    gc.collect()
    file = open_tensors(tmp_path / "x", "")
    before = resident_bytes()
    assert file.tensor("w2", (37,)).float().mean() == 3
    after = resident_bytes()
    expert_bytes = 1024 * 1024 * 2
    # fp32 for the mean is twice an expert; a read of all would be 200 MB.
    assert after["RssAnon"] - before["RssAnon"] < 10 * expert_bytes
    assert after["RssFile"] - before["RssFile"] < 10 * expert_bytes
    expert = file.tensor("w2", (37,))
    assert expert.untyped_storage().data_ptr() == file.tensor("w2", (38,)).untyped_storage().data_ptr()


# A host's part of a layout


LAYOUTS = [
    (Degrees(fsdp=4), TINY, 2),
    (Degrees(fsdp=3), RAGGED, 3),
    (Degrees(fsdp=2, tp=2, pp=2), TINY, 2),
    (Degrees(fsdp=2, tp=2, pp=2), TINY, 4),
    (Degrees(dp=2, fsdp=3, ep=3, pp=2), TINY, 4),
    (Degrees(fsdp=3, cp=2, tp=2, ep=3, etp=2), TINY, 3),
    (Degrees(fsdp=5, ep=5, pp=2), RAGGED, 2),
    (Degrees(fsdp=2, pp=3), dataclasses.replace(TINY, num_hidden_layers=3, tie_word_embeddings=True), 3),
]


def _id(entry: tuple[Degrees, ModelConfig, int]) -> str:
    d, _, num_hosts = entry
    return f"{' '.join(f'{name}{n}' for name, n in dataclasses.asdict(d).items() if n > 1)} on {num_hosts}"


@pytest.fixture
def no_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def dtensor(d: Degrees, rank: int, parameter: layout.Parameter) -> Any:
    """Return a parameter as the ranks of a stage hold it under FSDP2 over tensor and expert parallelism, all -1."""
    from torch.distributed.tensor import DeviceMesh, DTensor, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    is_expert = parameter.kind in EXPERTS
    per_stage = d.num_ranks // d.pp
    first = coordinates(d, rank, is_expert)["pp"] * per_stage
    sizes = (d.dp, d.efsdp, d.ep, d.etp) if is_expert else (d.dp, d.fsdp * d.cp, d.tp)
    mesh = DeviceMesh("cpu", torch.arange(first, first + per_stage).view(sizes))
    placements: list[Any] = [Replicate()] * len(sizes)
    if parameter.kind not in SMALL:
        *inner, (dim, _, _) = cuts_of(d, rank, parameter)
        split = math.prod(parts for other, parts, _ in inner if other == dim)
        fsdp = _StridedShard(dim, split_factor=split) if split > 1 else Shard(dim)
        placements = [Replicate(), fsdp, *([Shard(other) for other, _, _ in inner] or [Replicate()])]
    local = torch.full([len(indexes) for indexes in held_indexes(d, rank, parameter)], -1.0)
    return DTensor.from_local(
        local,
        mesh,
        placements,
        run_check=False,
        shape=torch.Size(parameter.shape),
        stride=torch.empty(parameter.shape, device="meta").stride(),
    )


@pytest.mark.usefixtures("no_group")
@pytest.mark.parametrize(("d", "config", "num_hosts"), LAYOUTS, ids=map(_id, LAYOUTS))
def test_the_ranks_of_a_host_load_their_part(tmp_path: Path, d: Degrees, config: ModelConfig, num_hosts: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for host in range(num_hosts):
        folder = tmp_path / str(host)
        convert(random(config), folder, to="dcp", degrees=d, host=(host, num_hosts))
        for rank in host_ranks(d.num_ranks, host, num_hosts):
            # A world in which nobody answers: whatever is loaded comes from the host's own folder.
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=d.num_ranks)
            stage = coordinates(d, rank, is_expert=False)["pp"]
            mine = [p for p in layout.parameters(config) if stage in stages_of(p, config, d.pp)]
            state = {PREFIX + p.name: dtensor(d, rank, p) for p in mine}
            torch_dcp.load(state, checkpoint_id=folder, no_dist=True)
            for parameter in mine:
                local = state[PREFIX + parameter.name].to_local()
                grids = torch.meshgrid(*held_indexes(d, rank, parameter), indexing="ij")
                assert torch.equal(local, random(config).read(parameter.name)[tuple(grids)]), (rank, parameter.name)
            dist.destroy_process_group()


@pytest.mark.parametrize(("d", "config", "num_hosts"), LAYOUTS, ids=map(_id, LAYOUTS))
def test_a_host_gets_what_its_ranks_need_and_no_more(
    tmp_path: Path, d: Degrees, config: ModelConfig, num_hosts: int
) -> None:
    for host in range(num_hosts):
        folder = tmp_path / str(host)
        convert(random(config), folder, to="dcp", degrees=d, host=(host, num_hosts))
        metadata = torch_dcp.FileSystemReader(folder).read_metadata()
        num_bytes = 0
        for parameter in layout.parameters(config):
            times = torch.zeros(parameter.shape, dtype=torch.int64)
            entry: Any = metadata.state_dict_metadata.get(PREFIX + parameter.name)
            for chunk in entry.chunks if entry is not None else ():
                times[Box(tuple(chunk.offsets), tuple(chunk.sizes)).where] += 1
            ranks = host_ranks(d.num_ranks, host, num_hosts)
            needed = torch.stack([held_mask(d, rank, parameter, config) for rank in ranks]).any(0)
            assert torch.equal(times, needed.long()), parameter.name
            stages = {coordinates(d, rank, is_expert=False)["pp"] for rank in ranks}
            assert (entry is None) == stages.isdisjoint(stages_of(parameter, config, d.pp))
            num_bytes += int(needed.sum()) * 4
        stored = sum(info.length for info in metadata.storage_data.values())
        assert stored == sum(file.stat().st_size for file in folder.glob("*.distcp"))
        with_headers = num_bytes + 2048 * len(metadata.storage_data)
        assert num_bytes <= stored <= with_headers
        state = json.loads((folder / "state.json").read_text())
        assert (state["host"], state["num_hosts"], Degrees(**state["layout"])) == (host, num_hosts, d)


def test_a_hosts_part_is_not_a_model(tmp_path: Path) -> None:
    convert(random(), tmp_path / "x", to="dcp", degrees=Degrees(fsdp=2, pp=2), host=(1, 2))
    with pytest.raises(WeightsError, match=r"holds only what host 1 of 2 needs: give the checkpoint that it was made"):
        open_reader(tmp_path / "x")


def test_a_layout_on_one_host_is_whole(tmp_path: Path) -> None:
    d = Degrees(dp=2, fsdp=3, ep=3, pp=2)
    convert(random(), tmp_path / "x", to="dcp", degrees=d)
    assert digest(open_reader(tmp_path / "x")) == digest(random())
    loaded = {name: torch.zeros_like(value) for name, value in canonical(TINY).items()}
    torch_dcp.load(loaded, checkpoint_id=tmp_path / "x", no_dist=True)
    assert all(torch.equal(loaded[name], value) for name, value in canonical(TINY).items())


def test_a_layout_that_does_not_fit_writes_nothing(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"degrees": Degrees(tp=3)}, "tp=3 does not divide num_key_value_heads=2"),
        ({"degrees": Degrees(fsdp=4), "host": (2, 2)}, "hosts are counted from 0 to 1"),
        ({"degrees": Degrees(fsdp=4), "host": (0, 3)}, "cannot be shared evenly by 3 hosts"),
    ]
    for settings_of, sentence in wrong:
        with pytest.raises(LayoutError, match=sentence):
            convert(random(), tmp_path / "x", to="dcp", **settings_of)
    assert list(tmp_path.iterdir()) == []
