"""PyTorch checkpoints without running them.

A checkpoint is a zip with one pickle, which may name any Python object to be called, and one record of bytes per
storage. The pickle is read here by an unpickler that knows plain containers and tensors; every other class it
names becomes an inert placeholder that swallows its arguments, and a pickle that asks for functions which
plainly run code is refused. So what Lightning and OmegaConf left in a file is looked at, never executed.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gligen.weights.tensors import FileTensor, HeldFile, MappedFile

_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError, RuntimeError)
MAX_PICKLE = 256 * 2**20  # bytes; the largest published checkpoint needs less than 1 MB

_HOSTILE_MODULES = frozenset(
    """
    os posix nt subprocess commands popen2 sys importlib imp runpy pkgutil zipimport socket ssl shutil ctypes _ctypes
    cffi pty pdb bdb code codeop webbrowser multiprocessing threading _thread concurrent asyncio signal pickle
    _pickle cPickle marshal shelve dill cloudpickle joblib tempfile urllib http ftplib smtplib telnetlib requests
    httpx aiohttp pip ensurepip setuptools timeit trace profile cProfile doctest antigravity gc inspect atexit
    faulthandler resource fcntl mmap winreg msvcrt _winapi platform
    """.split()  # noqa: SIM905 (sixty quoted words read worse)
)
_HOSTILE_NAMES = frozenset(
    """
    builtins.eval builtins.exec builtins.execfile builtins.compile builtins.open builtins.file builtins.input
    builtins.raw_input builtins.__import__ builtins.reload builtins.apply builtins.getattr builtins.setattr
    builtins.delattr builtins.globals builtins.locals builtins.vars builtins.breakpoint builtins.exit builtins.quit
    torch.load torch.compile torch.serialization.load torch.hub.load torch.jit.load torch.storage._load_from_bytes
    io.open io.open_code io.FileIO _io.open _io.open_code _io.FileIO
    torch.utils.cpp_extension.load numpy.load numpy.testing._private.utils.runstring
    """.split()  # noqa: SIM905
)


class _Ordered(dict[Any, Any]):
    """In place of OrderedDict, whose instances would let a pickle put attributes over `items` and the like."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass  # torch's `_metadata`: versions of modules


_CONTAINERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Ordered,
    ("collections", "defaultdict"): defaultdict,
    ("builtins", "long"): int,
    ("torch", "Size"): tuple,
    **{("builtins", t.__name__): t
       for t in (dict, list, set, frozenset, tuple, int, float, bool, complex, str, object)},
}  # fmt: skip

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


class Inert:
    """Stands for an object of a class that was not loaded: keeps what it was given, does nothing."""

    global_name = "?"
    args: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = super().__new__(cls)
        self.args = args
        self.state = None
        self.items = []
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # object's own would refuse arguments

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state  # never merged into __dict__, so no name in it can have an effect

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def add(self, item: Any) -> None:
        self.items.append(item)

    def __repr__(self) -> str:
        return f"<inert {self.global_name}>"


class _Storage:
    """A record of the zip, as the pickle's tensors refer to it."""

    __slots__ = ("count", "dtype", "file", "region")

    def __init__(self, file: MappedFile, dtype: torch.dtype, region: int, count: int) -> None:
        self.file = file
        self.dtype = dtype
        self.region = region
        self.count = count


class _StorageType:
    """A storage class as the pickle names it; nothing can be stored on it."""

    __slots__ = ("_dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def get(self) -> torch.dtype:
        return self._dtype


class RefusedError(ValueError):
    """A message that is complete as it stands."""


# The unpickler in Python, not the one in C, which allocates as much memory as a memo index in the file says.
class _SafeUnpickler(pickle._Unpickler):
    def __init__(self, path: str, data: bytes, archive: _Archive) -> None:
        # Python 2 strings in old pickles are text here; undecodable bytes must not stop the weights.
        super().__init__(io.BytesIO(data), encoding="utf-8", errors="replace")
        self.path = path
        self.archive = archive
        self.inert: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        module = IMPORT_MAPPING.get(module, module)  # torch writes protocol 2, which has Python 2's module names
        if module.partition(".")[0] in _HOSTILE_MODULES or f"{module}.{name}" in _HOSTILE_NAMES:
            raise RefusedError(f"{self.path}: its pickle asks to run {module}.{name}; refused, nothing was run")
        if (module, name) in _CONTAINERS:
            return _CONTAINERS[module, name]
        if module in ("torch", "torch.storage"):
            if name in _STORAGES:
                return _StorageType(_STORAGES[name])
            if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
                return dtype
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        full = f"{module}.{name}"
        if full not in self.inert:
            self.inert[full] = type(name.rpartition(".")[2], (Inert,), {"global_name": full})
        return self.inert[full]

    def persistent_load(self, reference: Any) -> _Storage:
        kind, storage_type, key, _location, count = reference
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise ValueError(f"it refers to {kind!r} outside the pickle")
        return self.archive.storage(str(key), storage_type.get(), int(count))

    def _tensor(self, storage: Any, start: int, shape: Any, stride: Any, *_: Any) -> FileTensor:
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without storage")
        shape, stride = tuple(map(int, shape)), tuple(map(int, stride))
        tensor = FileTensor(storage.file, storage.region, storage.dtype, shape, start=int(start), stride=stride)
        if min((*shape, *stride, start)) < 0 or tensor.start + tensor.extent > storage.count:
            raise ValueError(f"a tensor of shape {shape} reaches beyond its {storage.count} numbers")
        return tensor


class _Archive:
    """The zip around the pickle: where each storage's bytes lie."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.zip = zipfile.ZipFile(path)
        except (*_ZIP_ERRORS, struct.error) as error:
            raise ValueError(
                f"{path}: starts as a PyTorch checkpoint but its end is missing: is it fully downloaded?"
            ) from error
        self.records = {info.filename: info for info in self.zip.infolist()}
        pickles = [name for name in self.records if name == "data.pkl" or name.endswith("/data.pkl")]
        if not pickles:
            raise ValueError(f"{path}: a zip archive without data.pkl, not a PyTorch checkpoint")
        self.root = min(pickles, key=len).removesuffix("data.pkl")
        if any(name.startswith(f"{self.root}code/") for name in self.records):
            raise ValueError(f"{path}: a TorchScript program, not a checkpoint: give its state dict instead")
        if self.text("byteorder") == "big":
            raise ValueError(f"{path}: stored on a big-endian machine: load and re-save it there")
        self.file = MappedFile(path)
        self.unpacked: dict[str, MappedFile] = {}

    def text(self, name: str) -> str:
        record = self.records.get(self.root + name)
        return self._read(record).decode("ascii", "replace") if record and record.file_size < 64 else ""

    def pickle(self) -> bytes:
        record = self.records[self.root + "data.pkl"]
        if record.file_size > MAX_PICKLE:
            raise ValueError(f"{self.path}: its pickle is {record.file_size} bytes long; refused")
        return self._read(record)

    def _read(self, record: zipfile.ZipInfo) -> bytes:
        try:
            return self.zip.read(record)
        except _ZIP_ERRORS as error:
            raise ValueError(
                f"{self.path}: its record {record.filename!r} is damaged: is it fully downloaded?"
            ) from error

    def storage(self, key: str, dtype: torch.dtype, count: int) -> _Storage:
        record = self.records.get(f"{self.root}data/{key}")
        size = count * dtype.itemsize
        if record is None or record.file_size < size or count < 0:
            found = "missing" if record is None else f"{record.file_size} bytes instead of {size}"
            raise RefusedError(f"{self.path}: its record {f'data/{key}'!r} is {found}: is it fully downloaded?")
        if record.compress_type != zipfile.ZIP_STORED:  # torch never does; someone re-zipped the file
            if key not in self.unpacked:
                self.unpacked[key] = HeldFile(self.path, self._read(record))
            return _Storage(self.unpacked[key], dtype, 0, count)
        # The central directory says where the record's own header is; that header is of variable length.
        head = record.header_offset
        data = self.file.map
        assert data is not None
        if data[head : head + 4] != b"PK\x03\x04":
            raise RefusedError(f"{self.path}: its record {f'data/{key}'!r} is damaged: is it fully downloaded?")
        name_length, extra_length = struct.unpack("<HH", data[head + 26 : head + 30])
        region = head + 30 + name_length + extra_length
        if region + size > self.file.size:
            raise RefusedError(f"{self.path}: its record {f'data/{key}'!r} is cut off: is it fully downloaded?")
        return _Storage(self.file, dtype, region, count)


def read_pickle(path: str | Path) -> tuple[Any, tuple[str, ...]]:
    """What a PyTorch checkpoint holds, tensors left in the file, and the names of the inert classes in it.

    Raises ValueError in one line for anything that is not such a checkpoint, is cut off, or wants to run code.
    """
    archive = _Archive(str(path))
    data = archive.pickle()
    unpickler = _SafeUnpickler(str(path), data, archive)
    try:
        value = unpickler.load()
    except RefusedError as error:
        raise ValueError(str(error)) from None
    except (
        pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, MemoryError,
        RecursionError, OverflowError, ImportError, RuntimeError, struct.error, AssertionError,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: its pickle cannot be read ({reason})") from error
    finally:
        archive.zip.close()
    return value, tuple(sorted(unpickler.inert))


def describe_foreign(path: str | Path) -> str:
    """Why a file that is neither a safetensors file nor a PyTorch zip cannot be read, in one line."""
    with open(path, "rb") as file:
        start = file.read(512)
    head = start.lstrip().lower()
    # torch's own magic number, and the tar of the time before it
    is_old = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19" in start[:32] or start[257:262] == b"ustar"
    reasons = (
        (not start, "empty: is it fully downloaded?"),
        (head.startswith(b"version https://git-lfs"), "a Git LFS pointer: fetch the weights with `git lfs pull`"),
        (head.startswith((b"<!doctype", b"<html", b"<?xml")), "a web page: the download did not give the file itself"),
        (is_old, "written by PyTorch before 1.6: load it there or with torch.load and re-save it"),
        (start[:1] == b"\x80", "a bare pickle, not a PyTorch checkpoint"),
        (all(byte >= 32 or byte in b"\t\n\r\f" for byte in start), "a text file, not a checkpoint"),
        (True, "neither a safetensors file nor a PyTorch checkpoint: is it fully downloaded?"),
    )
    return f"{path}: " + next(reason for holds, reason in reasons if holds)


def plain(value: Any) -> Any:
    """OmegaConf's configs (any version) and their neighbours as dicts, lists and scalars.

    Other placeholders become None. Shared parts stay shared. Raises ValueError for a config that contains itself.
    """
    done: dict[int, Any] = {}

    def walk(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if id(value) in done:
            if done[id(value)] is _WALKING:
                raise ValueError("a config that contains itself")
            return done[id(value)]
        done[id(value)] = _WALKING
        done[id(value)] = result = _plain_node(value, walk)
        return result

    try:
        return walk(value)
    except RecursionError:
        raise ValueError("a config nested too deeply") from None


_WALKING = object()


def _plain_node(value: Any, walk: Callable[[Any], Any]) -> Any:
    if isinstance(value, Inert):
        value = _attributes(value.state)
        inner = value.get("_content", value.get("_val"))
        return walk(inner)
    if isinstance(value, dict):
        if "_content" in value and "_metadata" in value:  # vars() of a DictConfig, as GLIGEN's trainer saved it
            return walk(value["_content"])
        return {str(name): walk(item) for key, item in value.items() if (name := walk(key)) is not None}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [walk(item) for item in value]
    return None


def _attributes(state: Any) -> dict[str, Any]:
    if isinstance(state, tuple) and len(state) == 2:  # objects with slots: (dict, slots)
        state = {**(state[0] or {}), **(state[1] or {})}
    return state if isinstance(state, dict) else {}
