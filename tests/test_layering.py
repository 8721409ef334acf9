"""The house as its design draws it: who may import whom, and how big a room may be."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "jaxllm").rglob("*.py")) + sorted(
    (ROOT / "torch_ref").rglob("*.py")
)
LONGEST_FILE = 330

# A module may import from its own storey and from those below.
STOREYS = (
    ("jaxllm.fields",),
    ("jaxllm.compute", "jaxllm.guard", "jaxllm.parallel"),
    ("jaxllm.config",),
    ("jaxllm.presets",),
    ("jaxllm.kernels", "jaxllm.data"),
    ("jaxllm.model",),
    ("jaxllm.convert", "jaxllm.generate", "jaxllm.score"),
    ("jaxllm.train",),
    ("jaxllm.plan",),
)
WITHOUT_JAX = (
    "jaxllm.fields",
    "jaxllm.compute",
    "jaxllm.guard",
    "jaxllm.parallel",
    "jaxllm.config",
    "jaxllm.presets",
    "jaxllm.convert",
    "jaxllm.data",
)
JAX = ("jax", "jaxlib", "flax", "optax", "orbax")
TORCH = ("torch", "transformers", "torch_ref")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            found.add(node.module)
            # "from jaxllm.train import optim" imports jaxllm.train.optim.
            found |= {
                f"{node.module}.{alias.name}"
                for alias in node.names
                if node.module.startswith("jaxllm")
            }
    return found


def within(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


MODULES = {module_name(path): path for path in FILES}


def storey(name: str) -> int:
    return next(i for i, rooms in enumerate(STOREYS) if within(name, rooms))


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("jaxllm.")])
def test_jaxllm_imports_only_from_its_own_storey_and_below(name):
    for imported in imports(MODULES[name]):
        assert not within(imported, (*TORCH, "scripts", "parity_tests", "tests"))
        if within(name, WITHOUT_JAX):
            assert not within(imported, JAX), f"{name} must not import {imported}"
        if imported.startswith("jaxllm."):
            assert storey(imported) <= storey(name), f"{name} imports {imported}"


def test_the_reference_stands_on_its_own():
    assert not [i for i in imports(MODULES["torch_ref.k_model"]) if "jaxllm" in i]
    for name in MODULES:
        if name.startswith("torch_ref"):
            for imported in imports(MODULES[name]):
                assert not within(imported, JAX)
                if imported.startswith("jaxllm."):
                    assert within(imported, WITHOUT_JAX), f"{name} imports {imported}"


def test_imports_have_no_circles():
    graph = {
        name: {i for i in imports(path) if i in MODULES and i != name}
        for name, path in MODULES.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {error.args[1]}")


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("jaxllm")])
def test_no_file_outgrows_a_room(name):
    path = MODULES[name]
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{path} has {lines} lines: make it two rooms"


def test_the_twins_define_the_same_things_in_the_same_order():
    ours = definitions(ROOT / "jaxllm" / "model.py")
    theirs = definitions(ROOT / "torch_ref" / "k_model.py")
    # Ours keeps its configuration where PyTorch can read it too, and its attention
    # kernels need no repeated heads; a comment stands in that one's place.
    assert ours == [n for n in theirs if n not in ("ModelConfig", "repeat_kv")]


def definitions(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node.name
        for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        and not node.name.startswith("_")
    ]
