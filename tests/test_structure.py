"""The rules of the house: sizes, and imports that go one way."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "alter_demo"
MODULES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [  # a module imports from its own layer and from those above it in this list
    {"errors", "options", "callbacks", "files"},
    {"data"},
    {"models"},
    {"alter"},
    {"baselines"},
    {"config"},
    {"evaluation", "inspection"},
    {"stopping", "record", "run_folder", "run", "unlearn"},
    {"experiments"},
    {"app", "lessons"},
    {"cli", "__main__"},
]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def lines_of(paths) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def layer_of(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name.split(".")[0] in layer)


def internal_imports(path: Path):
    """Dotted names, below the package, of what a module imports from the package."""
    parts = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parts[: len(parts) - node.level + 1]
            if node.module or base:
                yield ".".join([*base, *([node.module] if node.module else [])])
            else:
                yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_is_short_and_its_functions_take_few_parameters(path):
    assert lines_of([path]) <= 350
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            names = [a.arg for a in arguments if a.arg not in ("self", "cls")]
            assert len(names) <= 7, f"{node.name}{names}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path):
    if path.name == "__init__.py" and path.parent == PACKAGE:
        return  # its imports are lazy, by name
    for name in internal_imports(path):
        assert layer_of(name) <= layer_of(name_of(path)), f"{name_of(path)} imports {name}"


def test_the_method_is_read_in_an_evening():
    files = [PACKAGE / "unlearn.py", *(PACKAGE / "alter").glob("*.py")]
    assert lines_of(files) <= 2180  # 1,600 without the gate's bank


def test_the_package_does_not_grow():
    assert lines_of(MODULES) <= 11_520
