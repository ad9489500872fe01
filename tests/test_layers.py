"""Imports run one way, down the floors; nothing below `data` and `models` knows them; importing leanrec changes nothing outside it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import leanrec

PACKAGE = Path(leanrec.__file__).parent

# A room is a file or a folder of leanrec/; it may import itself and the rooms on the floors below it.
FLOORS = (
    {"ops", "data", "runs"},
    {"methods", "models"},
    {"bag"},
    {"embeddings", "compress", "move"},
    {"budget", "calibration", "dense", "report", "sensitivity", "storage"},
    {"merge", "recommender", "stream", "train", "evaluate"},
    {"export", "search", "serve", "tune"},
    {"bench", "demo"},
    {"__init__", "cli", "__main__"},
)
# On its own floor a room imports nothing, but for these.
NEIGHBOURS = {
    "data": {"runs"},
    "compress": {"embeddings"},
    "move": {"embeddings"},
    "budget": {"calibration"},
    "dense": {"budget"},
    "report": {"dense"},
    "storage": {"dense"},
    "train": {"recommender"},
    "evaluate": {"recommender"},
    "tune": {"search"},
    "cli": {"__init__"},
    "__main__": {"cli"},
}
# These work on any PyTorch model, so they know neither logs nor reference models.
ANY_MODEL = {
    "ops",
    "methods",
    "bag",
    "embeddings",
    "compress",
    "move",
    "budget",
    "calibration",
    "dense",
    "report",
    "sensitivity",
    "storage",
    "stream",
}
# These are held closer than their floor.
ONLY = {"ops": set(), "runs": set(), "methods": {"ops"}, "models": {"data"}}

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _allowed(room: str) -> set[str]:
    if room in ONLY:
        return ONLY[room] | {room}
    below = {other for other in FLOOR if FLOOR[other] < FLOOR[room]}
    return (below - ({"data", "models"} if room in ANY_MODEL else set())) | NEIGHBOURS.get(room, set()) | {room}


def _rooms(package: Path) -> set[str]:
    return {path.stem for path in package.iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))}


def _imported_rooms(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and room of every import of leanrec in a file, also inside functions and written relatively."""
    parents = ["leanrec", *path.relative_to(package).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        for module in _imported_modules(node, parents):
            top, *rest = module.split(".")
            if top == "leanrec":
                yield node.lineno, rest[0] if rest else "__init__"


def _imported_modules(node: ast.AST, parents: list[str]) -> list[str]:
    """Full names of the modules that a statement of a file in the package `parents` imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = parents[: len(parents) + 1 - node.level] if node.level else []
    module = ".".join([*base, *([node.module] if node.module else [])])
    if module != "leanrec":
        return [module]
    return [f"leanrec.{alias.name}" if alias.name in FLOOR else "leanrec" for alias in node.names]


def _violations(package: Path) -> list[str]:
    """Imports that go up or sideways, as `file:line: room imports room`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        for line, imported in _imported_rooms(path, package):
            if imported not in _allowed(room):
                found.append(f"{path.relative_to(package)}:{line}: {room} imports {imported}")
    return found


def _write(package: Path, name: str, source: str) -> Path:
    path = package / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return package


def test_every_file_and_folder_is_on_a_floor():
    assert _rooms(PACKAGE) - set(FLOOR) == set()


def test_imports_run_down_the_floors():
    assert _violations(PACKAGE) == []


@pytest.mark.parametrize("room", ["methods", "bag", "compress", "budget", "dense", "report", "storage", "stream"])
def test_what_serves_any_model_may_import_neither_data_nor_models(room):
    assert _allowed(room) & {"data", "models"} == set()


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("ops/kmeans.py", "from leanrec.methods.base import Table", "methods"),
        ("ops/kmeans.py", "import leanrec.data.schema as schema", "data"),
        ("compress.py", "def f():\n    from leanrec.models import build", "models"),
        ("compress.py", "from leanrec import bag, data", "data"),
        ("methods/pq.py", "from ..data import schema", "data"),
        ("methods/deep/er.py", "from ... import storage", "storage"),
        ("bag.py", "from .compress import compress", "compress"),
        ("report.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from leanrec.models import build", "models"),
        ("report.py", "from leanrec.storage import save", "storage"),
        ("train.py", "from leanrec import PQ", "__init__"),
        ("train.py", "import leanrec", "__init__"),
        ("models/fm.py", "from leanrec.methods import PQ", "methods"),
        ("bench.py", "import torch, leanrec.cli", "cli"),
    ],
)
def test_import_that_climbs_is_found_however_it_is_written(tmp_path, name, source, expected):
    violations = _violations(_write(tmp_path, name, source))
    assert [violation.split()[-1] for violation in violations] == [expected]
    assert violations[0].startswith(f"{name}:{len(source.splitlines())}: ")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("train.py", "from leanrec import runs\nfrom leanrec.ops.metrics import auc\nimport torch.nn"),
        ("data/prepare.py", "from leanrec import runs\nfrom .schema import Schema\nfrom . import batch"),
        ("methods/pq.py", "from ..ops.kmeans import kmeans\nfrom .base import Table"),
        ("cli/commands.py", "import leanrec\nfrom leanrec import train"),
        ("ops/kmeans.py", "import leanrec_of_another\nfrom data import x"),
    ],
)
def test_import_that_goes_down_is_allowed(tmp_path, name, source):
    assert _violations(_write(tmp_path, name, source)) == []


def test_unknown_room_is_named(tmp_path):
    assert _rooms(_write(tmp_path, "utils.py", "")) - set(FLOOR) == {"utils"}
    assert _rooms(_write(tmp_path, "common/deep/er.py", "")) - set(FLOOR) == {"utils", "common"}


def test_importing_all_of_leanrec_prints_nothing_and_changes_no_global_state():
    script = """
import importlib, logging, os, pkgutil, random, sys
import numpy, polars, pyarrow, rich.style, torch, typer  # what these do on import (rich draws a number) is theirs

def state():
    return (
        random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist(), torch.get_default_dtype(), torch.get_num_threads(),
        torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
        logging.root.level, list(logging.root.handlers), dict(os.environ), os.getcwd(), sys.getrecursionlimit(), sys.excepthook,
    )

before = state()
import leanrec
for module in pkgutil.walk_packages(leanrec.__path__, "leanrec."):
    if not module.name.endswith(("__main__", "fused_gpu")):  # the latter needs triton
        importlib.import_module(module.name)
assert state() == before, [pair for pair in zip(state(), before) if pair[0] != pair[1]]
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["--help"], ["torch", "polars", "numpy"]),
        (["train", "--help"], ["torch", "polars", "numpy"]),
        (["train"], ["torch", "polars", "numpy"]),
        (["prepare", "clicks.csv", "--kind", "tags=multivalued:|", "--split", "0.5,0.25,0.25", "--out", "out"], ["torch"]),
    ],
)
def test_what_needs_no_torch_does_not_wait_for_it(arguments, absent, tmp_path):
    """Help and mistakes are answered at once, and a log is prepared without torch."""
    rows = [f"{row % 2},u{row % 5},{row}.5,a|b" for row in range(40)]
    (tmp_path / "clicks.csv").write_text("\n".join(["label,user,price,tags", *rows]) + "\n")
    program = f"import sys; from leanrec.cli import run; code = run({arguments}); print([name for name in {absent} if name in sys.modules], code)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"[] {2 if arguments == ['train'] else 0}", done.stderr


def test_a_public_function_is_not_hidden_by_the_room_of_its_name():
    program = "import leanrec.compress, leanrec.report, leanrec.merge; print(*(leanrec.compress, leanrec.report, leanrec.merge), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["compress", "report", "merge"]


def test_rooms_are_there_after_leanrec_was_imported():
    program = "import leanrec; leanrec.methods.PQ; leanrec.recommender.open_run; leanrec.train.TrainSettings"
    subprocess.run([sys.executable, "-c", program], check=True)
