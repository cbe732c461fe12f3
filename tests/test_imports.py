"""Imports point one way and never in a circle (the order is DESIGN's and CONTRIBUTING's)."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from data.corpora.icbhi import DEVICES, SITES

ROOT = Path(__file__).parents[1]
#: From the ground up; a room may import its own floor and those below it.
FLOORS = (
    {"utils.common"},
    {"data", "models"},
    {"utils.metrics", "utils.tracking"},
    {"utils.config"},
    {"utils.training"},
    {"utils.evaluation", "utils.figures"},
    {"utils.runs"},
    {"utils.predict", "utils.export", "utils.share", "utils.demo"},
    {"commands", "benchmarks", "experiments"},
)
#: Between rooms of one floor, and what data and models may know of each other.
FORBIDDEN = {("data", "models"), ("utils.evaluation", "utils.figures")}
MODELS_MAY_IMPORT = {"data.batch", "data.task"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_of(path): path
    for pattern in (
        "*.py",
        *(f"{d}/**/*.py" for d in ("data", "models", "utils", "benchmarks", "experiments")),
    )
    for path in ROOT.glob(pattern)
}


def room(module: str) -> str:
    first, *rest = module.split(".")
    if first == "utils" and rest:
        return f"utils.{rest[0]}"
    return (
        first if first in ("data", "models", "benchmarks", "experiments", "utils") else "commands"
    )


def imports(module: str) -> set[str]:
    """Modules of this repository that a module imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name in MODULES and name != module}


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


@pytest.mark.parametrize("module", sorted(m for m in MODULES if room(m) != "utils"))
def test_imports_point_down(module):
    own = room(module)
    for other in imports(module) - {"utils", "data", "models"}:
        there = room(other)
        assert floor(there) <= floor(own), f"{module} imports {other}, a room above its own"
        assert (own, there) not in FORBIDDEN, f"{module} imports {other}"
        if (own, there) == ("models", "data"):
            assert other in MODELS_MAY_IMPORT, f"{module} imports {other}"


ICBHI_ONLY = ("data.corpora", "data.synthetic", "data.task")


def test_no_module_spells_out_icbhis_devices_or_sites():
    names = {*DEVICES, *SITES}
    for module, path in MODULES.items():
        if module.startswith(ICBHI_ONLY):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in names, f"{path}:{node.lineno} names {node.value}"
            if isinstance(node, ast.alias | ast.Attribute):
                name = node.name if isinstance(node, ast.alias) else node.attr
                assert name not in ("DEVICES", "SITES"), f"{path}:{node.lineno} has the list"


#: Of the standard library, not on every system that torch runs on.
POSIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}


@pytest.mark.parametrize("folder", ["data", "models", "utils", "commands"])
def test_every_system_can_import(folder):
    """No module needs what Windows lacks when it is imported."""
    for module in (m for m in MODULES if room(m).partition(".")[0] == folder):
        tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
        for node in tree.body:
            named = [alias.name for alias in getattr(node, "names", []) if hasattr(alias, "name")]
            imported = {getattr(node, "module", None), *named} & POSIX
            assert not imported, f"{module} imports {imported}"
        used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not used & {"select.poll", "select.epoll", "os.fork"}, module


def test_no_circles():
    packages = {"data", "models", "utils"} | {
        m for m in MODULES if MODULES[m].name == "__init__.py"
    }
    graph = {module: imports(module) - packages for module in MODULES}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"circular imports: {' -> '.join(error.args[1])}")


def test_no_package_imports_its_commands():
    """`python -m package.command` would warn that the command was imported before it ran."""
    for module, path in MODULES.items():
        if "\nif __name__ ==" in path.read_text(encoding="utf-8"):
            parts = module.split(".")
            for package in (".".join(parts[:n]) for n in range(1, len(parts))):
                assert module not in imports(package), f"{package} imports {module}"
