"""The import graph of the package: every import leads down a layer or stays in its folder, and there is no circle.

The graph is read from the sources, so imports within functions count as well.
"""

import ast
import graphlib
import importlib.util
from pathlib import Path

import pytest

import lfcc_kernels

ROOT = Path(lfcc_kernels.__file__).parent

# From top to bottom. A file or folder may import those below it, and a folder its own modules.
LAYERS = [
    {"cli"},
    {"bench"},  # measures `distill`
    {"distill", "info"},
    {"html"},
    {"__init__"},
    {"losses"},
    {"contrast"},
    {"distributed", "filters"},
    {"functional"},
    {"_checks"},
    {"ops"},
    {"backends"},
    {"files", "text", "version"},
]
DEPTH = {part: depth for depth, layer in enumerate(LAYERS) for part in layer}


def import_graph(root: Path) -> dict[str, set[str]]:
    """Imported modules of the package by module, as names relative to the package; a folder's is that of the folder."""
    files = {}
    for path in root.rglob("*.py"):
        files[".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = path
    graph = {}
    for module, path in files.items():
        package = ".".join(["lfcc_kernels", *path.relative_to(root).parent.parts])
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                names = {f"{origin}.{alias.name}" for alias in node.names}
                submodules = {name for name in names if name.removeprefix("lfcc_kernels.") in files}
                imported |= submodules | ({origin} if names - submodules else set())
        imported = {"__init__" if name == "lfcc_kernels" else name.removeprefix("lfcc_kernels.") for name in imported}
        graph[module] = imported & files.keys() - {module}
    return graph


def part(module: str) -> str:
    return module.partition(".")[0]


GRAPH = import_graph(ROOT)


def test_every_module_has_a_layer() -> None:
    assert {part(module) for module in GRAPH} == DEPTH.keys()


def test_the_graph_is_read() -> None:
    """An import of each form that occurs in the package."""
    assert "ops.info_nce" in GRAPH["functional"]  # from lfcc_kernels.ops import info_nce as ...
    assert "losses" in GRAPH["__init__"]  # from lfcc_kernels.losses import ...
    assert "distill.run_folder" in GRAPH["distill.report"]  # from .run_folder import ...
    assert "distill.data.readers" in GRAPH["distill.teacher_cache"]  # from .data.readers import ...
    assert "bench.command" in GRAPH["cli"]  # within a function


def test_no_import_leads_up() -> None:
    upward = [
        f"{module} imports {imported}"
        for module, imports in GRAPH.items()
        for imported in imports
        if part(imported) != part(module) and DEPTH[part(imported)] <= DEPTH[part(module)]
    ]
    assert not upward, "\n".join(sorted(upward))


def test_there_is_no_circle() -> None:
    graphlib.TopologicalSorter(GRAPH).prepare()


@pytest.mark.parametrize("text", ["torch.ops.lfcc", "lfcc_kernels.ops", "lfcc_kernels.functional"])
def test_no_backend_looks_up_what_a_higher_layer_registers(text: str) -> None:
    """Also in comments: a backend does not know the layers above it, except that ops register fakes for its schemas."""
    files = [path for path in (ROOT / "backends").rglob("*.py") if path.name != "schemas.py"]
    assert files and not [path.name for path in files if text in path.read_text()]
