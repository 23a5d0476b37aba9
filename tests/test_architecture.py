# SPDX-License-Identifier: Apache-2.0
"""Imports point one way (docs/ARCHITECTURE.md): cli, what it wires, what that is made of, the formulas."""

from __future__ import annotations

import ast
import importlib
import inspect
import shutil
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import lrconvert

PACKAGE = Path(lrconvert.__file__).parent

# From the top down: a module may import its own level and those below. Every module has a place here; the longest name
# that fits counts.
LEVELS: tuple[set[str], ...] = (
    {"cli", "__main__"},
    {"api"},
    {"extending"},
    {"searching", "evals", "parity", "hub", "recipe.importing", "recipe.models", "recipe.schema"},
    {"training", "targets"},
    {"artifact", "engines", "runtimes", "reference"},
    {"checkpoint"},
    {"families"},
    {"recipe"},
    {"rope", "errors", "machine", "precision", "progress", "shortage", "temporary", "writing", "data", "__init__"},
)
# What the levels alone would allow: (who, must not import, except).
FORBIDDEN: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("parity", "targets", ()),
    ("parity", "recipe.importing", ()),
    ("searching", "recipe.importing", ()),
    ("reference", "rope", ()),
    ("reference", "recipe", ()),
    ("reference", "engines", ()),
    ("families", "rope", ()),
    ("searching", "parity", ()),
    ("runtimes", "artifact", ()),
    # These run where lrconvert is not installed.
    *((f"runtimes.{path.stem}", "", ()) for path in sorted((PACKAGE / "runtimes").glob("*worker*.py"))),
    ("targets.hf.modeling_longrope", "", ()),
)


def within(module: str, package: str) -> bool:
    return not package or module == package or module.startswith(f"{package}.")


def imports_of(path: Path, module: str) -> tuple[tuple[int, str], ...]:
    """Line and name, without `lrconvert.`, of every import of the package: at any depth, relative too,
    and by `import_module` of a plain string."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    return _imports_in(path.read_text(encoding="utf-8"), tuple(package))


@cache
def _imports_in(text: str, package: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
    """Of a module of `package`; the many copies of the package differ in one file only."""
    return tuple(_found_in(ast.parse(text), package))


def _found_in(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["lrconvert", *package][: len(package) + 2 - node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        for name in names:
            if name == "lrconvert" or name.startswith("lrconvert."):
                yield getattr(node, "lineno", 0), name.partition(".")[2] or "__init__"


def level_of(module: str) -> int | None:
    found = [(len(name), number) for number, level in enumerate(LEVELS) for name in level if within(module, name)]
    return max(found)[1] if found else None


def violations(root: Path) -> list[str]:
    """Every import of the package under `root` that points the wrong way, and modules without a level."""
    tops = {path.stem for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    found = [f"{top} has no level" for top in sorted(tops) if level_of(top) is None]
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        # The package itself exports the API, each verb when it is used; what others import of it is its version.
        own = 0 if module == "__init__" else level_of(module)
        for line, name in imports_of(path, module):
            # `from lrconvert import __version__` names a value of the package itself.
            imported = name if name.partition(".")[0] in tops else "__init__"
            where = f"{path.relative_to(root)}:{line} imports {imported}"
            other = level_of(imported)
            if own is not None and other is not None and other < own:
                found.append(f"{where}, which is above")
            for who, what, allowed in FORBIDDEN:
                excepted = any(within(imported, exception) for exception in allowed)
                if within(module, who) and within(imported, what) and not excepted:
                    found.append(f"{where}, which {who} must not")
    return found


def circles(root: Path) -> list[str]:
    """Modules under `root` that import each other, directly or through others: one line a circle, the names in order.
    Imports at any depth count, those for types included."""
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(root.rglob("*.py"))
    }
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        # `from lrconvert.recipe import Recipe` names a value: what is imported is the longest name that is a module.
        named = (imported for _, imported in imports_of(path, module))
        graph[module] = {found for name in named if (found := _longest_known(name, files)) not in (None, module)}
    together: dict[frozenset[str], str] = {}
    for module in graph:
        reached = _reachable(graph, module)
        if module in reached:
            circle = frozenset(other for other in reached if module in _reachable(graph, other))
            together[circle] = " <-> ".join(sorted(circle))
    return sorted(together.values())


def _longest_known(name: str, files: dict[str, Path]) -> str | None:
    parts = name.split(".")
    return next((found for end in range(len(parts), 0, -1) if (found := ".".join(parts[:end])) in files), None)


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Every module that `start` imports, directly or not."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for other in graph[waiting.pop()] - found:
            found.add(other)
            waiting.append(other)
    return found


def test_no_modules_import_each_other() -> None:
    assert circles(PACKAGE) == []


def test_imports_point_one_way() -> None:
    """Holds for every import at any depth, those for types included."""
    assert violations(PACKAGE) == []


def test_every_named_module_exists() -> None:
    """A rule about something that is gone would hold nothing."""
    named = {name for level in LEVELS for name in level} | {name for who, what, _ in FORBIDDEN for name in (who, what)}
    for name in named - {""}:
        path = PACKAGE / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), name


PLANTED = [
    ("rope.py", "import lrconvert.checkpoint", "rope.py:1 imports checkpoint, which is above"),
    ("errors.py", "from lrconvert import rope", None),  # one level: allowed
    ("errors.py", "from lrconvert.recipe import Recipe", "errors.py:1 imports recipe.Recipe, which is above"),
    (
        "recipe/file.py",
        "def f():\n    from ..artifact.staging import Staging",
        "artifact.staging.Staging, which is above",
    ),
    ("recipe/importing.py", "from lrconvert.checkpoint import locate", None),  # a place of its own
    ("checkpoint/base.py", "from ..targets import hf", "imports targets.hf, which is above"),
    ("checkpoint/__init__.py", "from ..cli import run", "imports cli.run, which is above"),
    ("checkpoint/base.py", "import lrconvert.artifact.manifest", "imports artifact.manifest, which is above"),
    ("artifact/card.py", "if TYPE_CHECKING:\n    from lrconvert.parity import verify", "parity.verify, which is above"),
    ("families/llama.py", "from importlib import import_module\nimport_module('lrconvert.cli')", "cli, which is above"),
    ("targets/hf/write.py", "import lrconvert.cli.hf as x", "imports cli.hf, which is above"),
    ("targets/hf/write.py", "from lrconvert.parity.verify import verify", "parity.verify.verify, which is above"),
    ("training/network.py", "from lrconvert import searching", "imports searching, which is above"),
    ("parity/cases.py", "def f():\n    import lrconvert.targets.hf", "imports targets.hf, which parity must not"),
    ("reference/decoder.py", "from lrconvert.rope import Tier", "which reference must not"),
    ("reference/rotation.py", "from lrconvert import recipe", "imports recipe, which reference must not"),
    ("reference/__init__.py", "from ..targets.hf import spelling", "which is above"),
    (
        "runtimes/transformers_worker.py",
        "import lrconvert",
        "imports __init__, which runtimes.transformers_worker must",
    ),
    ("runtimes/transformers_worker.py", "from .base import WorkerSession", "which runtimes.transformers_worker must"),
    ("targets/hf/modeling_longrope.py", "from lrconvert import rope", "which targets.hf.modeling_longrope must not"),
    ("newcomer.py", "", "newcomer has no level"),
    ("newcomers/__init__.py", "", "newcomers has no level"),
    ("cli/hf.py", "from lrconvert import __version__, rope, targets, parity", None),
]


CIRCLES = [
    ("rope.py", "from lrconvert import recipe", "recipe.file <-> recipe.forms <-> rope"),  # through recipe/__init__
    ("evals/figures.py", "def f():\n    from lrconvert.evals.scores import pack", "evals.figures <-> evals.scores"),
    ("evals/scores.py", "if TYPE_CHECKING:\n    from .earlier import EarlierRow", "evals.earlier <-> evals.scores"),
    ("evals/scores.py", "from lrconvert.evals.figures import Figure", None),  # one way
]


def planted(tmp_path: Path, file: str, code: str) -> Path:
    """A copy of the package in which `file` begins with `code`."""
    root = tmp_path / "lrconvert"
    shutil.copytree(PACKAGE, root, ignore=lambda folder, names: {n for n in names if n in ("data", "__pycache__")})
    path = root / file
    path.parent.mkdir(exist_ok=True)
    old = path.read_text() if path.exists() else ""
    path.write_text(code + "\n" + old.replace("from __future__ import annotations", ""))
    return root


@pytest.mark.parametrize(("file", "code", "expected"), CIRCLES)
def test_a_circle_is_found(file: str, code: str, expected: str | None, tmp_path: Path) -> None:
    """A planted one, at the top, inside a function, for types; and an import one way is none."""
    found = circles(planted(tmp_path, file, code))
    assert ([expected in text for text in found] == [True]) if expected else (found == []), found


@pytest.mark.parametrize(("file", "code", "expected"), PLANTED)
def test_the_check_can_fail(file: str, code: str, expected: str | None, tmp_path: Path) -> None:
    """A planted import is found in a copy of the package, and an allowed one is not."""
    found = violations(planted(tmp_path, file, code))
    assert ([expected in text for text in found] == [True]) if expected else (found == []), found


@pytest.mark.parametrize("target", ["hf", "gguf", "onnx"])
def test_the_api_takes_every_option_of_a_target(target: str) -> None:
    """What the command line can ask of a bake, Python can."""
    options = importlib.import_module(f"lrconvert.targets.{target}").Options
    function = getattr(importlib.import_module("lrconvert.api.baking"), target)
    missing = {field.name for field in fields(options)} - set(inspect.signature(function).parameters)
    assert not missing
