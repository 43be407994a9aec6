"""The rules of the house: which way imports point, what is documented, how long a file gets, what no file may name."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "mar"
MAX_LINES = 420
FLOORS = (
    {
        "_native",
        "checkpoint",
        "compact",
        "config",
        "kernels",
        "objective",
        "precision",
        "processes",
        "quiet",
        "rounding",
        "surrogate",
        "weights",
    },
    {"engine", "mixer", "window", "neurons"},
    {"calibration", "model"},
    {"conversion", "insertion", "layers", "losses", "spikes", "teachers"},
    {"census", "data", "folder", "optimizer", "prompts", "recipe", "sources", "stages", "tasks", "trainlog"},
    {"adapter", "costs", "evaluate", "generate", "quickstart", "refinement", "report", "results", "steps", "train"},
    {"verbs"},
    {"cli"},
    {"", "__main__"},
)
"""From the ground up. A module may import from lower floors, and from its own as long as no cycle comes of it.

`_native` is compiled from csrc/.
"""

FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""Name below `mar` ("" is the package itself, "kernels.reference" a module in a folder) -> file."""

TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in MODULES.items()}
every_module = pytest.mark.parametrize("module", MODULES, ids=lambda name: name or "mar")


def room(module: str) -> str:
    """The file or folder of src/mar that a module lies in."""
    return module.split(".")[0]


def imported(module: str) -> set[str]:
    """Absolute names of all that `module` imports, inside functions and under TYPE_CHECKING too."""
    names: set[str] = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            is_package = MODULES[module].name == "__init__.py"
            here = ["mar", *filter(None, module.split("."))][: None if is_package else -1]
            base = (
                ".".join([*here[: len(here) - node.level + 1], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            names |= {
                f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else str(base) for alias in node.names
            }
    return names


def is_module(name: str) -> bool:
    return name in ("mar", "mar._native") or name.removeprefix("mar.") in MODULES


def imported_rooms(module: str) -> set[str]:
    """The rooms of src/mar that `module` imports from, other than its own."""
    ours = {name for name in imported(module) if name.split(".")[0] == "mar"}
    return {room(name.removeprefix("mar").removeprefix(".")) for name in ours} - {room(module)}


@every_module
def test_imports_point_downward(module: str) -> None:
    assert room(module) in FLOOR, (
        f"src/mar/{room(module)} has no floor; give it one in FLOORS of {Path(__file__).name}."
    )
    for target in imported_rooms(module):
        assert target in FLOOR, f"mar.{module} imports mar.{target}, which is not in the house."
        assert FLOOR[target] <= FLOOR[room(module)], f"mar.{module} imports mar.{target}, which lies above it."


def test_no_import_cycles() -> None:
    arrows: dict[str, set[str]] = {}
    for module in MODULES:
        arrows.setdefault(room(module), set()).update(imported_rooms(module))
    TopologicalSorter(arrows).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("module", [name for name in MODULES if room(name) == "kernels"])
def test_kernels_stand_alone(module: str) -> None:
    assert imported_rooms(module) == set()


def test_the_arrows_are_really_read() -> None:
    assert {"config", "neurons"} <= imported_rooms("mixer")
    assert {"mixer"} <= imported_rooms("model")


def test_every_import_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [entry for name, extra in project["optional-dependencies"].items() if name != "dev" for entry in extra]
    declared = {re.split(r"[\[<>=!~; ]", entry)[0].lower() for entry in [*project["dependencies"], *optional]}
    distributions = packages_distributions()
    for module in MODULES:
        for top in {name.split(".")[0] for name in imported(module)} - {"mar", "__future__"} - sys.stdlib_module_names:
            sources = {name.lower().replace("_", "-") for name in distributions.get(top, [top])}
            assert sources & declared, f"mar.{module} imports {top}, which pyproject.toml does not declare."


def test_importing_mar_does_not_import_torch() -> None:
    code = "import sys, mar; print(*(name for name in ('torch', 'transformers', 'datasets') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@every_module
def test_docstrings(module: str) -> None:
    tree = TREES[module]
    assert ast.get_docstring(tree), f"mar.{module} has no docstring."
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"mar.{module}.{node.name} has no docstring."


@every_module
def test_files_stay_short(module: str) -> None:
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"mar.{module} has {lines} lines; split it by subject."


FOLDERS = ("src", "tests", "docs", "benchmarks", "recipes", "examples", ".ci")
SUFFIXES = {"", ".cfg", ".html", ".ini", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ".yml"}
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|tmp|root|home|Users)(?![\w-])")
PACKAGE_HOST = re.compile(
    "|".join(map(re.escape, ("pypi.org", "pythonhosted.org", "npmjs.org", "download.pytorch.org", "deb.debian.org")))
)


def committed_files() -> list[Path]:
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    # In a git worktree .git is a file, with the path of the clone in it.
    beside = [path for path in ROOT.iterdir() if path.name not in ("LICENSE", ".git")]
    texts = [path for path in inside + beside if path.is_file() and path.suffix in SUFFIXES]
    return sorted(path for path in texts if "__pycache__" not in path.parts and path != Path(__file__))


@pytest.mark.parametrize("path", committed_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_names_a_machine_or_a_package_host(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for pattern in (MACHINE_PATH, PACKAGE_HOST):
        found = pattern.search(text)
        line = text[: found.start()].count("\n") + 1 if found else 0
        assert not found, f"{path.relative_to(ROOT)}:{line} names {found[0]!r}, which exists on some machines only."


@pytest.mark.parametrize("text", ['open("/home/ada/x")', "cd /tmp/x", "see /root/.cache"])
def test_machine_paths_are_recognised(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["~/home/x", "src/work/x", "s3://bucket/tmp/x", "a /workshop", "a /home-made"])
def test_other_paths_are_not_machine_paths(text: str) -> None:
    assert not MACHINE_PATH.search(text)
