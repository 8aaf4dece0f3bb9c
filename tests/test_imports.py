"""The package's modules import in one direction only, and every file fits in one reading."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "deltallava_jax"
# Low to high; a module imports from its own level and those below.
LEVELS = [
    ["arrays", "errors", "progress", "config", "sequence", "products", "kernels"],
    ["cli", "models", "parallel", "data"],
    ["training", "workdir", "convert"],
    ["load", "inference"],
    ["analysis", "evaluation", "apps"],
    ["__main__"],
]
APART = [{"data", "models"}]  # on one level, and neither imports the other
LINES = 400


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(file): file for file in sorted((ROOT / PACKAGE).rglob("*.py"))}
# "import deltallava_jax" imports load, so the package itself is of its level.
LEVEL = {name: number for number, names in enumerate(LEVELS, 1) for name in names} | {
    "": LEVELS.index(["load", "inference"]) + 1
}


def imported(module: str, source: str, known=FILES) -> set[str]:
    """The modules of the package that a module imports, at its top or inside functions; not for type checkers alone."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [base])])
            found.update(f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return {name for name in found if name.split(".")[0] == PACKAGE and name != module}


GRAPH = {module: imported(module, file.read_text()) for module, file in FILES.items()}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of nodes that reach each other."""
    reached = {}
    for start in graph:
        waiting = list(graph[start])
        reached[start] = set()
        while waiting:
            node = waiting.pop()
            if node not in reached[start]:
                reached[start].add(node)
                waiting += graph.get(node, ())
    found = []
    for node in graph:
        circle = {other for other in reached[node] if node in reached.get(other, ())}
        if circle and circle not in found:
            found.append(circle)
    return found


def folder_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Which folder imports from which one beside it. A folder and those inside it belong together."""
    folders = {module for module in FILES if FILES[module].name == "__init__.py"}

    def pairs(importer: str, other: str):
        a, b = importer.split("."), other.split(".")
        same = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        return ".".join(a[: same + 1]), ".".join(b[: same + 1])

    found = {folder: set() for folder in folders}
    for importer, others in graph.items():
        for other in others:
            mine, theirs = pairs(importer, other)
            if mine != theirs and {mine, theirs} <= folders and not mine.startswith(f"{theirs}."):
                if not theirs.startswith(f"{mine}."):
                    found[mine].add(theirs)
    return found


def part(module: str) -> str:
    """The part of the package that ``LEVELS`` names; "" for the package itself."""
    return module.removeprefix(PACKAGE).removeprefix(".").split(".")[0]


def test_every_part_of_the_package_has_a_level():
    assert {part(module) for module in FILES} == set(LEVEL)


def test_no_module_imports_itself_through_others():
    assert circles(GRAPH) == []


def test_no_folder_imports_one_that_imports_it():
    assert circles(folder_graph(GRAPH)) == []


def test_no_import_runs_upwards():
    for module, others in GRAPH.items():
        for other in others:
            assert LEVEL[part(other)] <= LEVEL[part(module)], f"{module} imports {other}, which is above it"


@pytest.mark.parametrize("pair", APART)
def test_packages_that_know_nothing_of_each_other(pair):
    for module, others in GRAPH.items():
        for other in others:
            assert {part(module), part(other)} != pair, f"{module} imports {other}"


def test_every_kind_of_import_counts():
    source = """
import deltallava_jax.load as load
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from deltallava_jax.apps import serve
def f():
    from deltallava_jax.models import decoder
    from . import vision
    from .layers import Linear
    from deltallava_jax.config import Config
"""
    names = ("load", "models.decoder", "models.vision", "models.layers", "config")
    assert imported("deltallava_jax.models.vlm", source) == {f"deltallava_jax.{name}" for name in names}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]


def test_files_fit_in_one_reading():
    files = [file for folder in (PACKAGE, "tests", "benchmarks", "configs") for file in (ROOT / folder).rglob("*.py")]
    long = {str(file.relative_to(ROOT)) for file in files if len(file.read_text().splitlines()) > LINES}
    assert not long, f"over {LINES} lines: {sorted(long)}"
