"""Files read by position, local or behind fsspec (s3://, gs://, https://), by any number of processes.

Nothing is kept open across a fork or a pickle that could move another process's place in a file: local files are read
with pread, which has no place, and a remote file system is opened again in every process.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

MAX_OPEN = 64  # files a process keeps open: sets have thousands of shards, a process may open 1024


def is_remote(path: str | Path) -> bool:
    return "://" in str(path)


def open_storage(folder: str | Path) -> Storage:
    """The files of a folder or URL. Raises ValueError, one line, for a URL without fsspec or its driver."""
    return RemoteStorage(str(folder)) if is_remote(folder) else Storage(folder)


class Storage:
    """Files of one local folder, by name."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = str(folder)
        self._open: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def names(self) -> list[str]:
        """All files of the folder, sorted."""
        return sorted(entry.name for entry in os.scandir(self.folder) if entry.is_file())

    def stamp(self, name: str) -> tuple[int, str]:
        """Bytes, and what changes when the file is written again. Raises FileNotFoundError."""
        found = os.stat(self.path(name))
        return found.st_size, str(found.st_mtime_ns)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Reads `length` bytes (None: all) from an offset; fewer where the file ends before. Raises OSError."""
        with self._lock:  # threads share the table, and must not close what another reads from
            if name in self._open:
                self._open.move_to_end(name)
            else:
                self._open[name] = os.open(self.path(name), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                if len(self._open) > MAX_OPEN:
                    os.close(self._open.popitem(last=False)[1])
            file = self._open[name]
            if length is None:
                length = max(0, os.fstat(file).st_size - offset)
            content = os.pread(file, length, offset)
            while 0 < len(content) < length:  # a read gives 2 GiB at most, and less on some file systems
                more = os.pread(file, length - len(content), offset + len(content))
                if not more:
                    break
                content += more
            return content

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]  # the same class

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()


class RemoteStorage(Storage):
    """Files under a URL, one range request a read."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder.rstrip("/"))
        self._system: Any = None
        self._process = 0
        self.system()

    def system(self) -> Any:
        """The file system of fsspec, made in this process."""
        if self._process != os.getpid():
            try:
                import fsspec
            except ImportError:
                raise ValueError(
                    f"'{self.folder}' is remote: reading it needs fsspec, pip install gligen[data]"
                ) from None
            try:
                # another process's connections and event loop are dead after a fork
                self._system, _ = fsspec.core.url_to_fs(self.folder, skip_instance_cache=True)
            except (ImportError, ValueError) as error:
                raise ValueError(f"'{self.folder}': {' '.join(str(error).split())}") from None
            self._process = os.getpid()
        return self._system

    def path(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def names(self) -> list[str]:
        try:
            found = self.system().ls(self.folder, detail=True)
        except FileNotFoundError:
            raise FileNotFoundError(f"'{self.folder}' does not exist") from None
        return sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in found if entry["type"] == "file")

    def stamp(self, name: str) -> tuple[int, str]:
        try:
            found = self.system().info(self.path(name))
        except FileNotFoundError:
            raise FileNotFoundError(f"'{self.path(name)}' does not exist") from None
        if found.get("size") is None:
            raise ValueError(
                f"'{self.path(name)}': its server does not tell how long it is, so it cannot be read in parts"
            )
        marks = (found.get(key) for key in ("ETag", "mtime", "LastModified", "last_modified", "updated", "created"))
        return int(found["size"]), str(next((mark for mark in marks if mark is not None), ""))

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        end = None if length is None else offset + length
        try:
            return self.system().cat_file(self.path(name), start=offset, end=end)
        except FileNotFoundError:
            raise FileNotFoundError(f"'{self.path(name)}' does not exist") from None
