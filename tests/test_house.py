"""The rules of `house.py` hold over the tree, and small bad examples prove that each can fail."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib

import pytest
from house import (
    HEAVY,
    LAYERS,
    LIGHT,
    ROOT,
    device_faults,
    heavy_faults,
    is_within,
    layer_faults,
    machine_faults,
    modules,
    python_files,
    size_faults,
    tracked,
    word_faults,
)

import ostro


def test_imports_run_downwards_only():
    known = modules()
    faults = [
        fault for name, path in known.items() for fault in layer_faults(path.read_text("utf-8"), name, set(known))
    ]
    assert not faults, "\n".join(faults)


KNOWN = {
    "ostro",
    "ostro.model",
    "ostro.model.moe",
    "ostro.model.layout",
    "ostro.data",
    "ostro.data.shards",
    "ostro.train",
}


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("ostro.serve.engine", "from ostro.train import train", "not below"),
        ("ostro.serve.engine", "def f():\n    import ostro.train", "not below"),
        ("ostro.evaluate", "from ostro import report", "not below"),
        ("ostro.weights.hf", "import importlib\nimportlib.import_module('ostro.serve')", "not below"),
        ("ostro.data.shards", "from ostro.model.layout import table", "not below"),
        ("ostro.data.shards", "from ..model import layout", "not below"),
        ("ostro.data.shards", "from ostro.log import console", "may not import"),
        ("ostro.data.shards", "def f():\n    import torch", "free of torch"),
        ("ostro.model.moe", "import numpy", "torch alone"),
        ("ostro.model.moe", "from torch import distributed", "one process"),
        ("ostro.model.moe", "import torch\ntorch.distributed.barrier()", "torch.distributed"),
        ("ostro.model.moe", "from ostro.config import Config", "may not import"),
        ("ostro.model.settings", "from ostro.model.moe import Moe", "not below"),
        ("ostro.device", "import torch.distributed as dist", "one process"),
        ("ostro.weights.hf", "from ostro.model import moe", "only layout and settings"),
        ("ostro.train", "import transformers", "never"),
        ("ostro.train", "from ostro import Mixtral", "no place"),
        ("ostro.utils", "", "no line"),
    ],
)
def test_layers_notice(module: str, source: str, fault: str):
    assert fault in "\n".join(layer_faults(source, module, KNOWN))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "ostro.train",
            "from ostro.data.shards import Shards\nfrom ostro import __version__\nimport torch.distributed",
        ),
        (
            "ostro.data.shards",
            "import numpy\nfrom ostro.data import sources\nfrom . import shards\nimport ostro.errors",
        ),
        (
            "ostro.model.moe",
            "import math\nimport torch\nfrom ostro import device\nfrom ostro.model import settings, layout",
        ),
        ("ostro.weights.hf", "from ostro.model.layout import table\nfrom ostro.weights import store"),
        ("ostro.config", "from ostro.model.settings import ModelConfig"),
    ],
)
def test_layers_let_pass(module: str, source: str):
    assert layer_faults(source, module, KNOWN | {"ostro.device", "ostro.model.settings", "ostro.weights.store"}) == []


def test_command_line_starts_fast():
    known = modules()
    for name in LIGHT:
        assert heavy_faults(known[name].read_text("utf-8"), name, set(known)) == []
    assert heavy_faults("import torch", "ostro.cli", set()) == ["ostro.cli line 1: torch is heavy"]
    assert heavy_faults("try:\n    from numpy import array\nexcept ImportError: pass", "ostro.cli", set())
    late = "def f():\n    import torch\nif TYPE_CHECKING:\n    import numpy"
    assert heavy_faults(late, "ostro.cli", set()) == []


def loaded_by(module: str) -> set[str]:
    """Return the top-level names in `sys.modules` after importing `module` in a fresh interpreter."""
    code = f"import {module}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("module", ["ostro", "ostro.cli"])
def test_nothing_heavy_is_loaded_before_a_verb_runs(module: str):
    assert loaded_by(module).isdisjoint(HEAVY)


def test_data_does_not_load_torch():
    names = [name for name in modules() if is_within(name, "ostro.data")]
    assert len(names) > 1
    assert "torch" not in loaded_by(", ".join(names))
    assert "torch" in loaded_by("ostro.device")


def test_exported_names_are_sorted_and_resolve():
    assert ostro.__all__ == sorted(ostro.__all__) == sorted(ostro._HOMES)
    for name in ostro.__all__:
        assert getattr(ostro, name) is getattr(importlib.import_module(ostro._HOMES[name]), name)
        assert f"ostro.{name}" not in modules()
    with pytest.raises(AttributeError, match="Mixtrall"):
        ostro.Mixtrall  # noqa: B018


def test_exported_names_are_known_to_type_checkers():
    tree = ast.parse((ROOT / "ostro/__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    homes = {a.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert homes == ostro._HOMES


def test_devices_are_named_in_one_file():
    faults = {
        name: device_faults(source)
        for name, source in python_files().items()
        if name.startswith("ostro/") and name != "ostro/device.py"
    }
    assert not any(faults.values()), faults
    assert device_faults((ROOT / "ostro/device.py").read_text("utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "torch.cuda.synchronize()",
        "x.cuda()",
        "import torch.cuda",
        "from torch import cuda",
        "device = 'cuda'",
        "device = f'cuda:{rank}'",
        "init(backend='cpu:gloo,cuda:nccl')",
        "backend = 'hccl'",
    ],
)
def test_device_words_are_noticed(source: str):
    assert device_faults(source)


def test_device_words_in_docstrings_and_prose_pass():
    assert device_faults('"""Runs on cuda."""\ndef f():\n    """nccl."""\n    return is_cuda("needs CUDA")') == []


def test_files_and_functions_stay_small():
    faults = [fault for name, source in python_files().items() for fault in size_faults(source, name)]
    assert not faults, "\n".join(faults)


def test_growth_is_noticed():
    assert size_faults("x = 1\n" * 499, "a.py") == []
    assert size_faults("x = 1\n" * 500, "a.py") == ["a.py has 500 lines"]
    function = "def _loop():\n" + "    x = 1\n" * 59
    assert size_faults(function, "a.py") == ["a.py::_loop has 60 lines"]
    assert size_faults(function, "ostro/train.py") == []
    assert size_faults("class A:\n    async def f():\n" + "        x = 1\n" * 59, "a.py")
    assert size_faults("def _loop():\n" + "    x = 1\n" * 89, "ostro/train.py") == [
        "ostro/train.py::_loop has 90 lines"
    ]


def test_no_unfinished_work_and_no_vague_names():
    faults = {name: word_faults(source) for name, source in python_files().items()}
    assert not any(faults.values()), {name: found for name, found in faults.items() if found}
    assert word_faults("x = 1  # TO" + "DO: y") == ["line 1: TO" + "DO"]
    assert word_faults("x = 1\nclass CacheManager: pass") == ["line 2: class CacheManager"]


def test_no_path_of_this_machine_and_no_registry():
    texts = {path: path.read_bytes().decode("utf-8", "ignore") for path in tracked()}
    assert ROOT / "pyproject.toml" in texts
    faults = {str(path.relative_to(ROOT)): machine_faults(text) for path, text in texts.items()}
    assert not any(faults.values()), {name: found for name, found in faults.items() if found}


def test_machine_paths_are_noticed():
    assert machine_faults("x\npath = '/wo" + "rk/main'") == ["line 2: /wo" + "rk/"]
    assert machine_faults("--index-url https://py" + "pi.org/simple")
    assert machine_faults("see net/wo" + "rk/a and https://pytorch.org") == []


def test_one_version_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert ostro.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_constraints_pin_everything_exactly():
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines), lines
    pinned = {line.partition("==")[0] for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wanted = project["build-system"]["requires"] + project["project"]["dependencies"]
    for extra in ("test", "dev", "tensorboard"):
        wanted += project["project"]["optional-dependencies"][extra]
    names = {re.split(r"[\[>=<]", requirement)[0] for requirement in wanted} - {"ostro"}
    assert names <= pinned, names - pinned


def test_architecture_draws_the_layers_that_count():
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    drawn = text.partition("```text\n")[2].partition("```")[0]
    assert tuple(tuple(line.split()) for line in drawn.splitlines()) == LAYERS


def test_documents_point_at_files_that_exist():
    mentioned = {
        (path.name, match[1])
        for path in [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
        for match in re.finditer(r"`((?:ostro|tests|benchmarks|docs)/[\w./]+?)(?:::\w+)?`", path.read_text("utf-8"))
    }
    assert len(mentioned) > 20
    assert not [(document, name) for document, name in mentioned if not (ROOT / name).exists()]
