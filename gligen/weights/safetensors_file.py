"""The safetensors format: an 8-byte length, a JSON header, then the tensors' bytes one after another.

Why not by the format's own library: it maps files as fast, and holds more. Measured in one run (safetensors 0.8.0,
torch 2.14, 2 CPU cores, files in the page cache; library / ours; memory above what the process had before):

    checkpoints/scenes-base.safetensors, 14 MB    headers alone 2.0 / 4.9 ms    read as stored 18.9 / 17.8 ms
    2.1 GB of float32, 128 tensors                headers alone 0.4 / 1.4 ms    read as stored 3.0 / 2.0 ms
        read as float16                           0.85 and 1.52 s / 1.40 and 0.82 s (two runs)    3074 / 1030 MiB
        written as float16                        2.54 / 2.22 s                                   1030 / 41 MiB

Its writer takes tensors that are all in memory, in their final precision, where ours streams lazy ones (converted,
stacked, transposed) through; its mapping stays resident until the last tensor is gone, where ours gives back each page
once it is converted. Mapping tensors is needed for PyTorch's zips all the same (tensors.py), so this costs the header's
few lines. Its errors would need our words ('incomplete metadata, file not fully covered' is a download cut off).
The tests hold the two against each other, both ways.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch

from gligen.files import replacing
from gligen.weights.tensors import FileTensor, LazyTensor, MappedFile, narrowed

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100 * 2**20  # the format's own limit


def looks_like_safetensors(path: str | Path) -> bool:
    """True if the first bytes are a header's length and the header's opening brace."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= MAX_HEADER


def read_safetensors(path: str | Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The file's tensors, still in the file, and its metadata.

    Raises ValueError in one line for a header that is cut off or does not describe the bytes behind it.
    """
    file = MappedFile(path)
    assert file.map is not None
    length = int.from_bytes(file.map[:8], "little")
    if 8 + length > file.size:
        raise ValueError(
            f"{path}: its safetensors header should be {length} bytes long but the file ends before: "
            "is it fully downloaded?"
        )
    try:
        header = json.loads(file.map[8 : 8 + length])
        metadata = {str(key): str(value) for key, value in (header.pop("__metadata__", None) or {}).items()}
        entries = {name: _entry(entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: its safetensors header cannot be read ({error})") from error

    tensors: dict[str, LazyTensor] = {}
    base, end = 8 + length, 0
    for name, (dtype, shape, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"{path}: tensor {name!r} of shape {shape} in {dtype} does not fit its bytes {start} to {stop}"
            )
        if base + stop > file.size:
            raise ValueError(
                f"{path}: tensor {name!r} should end at byte {base + stop} but the file has {file.size}: "
                "is it fully downloaded?"
            )
        tensors[name] = FileTensor(file, base + start, dtype, shape)
        end = stop
    if base + end != file.size:
        raise ValueError(f"{path}: {file.size - base - end} bytes follow the last tensor: is the file damaged?")
    return {name: tensors[name] for name in entries}, metadata


def _entry(entry: dict[str, Any]) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r}; the known ones are {', '.join(DTYPES)}")
    shape = tuple(int(size) for size in entry["shape"])
    start, stop = (int(offset) for offset in entry["data_offsets"])
    if min((*shape, start, stop)) < 0:
        raise ValueError("a negative size")
    return DTYPES[entry["dtype"]], shape, start, stop


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    keep: Container[str] = (),
) -> None:
    """Writes `tensors` one at a time, so that no second copy of the weights is ever held.

    dtype: of the floating-point tensors except those in `keep`; None keeps each one's own.
    Writes beside `path` and renames into place. Raises ValueError for numbers that `dtype` cannot hold.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # Widest numbers first, as the format's own library does: every tensor then starts aligned.
    target = {
        name: t.dtype if dtype is None or name in keep or not t.dtype.is_floating_point else dtype
        for name, t in tensors.items()
    }
    order = sorted(tensors, key=lambda name: (-target[name].itemsize, name))
    end = 0
    for name in order:
        size = tensors[name].numel() * target[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": NAMES[target[name]], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            source = tensors[name]
            # A borrowed view of the file is enough to write from; `read` would keep its pages.
            borrowed = narrowed(name, source.borrow(), target[name]).contiguous()
            file.write(borrowed.reshape(-1).view(torch.uint8).numpy().data)
            del borrowed
            source.release()
        file.flush()
        os.fsync(file.fileno())
