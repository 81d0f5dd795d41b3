"""Which pictures lie under a folder, and which of them an annotation means by a name."""

from __future__ import annotations

import os
from collections.abc import Collection
from itertools import takewhile
from pathlib import Path, PurePosixPath

from gligen.data.example import Findings
from gligen.data.pictures import SUFFIXES
from gligen.modes import MAP_MODES

BESIDE = frozenset((*MAP_MODES, "masks"))  # folders of maps and masks, whose pictures are not examples


class PictureFiles:
    """The picture files under a folder, by paths relative to it with forward slashes."""

    def __init__(self, folder: Path) -> None:
        """Folders named as map modes or masks, which hold other pictures, are left out.

        Raises FileNotFoundError if there is no such folder.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder of pictures")
        self.folder = folder
        self._by_name: dict[str, list[str]] = {}
        for parent, folders, files in os.walk(folder, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in BESIDE)
            relative = PurePosixPath(Path(parent).relative_to(folder).as_posix())
            for name in files:
                if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                    self._by_name.setdefault(name, []).append(str(relative / name))

    def __len__(self) -> int:
        return sum(map(len, self._by_name.values()))

    def names(self) -> list[str]:
        """All of them, sorted."""
        return sorted(name for names in self._by_name.values() for name in names)

    def find(self, name: str) -> str | None:
        """The file that `name` means, wherever the set was unpacked: its last parts agree with most of name's.

        None if there is none. Raises ValueError if several agree equally well.
        """
        wanted = PurePosixPath(name.replace("\\", "/")).parts[::-1]
        found = self._by_name.get(wanted[0], []) if wanted else []
        if len(found) == 1:
            return found[0]
        agreeing = [_agreement(PurePosixPath(path).parts[::-1], wanted) for path in found]
        best = [path for path, agrees in zip(found, agreeing, strict=True) if agrees == max(agreeing)]
        if len(best) > 1:  # a name without folders means the file without folders
            best = [path for path in best if len(PurePosixPath(path).parts) == len(wanted)] or best
        if len(best) > 1:
            raise ValueError(f"{name}: could be {best[0]} or {best[1]}")
        return best[0] if best else None

    def find_or_lose(self, findings: Findings, where: str, *names: str) -> str | None:
        """The file that the first of the names that has one means; without one, or with several, the picture is lost.

        where: begins what is told of it.
        """
        try:
            found = next(filter(None, map(self.find, names)), None)
        except ValueError as error:
            findings.lose("picture name that several files have", f"{where}{error}")
            return None
        if found is None:
            findings.lose("picture file missing", f"{where}{names[0]}, nowhere in {self.folder}")
        return found

    def by_stem(self) -> dict[str, str]:
        """Files by relative path without suffix. Raises ValueError for two pictures that differ in the suffix alone."""
        stems: dict[str, str] = {}
        for name in self.names():
            stem = str(PurePosixPath(name).with_suffix(""))
            if stem in stems:
                raise ValueError(f"{self.folder}: {stems[stem]} and {name} have one name: which is meant? remove one")
            stems[stem] = name
        return stems


def _agreement(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def find_pictures(given: Path | None, nearby: Collection[Path]) -> PictureFiles:
    """The pictures of the folder that was given, else of the first of the nearby ones that has any.

    Raises FileNotFoundError, saying where they were looked for.
    """
    places = [given] if given else nearby
    for folder in places:
        if (folder.is_dir() or given) and len(files := PictureFiles(folder)):
            return files
    raise FileNotFoundError(f"no pictures in {', '.join(map(str, places))}: say where they are with --images FOLDER")


def class_name(name: str) -> str:
    """A class name as a phrase: words, where data sets join them with underscores ('baseball_bat')."""
    return " ".join(name.replace("_", " ").split())
