"""How well a model keeps to what it is asked: held-out drawn scenes painted and measured.

    python evaluate.py scenes --checkpoint BASE --adapter runs/a/adapter.safetensors --out runs/a/evaluation
    python evaluate.py binding --out runs/binding

Writes OUT/report.json (settings, model, every figure with its spread) and OUT/sheet.png, and prints a table. Which
figures there are depends on the model's mode; an existing report of other settings or another model is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

from gligen import cli
from gligen.evaluation.settings import Settings


def build_parser() -> argparse.ArgumentParser:
    description, epilog = (__doc__ or "").split("\n\n", 1)
    parser = cli.Parser(
        "evaluate.py", description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "measure",
        choices=("scenes", "binding"),
        help="scenes of the drawn world, or sets of two and three objects alike but for colours that are exchanged",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the report and the sheet")
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", metavar="FILE", help="model or base (default: the embedded miniature)")
    model.add_argument("--adapter", metavar="FILE", help="GLIGEN weights to put on the checkpoint")
    cli.add_change_flags(model)
    model.add_argument("--mode", metavar="MODE", help="what a checkpoint is grounded in, where its tensors cannot tell")
    model.add_argument("--clip", metavar="FILE", help="CLIP with its image tower, for reference images and FID")
    model.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)")
    model.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    cli.add_config_flags(parser, Settings())
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    settings = dataclasses.replace(Settings(), **cli.config_fields(args, Settings()))
    if cli.world()[1] > 1:
        raise ValueError("an evaluation needs a single process: run without torchrun")

    import torch  # from here on
    from tqdm import tqdm

    from gligen.device import pick_device, pick_dtype
    from gligen.evaluation.binding import evaluate_binding
    from gligen.evaluation.report import check_folder, table, write_report
    from gligen.evaluation.run import evaluate_scenes
    from gligen.loading import build_pipeline, embedded_base, open_model
    from gligen.weights import read_weights

    changes = {"vae": args.vae, "loras": args.lora}
    model = open_model(args.checkpoint, args.adapter, mode=args.mode, clip=args.clip, **changes)
    grounding = model.config.unet.grounding
    mode = settings.check_mode(grounding.mode if grounding else None)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    files = {name: getattr(args, name) for name in ("checkpoint", "adapter", "clip")} | cli.changes(args)
    origin: dict[str, Any] = {
        "settings": {"measure": args.measure} | dataclasses.asdict(settings) | {"schedule": settings.fusers},
        "model": {"name": model.name, "mode": mode.name, **files, "dtype": str(dtype).removeprefix("torch.")},
    }
    check_folder(args.out, origin)
    pipe = build_pipeline(model, device=device, dtype=dtype)
    base = None
    if settings.ungrounded and not mode.is_inpainting and (args.adapter or args.checkpoint is None):
        untaught = args.checkpoint or embedded_base()
        if not read_weights(untaught).modes:
            base = build_pipeline(open_model(untaught, **changes), device=device, dtype=dtype)
    start = time.perf_counter()
    with tqdm(total=settings.requests * settings.steps, unit="step", desc="painting", disable=None) as bar:
        try:
            if args.measure == "binding":
                evaluation = evaluate_binding(
                    pipe, settings, on_step=lambda progress: bar.update(len(progress.indices))
                )
            else:
                evaluation = evaluate_scenes(
                    pipe, settings, base=base, on_step=lambda progress: bar.update(len(progress.indices))
                )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped: nothing is written before all is measured") from None
    about = origin | {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "seconds": round(time.perf_counter() - start, 1),
    }
    written = write_report(args.out, evaluation, about, settings.sheet)
    print(table(evaluation))
    print(*written, sep="\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
