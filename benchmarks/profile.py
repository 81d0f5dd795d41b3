"""Where the GPU's time goes: the kernels of one short run by name, which benchmarks/render.py sorts into classes.

    python -m benchmarks.profile [--device cuda] [--model sd] [--batch-size 8] [--steps 6] [--train]

Sampling is profiled as the ladder's last exact rung does it, guided and grounded throughout, decoding included; with
--train, one recorded optimiser step. Written to ROWS/profiles/NAME.txt: a line of milliseconds, share, calls and name
for each kernel, the longest first.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks import common, sample, train
from gligen.runtime import warm_up
from gligen.training.engine.loader import StepBatches
from gligen.training.engine.step import WARM_UP

CLASSES = {  # the first that fits a kernel's name is its class
    "attention": r"sdpa|fmha|flash|attention|_forward_kernel|_grad_kernel|compute_dot_do_o|convert_dq",
    "convolutions": r"implicit_gemm|xmma|fprop|dgrad|wgrad|conv2d|cudnn",
    "linear layers": r"nvjet|gemm|cublas|cutlass",
    "GEGLU": r"gelu|geglu",
    "normalisation": r"group_norm|layer_norm|RowwiseMoments|GroupNorm|rsqrt|mean_pow",
    "change of size": r"upsample|unsafe_index",
    "optimiser": r"multi_tensor|foreach|adam",
    "joining": r"[Cc]at(Array|_)|_cat$",
    "copies, additions": r"elementwise|copy|Memcpy|Memset|add",
    "other": r"",
}


def kernel_class(name: str) -> str:
    """The class of `CLASSES` that a kernel's name belongs to."""
    return next(kind for kind, pattern in CLASSES.items() if re.search(pattern, name))


def by_class(text: str) -> dict[str, float]:
    """Milliseconds by class, and `total`, of a profile's text. Kernels too short to be listed count as other."""
    total = re.match(r"total ([\d.]+) ms", text)
    if total is None:
        raise ValueError("no profile: its first line is not 'total … ms'")
    found: dict[str, float] = {"total": float(total[1]), **dict.fromkeys(CLASSES, 0.0)}
    for line in re.finditer(r"^ *([\d.]+) ms +[\d.]+% +x *\d+ +(.*)$", text, re.MULTILINE):
        found[kernel_class(line[2])] += float(line[1])
    found["other"] += found["total"] - sum(found[kind] for kind in CLASSES)
    return found


def kernels(run: Callable[[], object]) -> str:
    """The profile of a call, as text."""
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as told:
        run()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in told.events():
        if event.device_type == DeviceType.CUDA:
            times[event.name[:160]][0] += event.device_time_total / 1000
            times[event.name[:160]][1] += 1
    total = sum(each for each, _ in times.values())
    lines = [f"total {total:.2f} ms"]
    for name, (each, calls) in sorted(times.items(), key=lambda item: -item[1][0])[:80]:
        lines.append(f"{each:9.3f} ms {100 * each / total:5.1f}% x{int(calls):5d}  {name}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = common.parser(__doc__, steps=6, repeats=1, batch_size=8)
    parser.add_argument("--train", action="store_true", help="one optimiser step instead of sampling")
    args = parser.parse_args()
    device, model, is_compiled = common.choose(args)
    if device.type != "cuda":
        parser.error("profiles are of a GPU's kernels: give --device cuda on a machine with one")
    config = common.MODELS[model]
    folder: Path = args.rows / "profiles"
    folder.mkdir(parents=True, exist_ok=True)
    if args.train:
        rung = dict(train.ladder(device, is_compiled, args.batch_size))["+ steps recorded as one graph"]
        with TemporaryDirectory() as out:
            loop = train.build(config, device, Path(out), rung, args.batch_size)
            made = StepBatches(batches=loop.task.batches, batch_size=args.batch_size)
            batches = [made[0].pin_memory(), made[1].pin_memory()]
            for k in range(2 + WARM_UP):
                loop.train_step(iter([batches[min(k, 1)]]))
            text = kernels(lambda: loop.train_step(iter([batches[1]])))
    else:
        last = [rung for rung in sample.ladder(device, is_compiled) if not rung.backend and not rung.quantize][-1]
        pipe = sample.build(config, device, last)
        request = sample.request_of(args.steps, args.batch_size, (1.0, 0.0, 0.0))
        warm_up(pipe, request, args.batch_size)
        text = kernels(lambda: list(pipe.generate([request], batch_size=args.batch_size)))
    name = f"{'train' if args.train else 'sample'}-{model}-b{args.batch_size}.txt"
    (folder / name).write_text(text, encoding="utf-8")
    print(folder / name, {kind: round(ms, 2) for kind, ms in by_class(text).items()})


if __name__ == "__main__":
    main()
