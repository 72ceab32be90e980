"""The rules of the house, read from the source: layers, heavy imports, printing, length, documented public names.

Every rule is a function of a folder that returns its violations as sentences, so that each is tested twice: on
diffspec, where it must find nothing, and on a small bad tree, where it must find what is wrong.
"""

import ast
import dataclasses
import gc
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "diffspec"

# A module may import from strictly lower layers. A room is a top-level module or a package with all its files.
LAYERS = (
    ("results", "parameters", "programs"),
    ("workload", "lengths", "hardware", "architecture", "chunks"),
    (
        *("acceptance_curves", "acceptance", "acceptance_decay", "experts"),
        *("batch_state", "drafters", "step_time", "staircase", "trees", "tree_search", "tree_shapes"),
        *("first_principles", "resources", "configuration", "request_cost", "company"),
    ),
    ("request_mix", "prediction", "steady_state", "break_even", "finite_runs", "waiting", "simulating"),
    ("serving", "latency_laws", "traces", "datasets"),
    ("latency_distribution",),
    ("percentiles", "collecting", "fitting", "analysis", "optimizing", "boundaries", "browser", "monitoring"),
    ("report", "demo"),
    ("cli",),
    ("__init__",),
)
LAYER_OF = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
# Layers whose rooms may also import those named before them in the same layer.
ORDERED_LAYERS = {LAYER_OF["step_time"], LAYER_OF["fitting"], LAYER_OF["demo"]}
# Third-party packages and the only rooms that may import them.
CONFINED = {
    "pandas": {"traces"},
    "aiohttp": {"collecting"},
    "matplotlib": {"report"},
    "rich": {"report", "cli"},
    "typer": {"cli"},
}
PRINTING_ROOMS = {"report", "cli"}
MAX_LINES = 400


def modules(package: Path) -> Iterator[tuple[Path, str, ast.Module]]:
    """Every Python file below `package` with its room and its syntax tree."""
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        gc.disable()  # what other tests left, finished inside ast.parse, is a SystemError in Python 3.11
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        finally:
            gc.enable()
        yield path, room, tree


def imported_names(tree: ast.Module, path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Absolute dotted names that a file imports anywhere, also inside functions: (line, "diffspec.fitting.solve")."""
    folder = (package.name, *path.parent.relative_to(package).parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            start = ".".join((*above, *([node.module] if node.module else [])))
            for alias in node.names:
                yield node.lineno, f"{start}.{alias.name}"


def room_of_import(name: str, package: Path) -> str | None:
    """Room that an absolute dotted name leads to: the package's own names count as __init__; None is third party."""
    parts = name.split(".")
    if parts[0] != package.name:
        return None
    if len(parts) > 1 and ((package / parts[1]).is_dir() or (package / f"{parts[1]}.py").is_file()):
        return parts[1]
    return "__init__"


def may_import(importer: str, imported: str) -> bool:
    if importer == imported or LAYER_OF[imported] < LAYER_OF[importer]:
        return True
    layer = LAYER_OF[importer]
    same = LAYER_OF[imported] == layer and layer in ORDERED_LAYERS
    return same and LAYERS[layer].index(imported) < LAYERS[layer].index(importer)


def layers_kept(package: Path) -> list[str]:
    found = []
    for path, room, tree in modules(package):
        where = path.relative_to(package.parent)
        if room not in LAYER_OF:
            found.append(f"{where}: '{room}' has no layer; give it one in LAYERS of tests/test_house.py")
            continue
        for line, name in imported_names(tree, path, package):
            target = room_of_import(name, package)
            if target in LAYER_OF and not may_import(room, target):
                found.append(f"{where}:{line}: layer {LAYER_OF[room]} imports {name} of layer {LAYER_OF[target]}")
    return found


def heavy_packages_confined(package: Path) -> list[str]:
    return [
        f"{path.relative_to(package.parent)}:{line}: imports {name}; only {sorted(CONFINED[root])} may"
        for path, room, tree in modules(package)
        for line, name in imported_names(tree, path, package)
        if (root := name.split(".")[0]) in CONFINED and room not in CONFINED[root]
    ]


def nothing_prints(package: Path) -> list[str]:
    return [
        f"{path.relative_to(package.parent)}:{node.lineno}: print(); only {sorted(PRINTING_ROOMS)} may"
        for path, room, tree in modules(package)
        if room not in PRINTING_ROOMS
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def annotations_are_evaluated(package: Path) -> list[str]:
    return [
        f"{path.relative_to(package.parent)}:{line}: with this import jaxtyping does not check the fields of classes"
        for path, _, tree in modules(package)
        for line, name in imported_names(tree, path, package)
        if name == "__future__.annotations"
    ]


def modules_are_short(package: Path) -> list[str]:
    return [
        f"{path.relative_to(package.parent)}: {lines} lines, at most {MAX_LINES}"
        for path in sorted(path for suffix in ("py", "js", "css") for path in package.rglob(f"*.{suffix}"))
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    ]


RULES: tuple[Callable[[Path], list[str]], ...] = (
    layers_kept,
    heavy_packages_confined,
    nothing_prints,
    annotations_are_evaluated,
    modules_are_short,
)


@pytest.mark.parametrize("rule", RULES)
def test_diffspec_keeps_the_rule(rule):
    violations = rule(PACKAGE)
    assert not violations, "\n".join(violations)


# A grammar of bad trees: rule, {file: source}, a part of the one sentence it must produce.
BAD_TREES = [
    (layers_kept, {"parameters.py": "import diffspec.workload", "workload.py": ""}, "layer 0 imports"),
    (
        layers_kept,
        {"serving.py": "def f():\n    from diffspec.fitting import solve", "fitting/__init__.py": ""},
        "serving.py:2",
    ),
    (layers_kept, {"serving.py": "from diffspec import cli", "cli/__init__.py": ""}, "layer 4 imports"),
    (layers_kept, {"workload.py": "from diffspec import __version__", "__init__.py": ""}, "of layer 9"),
    (layers_kept, {"fitting/solvers.py": "from ..report import tables", "report/tables.py": ""}, "layer 6 imports"),
    (layers_kept, {"waiting.py": "from . import steady_state", "steady_state.py": ""}, "layer 3 imports"),
    (layers_kept, {"experts.py": "from diffspec.step_time import Affine", "step_time.py": ""}, "layer 2 imports"),
    (layers_kept, {"fitting/a.py": "from diffspec.optimizing.b import c", "optimizing/b.py": ""}, "layer 6 imports"),
    (layers_kept, {"quantum.py": ""}, "'quantum' has no layer; give it one"),
    (heavy_packages_confined, {"serving.py": "def f():\n    import pandas as pd"}, "imports pandas; only ['traces']"),
    (heavy_packages_confined, {"cli/plot.py": "from matplotlib import pyplot"}, "only ['report']"),
    (heavy_packages_confined, {"fitting/a.py": "import rich.table"}, "imports rich.table"),
    (heavy_packages_confined, {"report/a.py": "import typer"}, "imports typer"),
    (nothing_prints, {"simulating/engine.py": "x = 1\nprint(x)"}, "engine.py:2: print()"),
    (annotations_are_evaluated, {"workload.py": "from __future__ import annotations"}, "workload.py:1"),
    (modules_are_short, {"workload.py": "x = 1\n" * (MAX_LINES + 1)}, f"{MAX_LINES + 1} lines"),
    (modules_are_short, {"report/page.js": "x = 1\n" * (MAX_LINES + 1)}, f"{MAX_LINES + 1} lines"),
]


def grow(folder: Path, files: dict[str, str]) -> Path:
    package = folder / "diffspec"
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return package


@pytest.mark.parametrize(("rule", "files", "sentence"), BAD_TREES)
def test_each_rule_finds_its_violation(rule, files, sentence, tmp_path):
    violations = rule(grow(tmp_path, files))
    assert len(violations) == 1 and sentence in violations[0], violations


def test_each_rule_has_a_bad_tree():
    assert {rule for rule, _, _ in BAD_TREES} == set(RULES)


def test_a_good_tree_breaks_no_rule(tmp_path):
    files = {
        "__init__.py": "from diffspec.cli import app",
        "results.py": "import equinox",
        "experts.py": "from diffspec.acceptance import E",
        "acceptance.py": "from . import results",
        "step_time.py": "from diffspec.experts import load",
        "traces/tables.py": "import pandas\nfrom .schema import X\nfrom ..results import Y",
        "traces/schema.py": "# print(1)",
        "report/figures.py": "import matplotlib.pyplot\nimport rich\nprint(1)",
        "demo.py": "from diffspec.report.figures import draw",
        "cli/__init__.py": "import typer, rich\nfrom diffspec import demo, report",
        "workload.py": "x = 1\n" * MAX_LINES,
    }
    package = grow(tmp_path, files)
    assert [violation for rule in RULES for violation in rule(package)] == []


def undocumented(names: dict[str, object]) -> list[str]:
    """Names whose object has no docstring of its own; the signature that dataclass writes in its place is none."""
    found = []
    for name, value in names.items():
        if name.startswith("__"):  # __version__
            continue
        doc = getattr(value, "__doc__", None)
        generated = inspect.isclass(value) and dataclasses.is_dataclass(value) and doc == _dataclass_doc(value)
        if not (doc or "").strip() or generated:
            found.append(name)
    return found


def _dataclass_doc(cls: type) -> str:
    try:
        return cls.__name__ + str(inspect.signature(cls)).replace(" -> None", "")
    except (TypeError, ValueError):
        return cls.__name__


def test_undocumented_names_are_found():
    class Plain: ...

    class Documented:
        "Yes."

    class Inherits(Documented): ...

    @dataclasses.dataclass
    class Generated:
        rate: float
        length: int = 4

    def silent(): ...

    names = dict(Plain=Plain, Documented=Documented, Inherits=Inherits, Generated=Generated, silent=silent)
    assert undocumented(names) == ["Plain", "Inherits", "Generated", "silent"]


def test_the_strictness_of_conftest_is_on():
    import jax
    import jax.numpy as jnp

    from diffspec.results import outcome_name

    assert jnp.asarray(1.0).dtype == jnp.float64
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.float64)
    assert hasattr(outcome_name, "__wrapped__"), "the jaxtyping import hook did not see diffspec"


def test_every_public_name_resolves_and_is_documented():
    import diffspec

    assert diffspec.__all__, "diffspec exports nothing"
    assert len(set(diffspec.__all__)) == len(diffspec.__all__)
    rooms = {path.stem for path in PACKAGE.iterdir()}
    clash = rooms & set(diffspec.__all__)
    assert not clash, f"a public name and a module share the name, the module would hide it: {clash}"
    missing = [name for name in diffspec.__all__ if not hasattr(diffspec, name)]
    assert not missing, f"in __all__ but absent: {missing}"
    without = undocumented({name: getattr(diffspec, name) for name in diffspec.__all__})
    assert not without, f"public names without a docstring: {without}"


def test_import_alone_is_light():
    program = "import sys, diffspec; print(*sorted({'jax', 'pandas', 'matplotlib'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [], f"`import diffspec` also imports {run.stdout.split()}"
