"""Packages that wait with their own `__init__` until a name of theirs is asked for.

open_clip's `__init__` imports every model there is, with timm and torchvision: 4 of the 6.5 CPU seconds it takes to
import torch and open_clip, for two classes and a tokenizer that need none of it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

WAITING = ("open_clip", "torchvision", "torchvision.ops")  # open_clip's files need one class of torchvision.ops.misc


class _WaitingPackage(ModuleType):
    """Stands in sys.modules as the package itself, and becomes it when a name is missing."""

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__
        is_probe = name.startswith("__") and name not in ("__version__", "__all__")  # inspect and pytest ask everyone
        if is_probe or state.get("_has_begun"):
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        state["_has_begun"] = True
        spec = state["__spec__"]
        spec.loader.exec_module(self)
        return getattr(self, name)


def open_clip_module(name: str) -> ModuleType:
    """open_clip's module of this name (`transformer`, `tokenizer`), without its other models.

    `import open_clip` works as ever, before and after. Raises ModuleNotFoundError where it is not installed.
    """
    for package in WAITING:
        if package not in sys.modules:
            _wait(package)
    return importlib.import_module(f"open_clip.{name}")


def _wait(package: str) -> None:
    parent, _, leaf = package.rpartition(".")
    path = sys.modules[parent].__path__ if parent else None  # find_spec of importlib.util would import the parent
    spec = importlib.machinery.PathFinder.find_spec(package, path)
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        return  # not a plain package on disk: imported as usual
    module = _WaitingPackage(package)
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    module.__path__, module.__package__ = spec.submodule_search_locations, package
    sys.modules[package] = module
    if parent:
        setattr(sys.modules[parent], leaf, module)
