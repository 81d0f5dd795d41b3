"""Maps and masks in a folder of their own, matched to pictures by name: `images/a/1.jpg` has `depth/a/1.png`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from gligen.data.example import BadExample, Pixels
from gligen.data.pictures import SUFFIXES, check_same_shape
from gligen.image_files import check_labels, open_image
from gligen.images import load_rgb


@dataclass(frozen=True)
class MapFolder:
    """Maps of one kind: a map mode's name, or 'mask'. suffixes: those that the folder's files have."""

    folder: Path
    kind: str
    suffixes: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, kind: str) -> MapFolder:
        """Raises ValueError if the folder holds no picture files, FileNotFoundError if there is none."""
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder of {kind} maps")
        suffixes = sorted({path.suffix for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES})
        if not suffixes:
            raise ValueError(f"{folder}: holds no {kind} maps: give pictures named as the ones they belong to")
        return cls(folder, kind, tuple(suffixes))

    def find(self, key: str) -> Path | None:
        """The map of a picture: the same relative path without suffix, with or without its first folders."""
        parts = PurePosixPath(key).with_suffix("").parts
        for start in range(len(parts)):
            for suffix in self.suffixes:
                path = self.folder.joinpath(*parts[start:-1], parts[-1] + suffix)
                if path.is_file():
                    return path
        return None

    def read(self, key: str, pixels: Pixels) -> NDArray[np.uint8]:
        """The map at its own resolution: (H, W) labels for 'sem', (H, W) 0 or 255 for 'mask', else (H, W, 3).

        Raises BadExample if it is missing, cannot be read, or has another shape than the picture.
        """
        path = self.find(key)
        if path is None:
            raise BadExample(f"no {self.kind} map", f"{key}: nothing of that name in {self.folder}")
        try:
            image = open_image(path, path.name) if self.kind == "sem" else load_rgb(path, path.name)
            if self.kind == "sem":
                check_labels(image, path.name)
        except (OSError, ValueError) as error:
            raise BadExample(f"{self.kind} map that cannot be read", str(error)) from None
        check_same_shape(image.size, pixels, f"{self.kind} map", key)
        if self.kind == "mask":
            image = image.convert("L").point([0] * 128 + [255] * 128)
        return np.asarray(image).astype(np.uint8)
