"""What a MindSpore cluster left behind: a folder a rank, strategy files that say who holds what, several steps."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ostro.errors import WeightsError
from ostro.weights.ckpt_file import CkptFile
from ostro.weights.hf_config import read_json
from ostro.weights.mapped import TensorFile
from ostro.weights.reshard import Box, GatheredFile, Shard, is_covered, whole
from ostro.weights.safetensors_file import SafetensorsFile
from ostro.weights.store import Hints, TensorInfo, Where, same_bits
from ostro.weights.strategy import Strategy, TensorLayout, read_strategies

SUFFIXES = (".ckpt", ".safetensors")
# AdamWeightDecay's, nn.Adam's, and those of the AdamW in mint.optim and mindspore.experimental.
OPTIMIZER_PREFIXES = (
    "adam_m.",
    "adam_v.",
    "moment1.",
    "moment2.",
    "vhat.",
    "exp_avg.",
    "exp_avg_sq.",
    "max_exp_avg_sq.",
)

_RANK = re.compile(r"rank_(\d{1,6})")
# {prefix}_rank_{r}-{epoch}_{step}; the prefix may hold dashes. In sink mode the epoch counts steps, the step is 1.
_STEP = re.compile(r".*-(\d{1,12})_(\d{1,12})")
_FOLDERS = ("checkpoint", "checkpoint_network")  # of MindFormers' output/; the second has the weights alone
_MAP = "param_name_map.json"  # of unified_safetensors: which of its parts has a tensor
_UNMAPPED = "hyper_param.safetensors"  # and what it found in no strategy, which the map leaves out
_SMALL_BYTES = 1 << 20  # copies of at most this size are compared whenever they are opened

Step = tuple[int, int]
"""Epoch and step within it, as a file's name has them; (-1, -1) for a name without."""

_NO_STEP = (-1, -1)


@dataclasses.dataclass(frozen=True)
class Gathered:
    """The tensors of all ranks, whole again; `certify` compares the copies that several ranks hold."""

    file: GatheredFile
    notes: list[str]
    certify: Callable[[], None]


class UnifiedFile:
    """The .safetensors parts of whole tensors that MindSpore's unified_safetensors writes, by their map, as one file.

    Raises WeightsError for a map that names what is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = read_json(path)
        map = content.get("weight_map", content)
        self.infos: dict[str, TensorInfo] = {}
        self._files: dict[str, SafetensorsFile] = {}
        opened: dict[str, SafetensorsFile] = {}
        for name, part in map.items() if isinstance(map, dict) else ():
            if not isinstance(part, str) or Path(part).name != part:
                raise WeightsError(f"{path} has {part!r} for the file of {name}: join the files again.")
            file = opened.get(part) or opened.setdefault(part, SafetensorsFile(path.parent / part))
            if name not in file.infos:
                raise WeightsError(f"{path} says that {name} is in {part}, which lacks it: join the files again.")
            self._add(name, file)
        if (path.parent / _UNMAPPED).is_file():
            rest = SafetensorsFile(path.parent / _UNMAPPED)
            for name in rest.infos:
                self._add(name, rest)

    def tensor(self, name: str, where: Where = ()) -> Tensor:
        """Return a tensor or a slice of it, a view of a file."""
        return self._files[name].tensor(name, where)

    def _add(self, name: str, file: SafetensorsFile) -> None:
        self.infos[name], self._files[name] = file.infos[name], file


def open_file(path: Path) -> CkptFile | SafetensorsFile | UnifiedFile:
    """Open a file of MindSpore's by its suffix, or the parts of a map."""
    if path.name == _MAP:
        return UnifiedFile(path)
    return SafetensorsFile(path) if path.suffix == ".safetensors" else CkptFile(path)


def rank_folders(path: Path) -> Path | None:
    """Return the folder of rank folders that a path stands for: one of them, a file in one, or all; None if none.

    A lone rank_0 without strategy files, as a merge leaves it, is not a cluster's.
    """
    if _RANK.fullmatch(path.name):
        around = path.parent
    elif path.is_file() and _RANK.fullmatch(path.parent.name):
        around = path.parent.parent
    else:
        around = next((f for f in (path, *(path / name for name in _FOLDERS)) if _ranks(f)), None)
    if around is None or not _ranks(around):
        return None
    return around if len(_ranks(around)) > 1 or _strategy_folder(around, Hints()) else None


def file_of(path: Path, step: int | None = None) -> Path:
    """Return the one file of the newest step, or of that asked for, that a path without a cluster's ranks stands for.

    It may be the map of a unified checkpoint. Raises WeightsError if there is none, or if there are several.
    """
    if path.is_file():
        return path
    if (path / _MAP).is_file():
        return path / _MAP
    files = files_in(path)
    if not files:
        raise WeightsError(f"{path} holds no .ckpt and no .safetensors file: give the folder that does.")
    steps = sorted(set(map(_step_of, files)), reverse=True)
    newest = _of_step(path, steps, step)[0]
    chosen = [file for file in files if _step_of(file) == newest]
    if len(chosen) > 1:
        raise WeightsError(
            f"{path} holds {len(chosen)} checkpoints, {chosen[0].name} and others: give one of the files."
        )
    return chosen[0]


def files_in(path: Path) -> list[Path]:
    """Return the files in a folder or else in its ranks, or else in those of MindFormers' folders in it."""
    places = ([path], *(list(_ranks(folder).values()) for folder in (path, *(path / name for name in _FOLDERS))))
    found = ([file for folder in folders for file in _files(folder)] for folders in places)
    return next(filter(None, found), [])


def gather(folder: Path, asked: Path, hints: Hints) -> Gathered:
    """Open what all ranks hold of the newest step that is whole on all of them, or of the step asked for.

    With `hints.partial` ranks may be missing, and what only they hold with them; then only one step may be there.
    Raises WeightsError for ranks that are missing, that disagree, or whose strategy files do not fit them.
    """
    place = hints.strategy or _strategy_folder(folder, hints)
    if place is None:
        raise WeightsError(
            f"{folder} holds the parts of {len(_ranks(folder))} ranks and no strategy files lie beside it: "
            "give MindFormers' output/strategy with --strategy."
        )
    strategies = read_strategies(place)
    ranks = _ranks(folder)
    if asked.is_file():
        held = {rank: _steps(path, path / _named_like(asked, rank)) for rank, path in ranks.items()}
        files, notes = _choose(folder, held, _step_of(asked))
    else:
        files, notes = _choose(folder, {rank: _steps(path) for rank, path in ranks.items()}, hints.step)
    places = [(stage, rank) for stage, strategy in strategies.items() for rank in range(strategy.num_ranks)]
    missing = [rank for rank in range(len(places)) if rank not in files]
    for stage in strategies:
        of_stage = [rank for rank, place in enumerate(places) if place[0] == stage]
        if not hints.partial and not any(rank in files for rank in of_stage):
            raise WeightsError(
                f"{folder} has none of the ranks {_listed(of_stage)}, which hold stage {stage}: copy them beside these."
            )
    parts = _Parts(folder, list(_placed(folder, files, strategies, places)))
    if not hints.partial:
        parts.require_covered(missing)
    elif missing and len(found := {step for rank in ranks.values() for step in _steps(rank)}) > 1:
        raise WeightsError(
            f"{folder} has a part of the ranks, and of {len(found)} steps; other hosts may have other ones: keep one."
        )
    if missing:
        rest = "only what these hold is here" if hints.partial else "others hold the same"
        notes.append(f"ranks {_listed(missing)} are missing; {rest}")
    notes.insert(
        0, f"{len(files)} ranks in {len(strategies)} {'stage' if len(strategies) == 1 else 'stages'} of {place}"
    )

    def certify() -> None:
        for file in files.values():
            if isinstance(file, CkptFile):
                file.check_crc()
        parts.check_copies()

    return Gathered(parts.gathered(), notes, certify)


@dataclasses.dataclass(frozen=True)
class _Part:
    """What one rank holds of one tensor."""

    name: str
    rank: int
    whole: TensorInfo
    box: Box
    file: TensorFile

    def read(self, where: Where = ()) -> Tensor:
        return self.file.tensor(self.name, where)


class _Parts:
    """All ranks' parts, each against the others."""

    def __init__(self, folder: Path, parts: list[_Part]) -> None:
        self._folder = folder
        self._copies: list[tuple[_Part, _Part]] = []
        self._found: dict[str, dict[Box, _Part]] = {}
        for part in parts:
            mine = self._found.setdefault(part.name, {})
            for other in mine.values():
                if other.whole != part.whole:
                    raise WeightsError(
                        f"{folder}: {part.name} is {_shown(other.whole)} by rank_{other.rank} and "
                        f"{_shown(part.whole)} by rank_{part.rank}: these are of different runs, or the strategy is."
                    )
                break
            if part.box in mine:
                self._copies.append((mine[part.box], part))
            else:
                mine[part.box] = part
        self._check(lambda part: part.file.infos[part.name].num_bytes <= _SMALL_BYTES)

    def gathered(self) -> GatheredFile:
        """Return the whole tensors."""
        infos, shards = {}, {}
        for name, parts in self._found.items():
            infos[name] = next(iter(parts.values())).whole
            shards[name] = [Shard(box, part.read) for box, part in parts.items()]
        return GatheredFile(self._folder, infos, shards)

    def check_copies(self) -> None:
        """Compare every copy with the first of it; WeightsError that names the ranks whose bits differ."""
        self._check(lambda part: True)

    def _check(self, is_chosen: Callable[[_Part], bool]) -> None:
        for first, copy in self._copies:
            if is_chosen(copy) and not same_bits(first.read(), copy.read()):
                raise WeightsError(
                    f"{self._folder}: rank_{first.rank} and rank_{copy.rank} should hold the same values of "
                    f"{copy.name} and do not: the files are of different steps or runs, or the strategy is."
                )

    def require_covered(self, missing: list[int]) -> None:
        """Raise WeightsError for a tensor of which a part is on no rank that is here."""
        for name, parts in self._found.items():
            info = next(iter(parts.values())).whole
            if not is_covered(info.shape, parts):
                held = sum(box.num_elements for box in parts)
                whose = f"the folders of ranks {_listed(missing)} are missing" if missing else "parts of it are missing"
                raise WeightsError(
                    f"{self._folder}: only {held} of the {whole(info.shape).num_elements} values of {name} are here, "
                    f"{whose}: copy them beside these."
                )


def _placed(
    folder: Path,
    files: Mapping[int, TensorFile],
    strategies: Mapping[int, Strategy],
    places: Sequence[tuple[int, int]],
) -> Iterator[_Part]:
    """Yield what each rank holds and which part of the whole it is; `places` are stage and rank within it, by rank."""
    for rank, file in files.items():
        if rank >= len(places):
            raise WeightsError(
                f"{folder} has a rank_{rank}, the strategy is for {len(places)} ranks: it is another run's, or "
                "stages are missing from it."
            )
        stage, local = places[rank]
        for name, info in file.infos.items():
            layout = _layout(name, strategies[stage].layouts)
            if layout is None or not info.shape:
                yield _Part(name, rank, info, whole(info.shape), file)
            else:
                try:
                    shape, box = layout.whole_shape(info.shape), layout.box(local, info.shape)
                except WeightsError as error:
                    raise WeightsError(f"{folder}/rank_{rank} holds {name}, but {error}") from None
                yield _Part(name, rank, TensorInfo(shape, info.dtype), box, file)


def _layout(name: str, layouts: Mapping[str, TensorLayout]) -> TensorLayout | None:
    """Return a tensor's layout; an optimizer's is that of its parameter, where it has none of its own."""
    if name in layouts:
        return layouts[name]
    for prefix in OPTIMIZER_PREFIXES:
        if name.startswith(prefix):
            return layouts.get(name.removeprefix(prefix))
    return None


def _choose(
    folder: Path, held: Mapping[int, Mapping[Step, Path]], asked: Step | int | None
) -> tuple[dict[int, TensorFile], list[str]]:
    """Return the files of the newest step that every rank holds whole, and what was passed over."""
    steps = sorted({step for files in held.values() for step in files}, reverse=True)
    if not steps:
        raise WeightsError(f"{folder} has rank folders without a .ckpt or .safetensors file: the run saved none there.")
    wanted = _of_step(folder, steps, asked)
    notes: list[str] = []
    for step in wanted:
        without = [rank for rank, files in held.items() if step not in files]
        try:
            if without:
                raise WeightsError(f"there is no file of it from rank {_listed(without)}")
            files: dict[int, TensorFile] = {rank: open_file(files[step]) for rank, files in held.items()}
        except WeightsError as error:
            reason = str(error).rstrip(".")
            if len(wanted) == 1:
                raise WeightsError(f"{folder}: step {_word(step)} is not whole on all ranks: {reason}.") from error
            notes.append(f"step {_word(step)} is passed over: {reason}")
            continue
        others = [s for s in steps if s < step and all(s in files_of for files_of in held.values())]
        said = [f"step {_word(step)}"] if step != _NO_STEP else []
        said += [f"also there on all ranks: step {', '.join(map(_word, others))}"] if others else []
        return files, said + notes
    raise WeightsError(f"{folder} holds no step that is whole on all ranks: {'; '.join(notes)}.")


def _of_step(folder: Path, steps: list[Step], asked: Step | int | None) -> list[Step]:
    """Return those of the steps that are meant: all, or the one asked for; WeightsError unless it is exactly one."""
    if asked is None:
        return steps
    wanted = [step for step in steps if asked in (step, step[0] if step[1] == 1 else step[1])]
    if len(wanted) != 1:
        raise WeightsError(
            f"{folder} holds {'several steps' if wanted else 'no step'} "
            f"{asked if isinstance(asked, int) else _word(asked)}; there are {', '.join(map(_word, steps))}: "
            "choose one of those, or name a file."
        )
    return wanted


def _steps(folder: Path, preferred: Path | None = None) -> dict[Step, Path]:
    """Return the newest file of each step in one rank's folder; `preferred` is of its step, if it is there."""
    found: dict[Step, Path] = {}
    for file in sorted(_files(folder), key=lambda file: (file == preferred, file.stat().st_mtime_ns, file.name)):
        found[_step_of(file)] = file
    return found


def _named_like(asked: Path, rank: int) -> str:
    """Return the name that a file of one rank has as another's: a run that starts again adds suffixes to its names."""
    own = asked.parent.name.removeprefix("rank_")
    return re.sub(rf"(rank_|checkpoint_){own}(?!\d)", rf"\g<1>{rank}", asked.name, count=1)


def _step_of(file: Path) -> Step:
    match = _STEP.fullmatch(file.stem)
    return (int(match[1]), int(match[2])) if match else _NO_STEP


def _ranks(folder: Path) -> dict[int, Path]:
    """Return the rank folders in a folder, by rank."""
    if not folder.is_dir():
        return {}
    named = ((_RANK.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file() and "strategy" not in p.name)


def _strategy_folder(folder: Path, hints: Hints) -> Path | None:
    """Return where the strategy files lie: as told, or in the folder `strategy` of the run."""
    if hints.strategy is not None:
        return hints.strategy
    around = (folder / "strategy", folder.parent / "strategy", folder.parent.parent / "strategy")
    return next((place for place in around if place.is_dir() and any(place.iterdir())), None)


def _word(step: Step) -> str:
    return f"{step[0]}_{step[1]}" if step != _NO_STEP else "unnumbered"


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _shown(info: TensorInfo) -> str:
    return f"{'×'.join(map(str, info.shape)) or 'a scalar'} of {str(info.dtype).removeprefix('torch.')}"
