"""PyTorch checkpoints without running them.

A checkpoint is a zip with one pickle, which may name any Python object to be called, and one record of bytes per
storage; before torch 1.6, and still when asked for, it is pickles and then the storages' bytes in one row. A pickle is
read here by an unpickler that knows plain containers and tensors; every other class it names becomes an inert
placeholder that swallows its arguments, and a pickle that asks for functions which plainly run code is refused. So
what Lightning and OmegaConf left in a file is looked at, never executed.
"""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gligen.weights.tensors import FileTensor, MappedFile

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
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
    # of quantised tensors, which are not read (files.py says so), in checkpoints whose other tensors may be
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
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

    add = append

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    def __repr__(self) -> str:
        return f"<inert {self.global_name}>"


class _Storage(NamedTuple):  # a tuple: a pickle can put nothing over what it holds
    """The bytes of one storage, as the pickle's tensors refer to them. region: their offset; numbers: how many."""

    file: MappedFile
    dtype: torch.dtype
    region: int
    numbers: int


class _StorageType(NamedTuple):
    """A storage class as the pickle names it."""

    dtype: torch.dtype


class RefusedError(ValueError):
    """A message that is complete as it stands."""


# The unpickler in Python, not the one in C, which allocates as much memory as a memo index in the file says.
class _SafeUnpickler(pickle._Unpickler):
    def __init__(self, path: str, stream: Any, storages: _Archive | _Row) -> None:
        # Python 2 strings in old pickles are text here; undecodable bytes must not stop the weights.
        super().__init__(stream, encoding="utf-8", errors="replace")
        self.path = path
        self.storages = storages
        self.inert: dict[str, type[Inert]] = {}

    def load(self) -> Any:
        try:
            return super().load()
        except RefusedError as error:
            raise ValueError(str(error)) from None
        except (
            pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, MemoryError,
            RecursionError, OverflowError, ImportError, RuntimeError, struct.error, AssertionError,
        ) as error:  # fmt: skip
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{self.path}: its pickle cannot be read ({reason})") from error

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
        if (rebuild := _REBUILDERS.get((module, name))) is not None:
            return partial(rebuild, self)
        full = f"{module}.{name}"
        if full not in self.inert:
            self.inert[full] = type(name.rpartition(".")[2], (Inert,), {"global_name": full})
        return self.inert[full]

    def persistent_load(self, reference: Any) -> Any:
        kind, storage_type, *rest = reference
        if kind == "module":  # a module's class with its source, in files of the time before zip
            return storage_type
        if kind != "storage":
            raise ValueError(f"it refers to {kind!r} outside the pickle")
        if not isinstance(storage_type, _StorageType):
            raise ValueError(f"it holds numbers of an unknown kind, {getattr(storage_type, 'global_name', '?')}")
        key, _location, count, *view = rest
        return self.storages.storage(str(key), storage_type.dtype, int(count), view[0] if view else None)

    def _tensor(self, storage: Any, start: int, shape: Any, stride: Any, *_: Any) -> FileTensor:
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without storage")
        shape, stride = tuple(map(int, shape)), tuple(map(int, stride))
        tensor = FileTensor(storage.file, storage.region, storage.dtype, shape, start=int(start), stride=stride)
        if min((*shape, *stride, start)) < 0 or tensor.start + tensor.extent > storage.numbers:
            raise ValueError(f"a tensor of shape {shape} reaches beyond its {storage.numbers} numbers")
        return tensor

    def _tensor_v3(
        self, storage: Any, start: int, shape: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
    ) -> FileTensor:
        """A tensor as `_tensor` makes it, of an untyped storage, whose `numbers` are bytes."""
        if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
            raise ValueError("a tensor without storage")
        count = storage.numbers * storage.dtype.itemsize // dtype.itemsize
        return self._tensor(_Storage(storage.file, dtype, storage.region, count), start, shape, stride)


_REBUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _SafeUnpickler._tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _SafeUnpickler._tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _SafeUnpickler._tensor_v3,  # of young dtypes, such as 8-bit floats
    # A Parameter, one with attributes, and a tensor with attributes or of a subclass: the attributes are no weights.
    ("torch._utils", "_rebuild_parameter"): lambda _, data, *__: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda _, data, *__: data,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda _, rebuild, __, args, ___: rebuild(*args),
}


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
        packed = next((name for name in self.records if name.endswith((".safetensors", ".ckpt", ".pth", ".bin"))), None)
        if not pickles and packed is not None:
            raise ValueError(f"{path}: a zip archive that holds {packed}: unpack it first")
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

    def storage(self, key: str, dtype: torch.dtype, count: int, view: Any = None) -> _Storage:
        record = self.records.get(f"{self.root}data/{key}")
        size = count * dtype.itemsize
        if record is None or record.file_size < size or count < 0:
            found = "missing" if record is None else f"{record.file_size} bytes instead of {size}"
            raise RefusedError(f"{self.path}: its record {f'data/{key}'!r} is {found}: is it fully downloaded?")
        if record.compress_type != zipfile.ZIP_STORED:  # torch never does; someone re-zipped the file
            if key not in self.unpacked:
                self.unpacked[key] = MappedFile(self.path, self._read(record))
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
    """Reads what a PyTorch checkpoint holds, tensors left in the file, and the names of the inert classes in it.

    Raises ValueError in one line for anything that is not such a checkpoint, is cut off, or wants to run code.
    """
    archive = _Archive(str(path))
    unpickler = _SafeUnpickler(str(path), io.BytesIO(archive.pickle()), archive)
    try:
        value = unpickler.load()
    finally:
        archive.zip.close()
    return value, tuple(sorted(unpickler.inert))


# --- the time before zip ---------------------------------------------------------------------------------------------

_MAGIC = 0x1950A86A20F9469CFC6C  # torch's own number, the first pickle of such a file


def is_legacy(path: str | Path) -> bool:
    """True for what torch wrote before 1.6, and writes still where `_use_new_zipfile_serialization` is off."""
    with open(path, "rb") as file:
        start = file.read(32)
    return start[:1] == b"\x80" and _MAGIC.to_bytes(10, "little") in start  # whatever pickle's protocol


class _Bounded:
    """A mapped file as a stream for pickles: no single read may be longer than a pickle is allowed to be."""

    def __init__(self, file: MappedFile) -> None:
        assert isinstance(file.map, mmap.mmap)
        self.map = file.map
        self.readline = file.map.readline

    def read(self, count: int) -> bytes:
        if count > MAX_PICKLE:
            raise ValueError(f"a piece of {count} bytes")
        return self.map.read(count)


class _Row:
    """The storages behind the pickles, each its count of numbers in 8 bytes and then those.

    Where one lies depends on the sizes of all before it, which the pickle in front of them tells: it is read twice,
    first with all of them at 0.
    """

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.sizes: dict[str, tuple[torch.dtype, int]] = {}
        self.regions: dict[str, int] = {}

    def storage(self, key: str, dtype: torch.dtype, count: int, view: Any = None) -> _Storage:
        if count < 0:
            raise ValueError(f"a storage of {count} numbers")
        self.sizes[key] = dtype, count
        region = self.regions.get(key, 0)
        if view is not None:  # a part of a storage: its own key, where it begins, how many numbers
            _key, start, count = view
            region += int(start) * dtype.itemsize
            if not 0 <= int(start) <= int(start) + int(count) <= self.sizes[key][1]:
                raise ValueError("a view that reaches beyond its storage")
        return _Storage(self.file, dtype, region, int(count))

    def place(self, keys: Any, position: int) -> None:
        for key in keys:
            dtype, count = self.sizes.get(str(key), (torch.uint8, 0))
            region, end = position + 8, position + 8 + count * dtype.itemsize
            assert self.file.map is not None
            stored = int.from_bytes(self.file.map[position:region], "little")
            if end > self.file.size or stored != count:
                found = "cut off" if end > self.file.size else f"{stored} numbers long instead of {count}"
                raise ValueError(f"{self.file.path}: its storage {str(key)!r} is {found}: is it fully downloaded?")
            self.regions[str(key)] = region
            position = end
        if lost := next((key for key in self.sizes if key not in self.regions), None):
            raise ValueError(f"{self.file.path}: its storage {lost!r} is missing: is it fully downloaded?")


def read_legacy(path: str | Path) -> tuple[Any, tuple[str, ...]]:
    """Reads, as `read_pickle` does, a file for which `is_legacy` holds."""
    file = MappedFile(path)
    stream, row = _Bounded(file), _Row(file)

    def load() -> tuple[Any, _SafeUnpickler]:
        unpickler = _SafeUnpickler(str(path), stream, row)
        try:
            return unpickler.load(), unpickler
        except ValueError as error:
            if stream.map.tell() == file.size:
                raise ValueError(f"{path}: ends inside its pickle: is it fully downloaded?") from error
            raise

    head = [load()[0] for _ in range(3)]
    if not isinstance(head[2], dict) or head[2].get("little_endian") is not True:
        raise ValueError(f"{path}: stored on a big-endian machine: load and re-save it there")
    start = stream.map.tell()
    load()
    keys = load()[0]
    row.place(keys if isinstance(keys, list) else [], stream.map.tell())
    stream.map.seek(start)
    value, unpickler = load()
    return value, tuple(sorted(unpickler.inert))


def describe_foreign(path: str | Path) -> str:
    """The reason, in one line, why a file that is neither a safetensors file nor a PyTorch zip cannot be read."""
    with open(path, "rb") as file:
        start = file.read(512)
    head = start.lstrip().lower()
    is_old = start[257:262] == b"ustar"  # the tar of the time before torch 0.1.10
    reasons = (
        (not start, "empty: is it fully downloaded?"),
        (head.startswith(b"version https://git-lfs"), "a Git LFS pointer: fetch the weights with `git lfs pull`"),
        (head.startswith((b"<!doctype", b"<html", b"<?xml")), "a web page: the download did not give the file itself"),
        (is_old, "a tar archive: if PyTorch before 0.1.10 wrote it, load it with torch.load and re-save it"),
        (start[:4] == b"GGUF", "a GGUF file, whose weights are quantised: give the weights it was made from"),
        (start[:8] == b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras), not a PyTorch checkpoint"),
        (start[:6] == b"\x93NUMPY", "a NumPy array, not a checkpoint"),
        (start[:4] in (b"Rar!", b"7z\xbc\xaf") or start[:2] == b"\x1f\x8b", "a packed archive: unpack it first"),
        (start[:4] == b"\x89PNG" or start[:3] == b"\xff\xd8\xff", "an image, not a checkpoint"),
        (_is_cut_short(start), "ends within its first bytes: is it fully downloaded?"),
        (start[:1] == b"\x80", "a bare pickle, not a PyTorch checkpoint: store it with torch.save"),
        (
            Path(path).suffix == ".json" and head[:1] == b"{",
            "a JSON file, which says what weights beside it are: give the weights, or their folder",
        ),
        (all(byte >= 32 or byte in b"\t\n\r\f" for byte in start), "a text file, not a checkpoint"),
        (True, "neither a safetensors file nor a PyTorch checkpoint: is it fully downloaded?"),
    )
    return f"{path}: " + next(reason for holds, reason in reasons if holds)


def _is_cut_short(start: bytes) -> bool:
    """Whether a file's only bytes are the first of a PyTorch checkpoint, of either form."""
    is_pickle = start[:1] == b"\x80" and (b"\x8a\x0a" + _MAGIC.to_bytes(10, "little")).startswith(start[2:])
    return is_pickle or b"PK\x03\x04".startswith(start)


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
