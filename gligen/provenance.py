"""What an image was generated with: stored in its PNG, and compared when the PNG is generated again.

Files are known by name and by a fingerprint of their content, so that a renamed file is the same and a changed one is
not. No folder is stored: names of folders say more about their owner than about the image.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WHOLE = 8 * 2**20  # bytes up to which a file is read whole
BLOCKS, BLOCK = 256, 16384  # of a larger one: evenly spaced, besides its first and last mebibyte


def fingerprint(path: str | Path) -> str:
    """16 hexadecimal digits by which the content of a file, or of all files of a folder, is known from another's.

    SHA-256 of the size and of the whole content up to 8 MiB; of larger files, of the first and last mebibyte, where
    headers are, and 256 blocks of 16 KiB evenly between them: milliseconds for any checkpoint, and a fine-tuned one
    differs nearly everywhere.
    Raises OSError if it cannot be read.
    """
    import hashlib  # here, so that --help need not wait for OpenSSL

    path = Path(path)
    digest = hashlib.sha256()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.update(str(file.relative_to(path)).encode() if path.is_dir() else b"")
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with open(file, "rb") as content:
            if size <= WHOLE:
                digest.update(content.read())
                continue
            digest.update(content.read(2**20))
            for i in range(BLOCKS):
                content.seek(2**20 + i * (size - 2**21 - BLOCK) // (BLOCKS - 1))
                digest.update(content.read(BLOCK))
            content.seek(size - 2**20)
            digest.update(content.read())
    return digest.hexdigest()[:16]


def record(files: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """A model as an image's metadata records it: JSON data without what was not given.

    files: paths by role ('checkpoint', 'adapter', 'vae', ...), or a list of them; 'FILE:weight' is a file with a
    weight. options: whatever else decides what is generated ('mode', 'dtype', 'ema', ...).
    """
    noted: dict[str, Any] = {}
    for role, path in files.items():
        if isinstance(path, (list, tuple)):
            noted[role] = [_file(each) for each in path]
        elif path is not None:
            noted[role] = _file(path)
    noted |= {name: value for name, value in options.items() if value is not None}
    return {name: value for name, value in noted.items() if value not in (False, [])}


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two records, in words that fit behind 'generated with'."""
    found = []
    for name in dict.fromkeys((*stored, *now)):
        then, here = stored.get(name), now.get(name)
        if _identity(then) == _identity(here):
            continue
        if _label(then) == _label(here):
            found.append(f"{name} {_label(then)} of other content")
        else:
            found.append(f"{name} {_label(then)}, now {_label(here)}")
    return found


def compare(png: Mapping[str, Any], model: Mapping[str, Any], rest: Mapping[str, Any]) -> str | None:
    """The differences of a PNG's record (gligen.image_files.read_record) from a run that generates it again, or None.

    model: as `record` gives it. rest: {'images': fingerprints by field, 'init_latents': as `record` gives a file}.
    """
    stored = png.get("model")
    if not isinstance(stored, Mapping):  # of before fingerprints: names and kinds only
        files = [value["file"] for name in ("checkpoint", "adapter") if (value := model.get(name))]
        now = {"checkpoint": " + ".join(files), "mode": model.get("mode"), "dtype": model.get("dtype")}
        stored, model = (
            {name: png[name] for name in now if name in png},
            {name: now[name] for name in now if name in png},
        )
        png = {name: value for name, value in png.items() if name != "init_latents"}
    found = differences(stored, model) + differences(
        {"initial latents": png.get("init_latents")}, {"initial latents": rest.get("init_latents")}
    )
    images = rest.get("images", {})
    stored_images = png.get("images")
    if isinstance(stored_images, Mapping):
        found += [f"{name} of other content" for name, then in stored_images.items() if images.get(name) != then]
    return "; ".join(found) or None


def portable_path(path: str, folder: str | Path) -> str:
    """A file's path as stored for a PNG in `folder`: relative to it; from `~` where the way would name the home folder;
    as it is where no way leads (another drive)."""
    here = os.path.realpath(folder)
    there = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    home = os.path.realpath(os.path.expanduser("~"))
    try:
        if os.path.commonpath([there, home]) == home != os.path.commonpath([here, home]):
            return "~/" + Path(there).relative_to(home).as_posix()
        return Path(os.path.relpath(there, here)).as_posix()
    except ValueError:
        return path


def _file(path: str | Path) -> dict[str, str]:
    file, weight = os.path.expanduser(path).rstrip("/\\"), ""
    if not os.path.exists(file):
        file, _, weight = file.rpartition(":")  # a LoRA's; whoever opened the file has checked it
    noted = {"file": os.path.basename(file), "fingerprint": fingerprint(file)}
    return noted | ({"weight": weight} if weight else {})


def _identity(value: Any) -> Any:
    """A value as it is compared: of files their content and weight, not their name."""
    if isinstance(value, Mapping):
        return (value.get("fingerprint"), value.get("weight"))
    return [_identity(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


def _label(value: Any) -> str:
    if value is None or value is False:
        return "none"
    if isinstance(value, Mapping):
        return f"'{value.get('file')}'" + (f" at {value['weight']}" if "weight" in value else "")
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " + ".join(map(_label, value))
    return "on" if value is True else str(value)
