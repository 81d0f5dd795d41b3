"""Tar shards with an index: pictures a second from them, with stored latents, and what an index of millions costs.

    python -m benchmarks.data [--pictures 200] [--records 10000000]

A row each: decoding 512² JPEGs from a built set, against PIL reading the same files one by one in the same run; words
and latents of 512² pictures where latents are stored; memory and start-up of a process that opens a made-up set of that
many records. All on one core: rates are by processor seconds, which others on the machine change little.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import common
from gligen.data.build import Plan, build
from gligen.data.encodings import ENCODINGS, array_bytes, shard_file
from gligen.data.example import Example, Findings
from gligen.data.shards import INDEX, MANIFEST, Shard, ShardSource, Tally, manifest
from gligen.request import Entity

SIDE = 512
LATENTS = (2, 4, SIDE // 8, SIDE // 8)


class Files:
    """JPEGs in a folder, with what photographs have: large shapes, texture, noise."""

    def __init__(self, folder: Path, count: int, side: int) -> None:
        self.folder, self.size, self.side = folder, count, side

    def key(self, n: int) -> str:
        return f"{n:06d}.jpg"

    def make(self) -> None:
        for n in range(self.size):
            rng = np.random.default_rng(n)
            image = np.zeros((self.side, self.side, 3), np.float32)
            for cells in (4, 16, 64, self.side):
                levels = rng.normal(0, 1, (min(cells, self.side),) * 2 + (3,)).astype(np.float32)
                layer = [np.asarray(Image.fromarray(levels[..., c]).resize(image.shape[:2], 2)) for c in range(3)]
                image += np.stack(layer, -1) * (40 if cells == 4 else 12)
            content = io.BytesIO()
            Image.fromarray((image + 128).clip(0, 255).astype(np.uint8)).save(content, "JPEG", quality=90)
            (self.folder / self.key(n)).write_bytes(content.getvalue())

    def picture(self, n: int) -> bytes:
        return (self.folder / self.key(n)).read_bytes()

    def pixels(self, n: int) -> np.ndarray:
        return np.asarray(Image.open(self.folder / self.key(n)).convert("RGB"))

    def example(self, n: int) -> Example:
        entities = tuple(Entity(phrase=f"thing {n % 80} {i}", box=(0.1, 0.1, 0.5 + i / 10, 0.9)) for i in range(4))
        return Example(image=self.pixels(n), caption="a caption of about ten words", entities=entities, key=self.key(n))


def rates(repeats: int, count: int, **runs: Callable[[int], object]) -> dict[str, float]:
    """Calls a processor second of each, the best of the repeats; they take turns call by call."""
    best = dict.fromkeys(runs, 0.0)
    for _ in range(repeats):
        seconds = dict.fromkeys(runs, 0.0)
        for n in range(count):
            for name, run in runs.items():
                start = time.process_time()
                run(n)
                seconds[name] += time.process_time() - start
        best = {name: max(best[name], count / seconds[name]) for name in runs}
    return best


def store_latents(folder: Path, source: ShardSource) -> None:
    for shard in source.shards:
        rows = np.random.default_rng(0).standard_normal((shard.records, *LATENTS), np.float32).astype(np.float16)
        np.save(folder / shard_file(shard.name, "latents"), rows)
    facts = {"latents": {"encoder": "none", "fingerprint": "0", "size": [SIDE, SIDE]}}
    (folder / ENCODINGS).write_text(json.dumps(facts))


def make_large(folder: Path, records: int) -> None:
    """A set of that many records in shards of 1000: links to one real tar."""
    (folder / "tiny").mkdir()
    files = Files(folder / "tiny", min(1000, records), 16)
    files.make()
    build(files, Findings(format="files"), folder / "small", shard_size=1e6)
    small = ShardSource(folder / "small")
    out = folder / "large"
    out.mkdir()
    number = records // small.size
    rows = np.tile(np.load(folder / "small" / INDEX), (number, 1))
    rows[:, 0] = np.repeat(np.arange(number), small.size)
    (out / INDEX).write_bytes(array_bytes(rows, "<u4"))
    size = small.shards[0].size
    shards = [Shard(name=f"{k:05d}.tar", records=small.size, size=size) for k in range(number)]
    for shard in shards:
        os.link(folder / "small" / "00000.tar", out / shard.name)
    plan = Plan(source="made", first="", last="", mode="box-text", examples=len(rows), shard_size=1, per_shard=1000)
    (out / MANIFEST).write_bytes(manifest(shards, Tally(records=len(rows)), **asdict(plan)))


def open_large(folder: Path) -> dict[str, float]:
    """Measures in a process of its own seconds to the first example, and MiB of memory: what the set and a thousand of
    its examples add, and all that the process has, imports included."""
    before = _resident()
    start = time.perf_counter()
    source = ShardSource(folder)
    source.example(source.size // 2)
    seconds = time.perf_counter() - start
    for n in np.random.default_rng(0).integers(0, source.size, 1000).tolist():
        source.example(n)
    after = _resident()
    return {"records": source.size, "start_seconds": seconds, "mib": after - before, "process_mib": after}


def _resident() -> float:
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes where there is no /proc: macOS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--pictures", type=int, default=200, metavar="N")
    parser.add_argument("--records", type=int, default=10_000_000, metavar="N", help="of the large index")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="the fastest of these counts")
    parser.add_argument("--rows", type=Path, default=common.ROWS, metavar="DIR", help="where rows are appended")
    parser.add_argument("--open", type=Path, metavar="DIR", help=argparse.SUPPRESS)  # the process of its own
    args = parser.parse_args()
    if args.open:
        print(json.dumps(open_large(args.open)))
        return
    torch.set_num_threads(1)
    rows = common.Rows("data", args, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "files").mkdir()
        files = Files(folder / "files", args.pictures, SIDE)
        files.make()
        build(files, Findings(format="files"), folder / "set", shard_size=4)
        source = ShardSource(folder / "set")
        found = rates(args.repeats, source.size, files=files.pixels, shards=source.example)
        kib = sum(len(files.picture(n)) for n in range(files.size)) / files.size / 2**10
        rows.write(
            what="decoded from shards",
            per_second=found["shards"],
            against=found["files"],
            kib=kib,
            examples=source.size,
        )
        store_latents(folder / "set", source)
        source = ShardSource(folder / "set")
        found = rates(args.repeats, source.size, latents=lambda n: (source.words(n), source.latents(n)))
        rows.write(what="with stored latents", per_second=found["latents"], examples=source.size)
        make_large(folder, args.records)
        opened = [sys.executable, "-m", "benchmarks.data", "--open", str(folder / "large")]
        rows.write(what="large index", **json.loads(subprocess.check_output(opened)))


if __name__ == "__main__":
    main()
