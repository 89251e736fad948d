"""One .bin, .pt or .pth file of PyTorch's: the tensors of a state dict, mapped into memory.

Nothing in it is executed: `torch.load` with `weights_only=True` knows tensors and plain containers and refuses
everything else.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ostro.errors import WeightsError
from ostro.weights.store import TensorInfo, Where

SUFFIXES = (".bin", ".pt", ".pth")


class PickleFile:
    """An open file: `infos` by name, and views of its tensors.

    Raises WeightsError for a file that is missing, truncated, older than PyTorch 1.6, or holds more than tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = {name: tensor.detach() for name, tensor in _load(path).items()}
        self.infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def tensor(self, name: str, where: Where = ()) -> Tensor:
        """Return a tensor or a slice of it, a view of the mapped file."""
        return self._tensors[name][where]


def _load(path: Path) -> dict[str, Tensor]:
    _require_stored(path)
    try:
        # A device of its own in the file would be asked for; the CPU is what a mapping can be.
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error}): check the path.") from error
    except Exception as error:  # a pickle can raise anything
        raise WeightsError(
            f"{path} cannot be read as tensors alone ({_brief(error)}): it is damaged, or holds objects that "
            "Ostro does not load; save its state dict as safetensors."
        ) from error
    # Trainers wrap the state dict; the wrapping is theirs, not the model's.
    for key in ("state_dict", "model", "module"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(
            f"{path} holds a {type(content).__name__} where a state dict is expected: give another file."
        )
    for name, value in content.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise WeightsError(f"{path} holds {name!r}, which is not a dense tensor: save the state dict alone.")
    return dict(content)


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu"


def _require_stored(path: Path) -> None:
    """Refuse what cannot be mapped: the pickles from before PyTorch 1.6, and archives that are compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise WeightsError(f"{path} is a compressed archive: PyTorch writes none; fetch or save it again.")
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error}): check the path.") from error
    except WeightsError:
        raise
    except Exception as error:  # zipfile checks little of what it parses
        raise WeightsError(
            f"{path} is not an archive as PyTorch writes it since 1.6 ({_brief(error)}): it is truncated, "
            "damaged or older; fetch it again, or load and save it with a current PyTorch."
        ) from error


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
