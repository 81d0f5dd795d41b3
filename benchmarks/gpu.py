"""Everything to be checked and measured on a GPU, the most important first, in the time there is: `make gpu`.

    python -m benchmarks.gpu [--out runs/gpu] [--minutes 10] [--again NAME …] [--list]

Each part is a command with a time limit of its own and nothing else beside it; what it prints is shown at once and kept
in OUT/NAME.txt. Parts that have ended are left out of the next call, so a machine may be taken away at any time. Rows
and profiles go to benchmarks/rows, from which docs/performance.md is made at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from gligen.files import write_atomically

ROOT = Path(__file__).parents[1]
TESTS = ("-m", "pytest", "-q", "-rf", "--tb=short", "-p", "no:cacheprovider", "-m", "cuda", "-o", "addopts=")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of the checks. name: of its files. command: arguments of this Python. seconds: its limit."""

    name: str
    command: tuple[str, ...]
    seconds: int


PARTS = [
    Part(
        name="checks-numbers",
        command=(*TESTS, "tests/pipeline/test_cuda.py", "-k", "original or cpus or every_kind"),
        seconds=60,
    ),
    Part(name="checks-hopper", command=(*TESTS, "tests/kernels/test_attention.py", "-k", "hopper"), seconds=60),
    Part(name="checks-training", command=(*TESTS, "tests/training/test_cuda.py", "-k", "not compiled"), seconds=60),
    Part(
        name="sample-8",
        command=("-m", "benchmarks.sample", "--batch-size", "8", "--steps", "50", "--schedule", "1", "0", "0",
                 "--only", "CUDA graphs", "--only", "diffusers, compiled"),
        seconds=420,
    ),
    Part(
        name="sample-1",
        command=("-m", "benchmarks.sample", "--batch-size", "1", "--steps", "50", "--schedule", "1", "0", "0",
                 "--only", "CUDA graphs"),
        seconds=240,
    ),
    Part(name="profile-8", command=("-m", "benchmarks.profile", "--batch-size", "8"), seconds=240),
    Part(name="profile-1", command=("-m", "benchmarks.profile", "--batch-size", "1"), seconds=240),
    Part(
        name="train-16",
        command=("-m", "benchmarks.train", "--batch-size", "16", "--steps", "8",
                 "--only", "compiled", "--only", "recorded"),
        seconds=420,
    ),
    Part(name="profile-train", command=("-m", "benchmarks.profile", "--train", "--batch-size", "16"), seconds=300),
    Part(name="attention", command=("-m", "benchmarks.attention", "--batch-size", "16"), seconds=180),
    Part(
        name="miniature",
        command=("-m", "benchmarks.train", "--miniature", "--batch-size", "1024", "--steps", "10"),
        seconds=180,
    ),
    Part(
        name="sample-tau",
        command=("-m", "benchmarks.sample", "--batch-size", "8", "--steps", "50", "--only", "CUDA graphs"),
        seconds=300,
    ),
    Part(name="checks-all", command=(*TESTS, "tests"), seconds=1200),
    Part(
        name="ladder",
        command=("-m", "benchmarks.sample", "--batch-size", "8", "--steps", "50", "--schedule", "1", "0", "0"),
        seconds=1200,
    ),
]  # fmt: skip


def pending(parts: list[Part], out: Path, again: list[str]) -> list[Part]:
    """The parts that have not ended well in an earlier call, or are asked for again."""
    return [part for part in parts if part.name in again or _ended(out, part) != 0]


def run(part: Part, out: Path, seconds: float, command: tuple[str, ...] | None = None) -> int:
    """Runs a part for so long at most; returns its exit status, 124 if it ran out of time."""
    began, late = time.monotonic(), threading.Event()
    with (out / f"{part.name}.txt").open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command or (sys.executable, *part.command),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # so that what it has started ends with it
        )

        def stop() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, stop)
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
                file.flush()
            status = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:  # Ctrl-C: the part, in a session of its own, did not hear it
                os.killpg(process.pid, signal.SIGKILL)
    status = 124 if late.is_set() else status
    told = json.dumps({"status": status, "seconds": round(time.monotonic() - began, 1)})
    write_atomically(out / f"{part.name}.json", told.encode())
    return status


def _ended(out: Path, part: Part) -> int | None:
    path = out / f"{part.name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["status"] if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="logs, and what has ended")
    parser.add_argument("--minutes", type=float, default=60.0, metavar="N", help="no part runs beyond this")
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME", help="parts to run though they have ended")
    parser.add_argument("--list", action="store_true", help="show the parts and what has become of them")
    args = parser.parse_args()
    if unknown := [name for name in args.again if name not in {part.name for part in PARTS}]:
        parser.error(f"--again {unknown[0]}: the parts are {', '.join(part.name for part in PARTS)}")
    if args.list:
        for part in PARTS:
            status = _ended(args.out, part)
            told = {None: "to do", 0: "done", 124: "ran out of time"}.get(status, f"failed, status {status}")
            print(f"{part.name:16s} {part.seconds:5d} s  {told}")
        return
    import torch

    if not torch.cuda.is_available():
        parser.error("no GPU that torch can use is here")
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    for part in pending(PARTS, args.out, args.again):
        left = deadline - time.monotonic()
        if left < 20:
            print(f"out of time before {part.name}: the same call goes on there")
            break
        print(f"== {part.name}", flush=True)
        print(f"== {part.name}: status {run(part, args.out, min(part.seconds, left))}", flush=True)
    subprocess.run([sys.executable, "-m", "benchmarks.render"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
