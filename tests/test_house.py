"""The plan of the house: which room may import which, and how large a file and a function may be."""

import ast

import pytest

from dlr.runs import project_root

ROOT = project_root()
FLOORS = [{"settings", "runs", "progress", "processes"}, {"routing"}, {"base"}, {"measure"},
          {"train", "bench", "explore", "figures"}, {"workbook"}, {"__init__", "__main__"}]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted((ROOT / "dlr").rglob("*.py"))


def room_of(module: str) -> str:
    """'dlr.routing.plan' is in the room routing; 'dlr.runs' is a room of its own."""
    return (module.split(".") + ["__init__"])[1]


def module_of(path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__") if name != "dlr.__init__" else "dlr"


MODULES = {module_of(path): path for path in FILES}


def imports_of(path) -> set[str]:
    """Modules of dlr that a file imports, wherever in the file it does so."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports by dots; write the module's whole name"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {part if part in MODULES else node.module for part in parts}
    return {name for name in imported if name in MODULES}


GRAPH = {module: imports_of(path) - {module} for module, path in MODULES.items()}


def test_imports_run_one_way():
    against = [f"{module} imports {other}" for module, others in GRAPH.items() for other in others
               if room_of(other) != room_of(module)
               and FLOOR_OF[room_of(other)] >= FLOOR_OF[room_of(module)]]
    assert not against, against
    assert len(FLOORS) <= 8
    assert len(GRAPH) > 50 and sum(map(len, GRAPH.values())) > 150, "imports were not read"


def test_no_circle():
    left = {module: set(others) for module, others in GRAPH.items()}
    while ready := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in ready}
    assert not left, f"these import one another: {sorted(left)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_is_one_idea(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300
    assert max(map(len, lines), default=0) <= 100
    long = [node.name for node in ast.walk(ast.parse("\n".join(lines)))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 50]
    assert not long, f"over 50 lines: {long}"


def test_a_room_says_what_it_is_for():
    for room in set.union(*FLOORS) - FLOORS[0] - {"__main__", "__init__"}:
        words = ast.get_docstring(ast.parse((ROOT / "dlr" / room / "__init__.py").read_text()))
        assert words and "import" in words, f"dlr/{room}/__init__.py: what is it for, what may it import?"


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
