"""Imports point one way, nowhere in a circle, and `import gligen` loads nothing heavy."""

from __future__ import annotations

import ast
import configparser
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "gligen").rglob("*.py"))
}
FOUNDATION = ("gligen.config", "gligen.modes", "gligen.files")  # what networks and mathematics may know besides
LAYERS = {
    "gligen.diffusion": ("gligen.diffusion", *FOUNDATION),
    "gligen.kernels": ("gligen.kernels", *FOUNDATION),
    "gligen.modules": ("gligen.modules", "gligen.kernels", *FOUNDATION),
    "gligen.grounding": (
        "gligen.grounding",
        "gligen.modules",
        "gligen.kernels",
        "gligen.request",
        "gligen.fields",
        "gligen.images",
        "gligen.image_files",
        *FOUNDATION,
    ),
    "gligen.device": (),
    "gligen.files": (),
    "gligen.image_files": (),
    "gligen.modes": (),
    "gligen.provenance": (),
}


def imported(path: Path) -> set[str]:
    """Our modules that a file imports when it is run, at its top or in a function; not those for types alone."""

    def nodes(tree: ast.AST) -> Iterator[ast.AST]:
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                continue
            yield node
            yield from nodes(node)

    found = set()
    for node in nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                found.add(whole if whole in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
    return found & set(MODULES)


GRAPH = {name: imported(path) - {name} for name, path in MODULES.items()}


def test_there_is_no_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_a_circle_would_be_found(tmp_path):
    (tmp_path / "a.py").write_text("def late():\n    from gligen.modes import Mode\n    return Mode\n")
    assert imported(tmp_path / "a.py") == {"gligen.modes"}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_knows_only_what_lies_below_it(layer):
    for name, needs in GRAPH.items():
        if name == layer or name.startswith(f"{layer}."):
            up = {need for need in needs if not need.startswith(LAYERS[layer] or ("-",))}
            assert not up, f"{name} imports {', '.join(sorted(up))}"


def test_importing_the_package_loads_nothing_heavy():
    script = "import sys, gligen; print(*(m for m in ('torch', 'open_clip', 'torchvision', 'PIL') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_opening_a_model_does_not_import_the_compiler():
    """It takes longer than anything else of a small run's start."""
    script = "import gligen, sys; gligen.load(device='cpu'); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_every_runtime_dependency_is_imported_by_the_package():
    """And what only tests import is not a dependency of whoever paints."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    wanted = {
        re.split(r"[^\w-]", line)[0]
        for line in config["options"]["install_requires"].splitlines()
        if line and not line.startswith("#")
    }
    modules = {"open_clip_torch": "open_clip", "pillow": "PIL", "pyyaml": "yaml"}
    text = "\n".join(path.read_text(encoding="utf-8") for path in MODULES.values())
    idle = [n for n in wanted if not re.search(rf"(import|from) {modules.get(n, n)}\b|\"{modules.get(n, n)}\b", text)]
    assert idle == []


@pytest.mark.parametrize("name", ["sample", "train", "evaluate", "weights"])
def test_console_commands_are_the_scripts(name: str) -> None:
    """What setup.cfg calls gligen-NAME exists, takes no arguments, and gives an exit status."""
    declared = configparser.ConfigParser()
    declared.read(ROOT / "setup.cfg")
    scripts = dict(
        line.split(" = ") for line in declared["options.entry_points"]["console_scripts"].strip().splitlines()
    )
    module, function = scripts[f"gligen-{name}"].split(":")
    signature = inspect.signature(getattr(importlib.import_module(module), function))
    assert not signature.parameters
    assert signature.return_annotation == "int"
