"""The rules of the house, each a function from source text to a list of faults; `test_house.py` applies them.

Who imports whom, where devices are named, how big things get, what no file may hold.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Top to bottom. A module imports from lower lines and from its own room, never from another name of its line.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("verbs",),
    ("demo_lora",),
    ("demo",),
    ("doctor", "plan", "conversion", "migrate", "preparation", "training"),
    ("train",),
    ("step", "profiling", "interrupts"),
    ("evaluate", "report", "verify", "inspection", "resume", "checks", "samples", "spikes", "stopping"),
    ("serve",),
    ("parallel",),
    ("weights", "optim", "batch", "dataset"),
    ("model", "data"),
    ("config", "log"),
    ("sections",),
    ("degrees", "overrides", "trackers"),
    ("device", "model.settings"),
    ("errors", "machine"),
)
# What a room may import of Ostro beside itself, where that is less than everything below it.
ONLY = {
    "model": ("ostro.model.settings", "ostro.errors", "ostro.device"),
    "data": ("ostro.errors",),
}
WEIGHTS_FROM_MODEL = ("ostro.model.layout", "ostro.model.settings")
ONE_PROCESS = (
    "model",
    "data",
    "config",
    "sections",
    "degrees",
    "overrides",
    "log",
    "device",
    "model.settings",
    "errors",
    "machine",
)
NEVER = ("transformers", "peft", "mindspore", "mindformers", "vllm", "megatron", "llama_cpp")
HEAVY = (
    "torch",
    "numpy",
    "pydantic",
    "matplotlib",
    "tokenizers",
    "sentencepiece",
    "mistral_common",
    "tensorboard",
)
LIGHT = (
    "ostro",
    "ostro.__main__",
    "ostro.cli",
    "ostro.verbs",
    "ostro.verbs.options",
    "ostro.verbs.start",
    "ostro.verbs.training",
    "ostro.verbs.weights",
    "ostro.verbs.models",
)
DEVICE_WORDS = re.compile(r"\b(cuda|nccl|hccl)\b")
FILE_LINES = 500
FUNCTION_LINES = 60
LONGER_FUNCTIONS = {("ostro/train.py", "_loop"): 90}
# In parts, so that this file does not hold them.
MACHINE = re.compile(
    r"(?<![\w.])/(work|opt/pypi|opt/wheels)/" + r"|\bpy" + r"pi\.org|python" + r"hosted\.org|npm" + r"js\.(org|com)"
)
VAGUE = re.compile(r"(Manager|Helper|Helpers|Utils|Base|Handler)$")
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / "ostro").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def nodes(tree: ast.AST, at_import: bool = False) -> Iterator[ast.AST]:
    """Walk a tree; with `at_import` only what runs when the module is imported."""
    for child in ast.iter_child_nodes(tree):
        if at_import and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if at_import and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from nodes(child, at_import)


def imports(source: str, module: str, known: set[str], at_import: bool = False) -> Iterator[tuple[int, str]]:
    """Yield line and dotted target of each import, those inside functions and by `import_module` included.

    `from a import b` is a.b where that is one of the `known` modules or foreign, else a.
    """
    package = module if any(name.startswith(module + ".") for name in known) else module.rpartition(".")[0]
    for node in nodes(ast.parse(source), at_import):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                home = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
                start = f"{home}.{start}".rstrip(".")
            for alias in node.names:
                whole = f"{start}.{alias.name}"
                yield (
                    node.lineno,
                    whole if whole in known or not is_within(start, "ostro") or start == "ostro" else start,
                )
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.lineno, str(node.args[0].value)


def place(module: str) -> tuple[int, str] | None:
    """Return the line of LAYERS a module stands on (0 is the top) and its entry there."""
    name = module.removeprefix("ostro.")
    entries = [
        (len(entry), level, entry) for level, line in enumerate(LAYERS) for entry in line if is_within(name, entry)
    ]
    return max(entries)[1:] if entries else None


def layer_faults(source: str, module: str, known: set[str]) -> list[str]:
    """Return what `module` imports against the layers."""
    own = place(module)
    if module == "ostro":  # it re-exports lazily and may name every room
        return []
    if own is None:
        return [f"{module} stands on no line of LAYERS"]
    faults = []
    for line, target in imports(source, module, known):
        fault = _layer_fault(module, own, target)
        if fault:
            faults.append(f"{module} line {line}: {fault}")
    if own[1] in ONE_PROCESS and any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
        for node in nodes(ast.parse(source))
    ):
        faults.append(f"{module} uses torch.distributed")
    return faults


def _layer_fault(module: str, own: tuple[int, str], target: str) -> str | None:
    return _own_fault(module, own, target) if is_within(target, "ostro") else _foreign_fault(module, own[1], target)


def _own_fault(module: str, own: tuple[int, str], target: str) -> str | None:
    level, room = own
    if target == "ostro.__version__":
        return None
    other = place(target) if target != "ostro" else None
    if other is None:
        return f"{target} has no place; import from the module that defines it"
    if other[1] != room and other[0] <= level:
        return f"{target} is not below {module}"
    if room in ONLY and other[1] != room and target not in ONLY[room]:
        return f"{room} may not import {target}"
    if room == "weights" and is_within(target, "ostro.model") and target not in WEIGHTS_FROM_MODEL:
        return f"weights takes only layout and settings from model, not {target}"
    return None


def _foreign_fault(module: str, room: str, target: str) -> str | None:
    top = target.partition(".")[0]
    if top in NEVER:
        return f"{top} is never depended on"
    if room in ONE_PROCESS and is_within(target, "torch.distributed"):
        return f"{room} knows one process; {target} does not belong there"
    if room == "data" and top == "torch":
        return "data is free of torch"
    if top == "triton" and is_within(module, "ostro.model.kernels"):  # comes with torch where there is a GPU
        return None
    if room == "model" and top != "torch" and top not in sys.stdlib_module_names:
        return f"model needs torch alone, not {top}"
    return None


def heavy_faults(source: str, module: str, known: set[str]) -> list[str]:
    """Return what a module that must start fast imports at module level."""
    found = imports(source, module, known, at_import=True)
    return [f"{module} line {line}: {name} is heavy" for line, name in found if name.partition(".")[0] in HEAVY]


def device_faults(source: str) -> list[str]:
    """Return where a backend is named: in an attribute, an import, or a string that is no docstring."""
    tree = ast.parse(source)
    docstrings = {
        id(parent.body[0].value)
        for parent in [tree, *nodes(tree)]
        if isinstance(parent, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and parent.body
        and isinstance(parent.body[0], ast.Expr)
    }
    faults = []
    for node in nodes(tree):
        if isinstance(node, ast.Attribute) and DEVICE_WORDS.fullmatch(node.attr):
            faults.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            faults += [f"line {node.lineno}: {word!r}" for word in DEVICE_WORDS.findall(node.value)]
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and DEVICE_WORDS.search(ast.unparse(node)):
            faults.append(f"line {node.lineno}: {ast.unparse(node)}")
    return faults


def size_faults(source: str, name: str) -> list[str]:
    """Return the file and the functions that outgrew their budget."""
    num_lines = len(source.splitlines())
    faults = [f"{name} has {num_lines} lines"] if num_lines >= FILE_LINES else []
    for node in nodes(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length >= LONGER_FUNCTIONS.get((name, node.name), FUNCTION_LINES):
                faults.append(f"{name}::{node.name} has {length} lines")
    return faults


def word_faults(source: str) -> list[str]:
    """Return unfinished work and names that say nothing."""
    faults = [f"line {source[: m.start()].count(chr(10)) + 1}: {m[0]}" for m in UNFINISHED.finditer(source)]
    classes = (node for node in nodes(ast.parse(source)) if isinstance(node, ast.ClassDef))
    return faults + [f"line {node.lineno}: class {node.name}" for node in classes if VAGUE.search(node.name)]


def machine_faults(text: str) -> list[str]:
    """Return paths of the machine this was written on, and hosts of package registries."""
    return [f"line {text[: m.start()].count(chr(10)) + 1}: {m[0]}" for m in MACHINE.finditer(text)]


def tracked() -> list[Path]:
    """Return the files git tracks or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("this tree is no git checkout, so nothing says which files belong to it")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def python_files() -> dict[str, str]:
    """Return the text of every Python file of the project by its path."""
    paths = [path for folder in ("ostro", "tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths}
