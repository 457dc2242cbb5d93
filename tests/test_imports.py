"""Who may import whom, and what a bare import costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A room may import rooms of a later row, plus the neighbours named in SIDEWAYS.
ROWS = [
    {"cli", "bench"},
    {"train", "eval", "data"},
    {"peft", "models", "tuning"},
    {"nn"},
    {"ops"},
    {"kernels", "_C"},
]
SIDEWAYS = {"train": {"data", "eval"}, "eval": {"data"}}
LEVEL = {room: level for level, row in enumerate(ROWS) for room in row}
FILES = [
    path
    for folder in ("mmadapt", "kernels", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != ROOT / "mmadapt" / "__init__.py"
]


def module_name(path):
    """Dotted name of a source file, with kernels/ under its installed name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("mmadapt", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    parts = module.split(".")
    return "bench" if parts[0] == "bench" else ".".join(parts[1:2])


def imported_modules(path):
    """Every ``(line, dotted name)`` a file imports, at any depth; ``from a import b`` is a.b."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def ours(path):
    return [(n, m) for n, m in imported_modules(path) if m.split(".")[0] in ("mmadapt", "bench")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_to_the_right(path):
    room = room_of(module_name(path))
    if room not in LEVEL:
        assert room.startswith("_") or room == "", f"{room} is not a room"
        return
    for line, module in ours(path):
        target = room_of(module)
        if target not in LEVEL:  # the package itself and its root-level helpers
            continue
        allowed = target == room or target in SIDEWAYS.get(room, ()) or LEVEL[target] > LEVEL[room]
        assert allowed, f"{path.name}:{line}: {room} may not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_underscores_are_private_to_their_room(path):
    own = module_name(path)
    for line, module in ours(path):
        if room_of(module) == room_of(own):
            continue
        inner = module.split(".")[2:]
        private = [part for part in inner if part.startswith("_") and not part.startswith("__")]
        assert not private, f"{path.name}:{line}: {module} is private to {room_of(module)}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_kernels_import_torch_and_triton_only(path):
    for line, module in imported_modules(path):
        top = module.split(".")[0]
        fine = top in sys.stdlib_module_names | {"torch", "triton"}
        fine |= module.startswith("mmadapt.kernels.")
        assert fine, f"{path.name}:{line}: {module}"


def test_the_core_includes_no_torch_header():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    pattern = re.compile(r'#\s*include\s*[<"](torch|ATen|c10)')
    assert not [p.name for p in sources if pattern.search(p.read_text())]


FORBIDDEN = ("transformers", "peft", "accelerate", "pydantic", "omegaconf", "triton", "typer")


@pytest.mark.parametrize("imports", ["mmadapt", "mmadapt.ops", "mmadapt.nn"])
def test_a_bare_import_needs_torch_alone(imports):
    code = (
        f"import sys, torch\nbefore = set(sys.modules)\nimport {imports}\n"
        "print(*{m.partition('.')[0] for m in set(sys.modules) - before})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(result.stdout.split())
    assert "mmadapt" in loaded
    assert not loaded & set(FORBIDDEN)
