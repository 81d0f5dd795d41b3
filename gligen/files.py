"""Files that are never seen half written, where the project's own lie, and where compiled code is kept."""

from __future__ import annotations

import errno
import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, by: Path | None = None) -> Iterator[Path]:
    """A place beside the target for a file or folder, which is renamed to it at the end: whoever reads finds the old
    content or the new, never half of it.

    by: the folder, on the same disk, where it is written first; a process that is killed leaves it there.
    """
    temporary = (by or path.parent) / f".{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Deletes a file, or a folder with all that is in it, if it is there."""
    if path.is_dir():
        import shutil  # here, since it takes milliseconds

        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | memoryview, *, by: Path | None = None) -> Path:
    """Writes a file as `replacing` does and returns its path. Raises OSError, and then nothing has changed."""
    with replacing(path, by=by) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return path


@contextmanager
def finished_stays(out: Path, finished: Callable[[], str]) -> Iterator[None]:
    """Makes a full disk one line that names what is finished ('3 of 7 shards') and stays, to go on from."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"no space left for '{out}': {finished()} are finished and stay; make room and give the same command again"
        ) from None


def shipped(name: str) -> Path:
    """The place of a file that comes with the project, such as 'examples/box-text.json': in a clone, or where
    installing the package put it. Where it is in neither, the place in a clone."""
    clone = Path(__file__).parents[1] / name
    schemes = (sysconfig.get_default_scheme(), sysconfig.get_preferred_scheme("user"))
    installed = (Path(sysconfig.get_path("data", scheme), "share", "gligen", name) for scheme in schemes)
    return next((path for path in (clone, *installed) if path.exists()), clone)


def cache_folder(name: str) -> Path:
    """The folder of this user's files that can be made again: ~/.cache/gligen/NAME, or under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gligen" / name


def compile_cache() -> Path:
    """The folder that keeps compiled code between runs; TORCHINDUCTOR_CACHE_DIR names another."""
    return Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("inductor"))))
