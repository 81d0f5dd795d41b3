"""How well a model keeps to what it is asked: images generated and measured.

    python evaluate.py pictures --data val/ --checkpoint BASE --adapter runs/a/adapter.safetensors --out runs/a/val
    python evaluate.py pictures --requests mig_bench_anno.yaml --detections found.json --out runs/a/mig
    python evaluate.py scenes --checkpoint BASE --adapter runs/a/adapter.safetensors --out runs/a/evaluation
    python evaluate.py binding --out runs/binding
    python evaluate.py detections --truth instances.json --detections found.json

Each has its own --help. `pictures` goes on where it was stopped, shares the work under torchrun, and measures again
with other tools without generating anything twice. Which metrics there are depends on the model's mode and on what is
given; a folder of another run is refused. docs/evaluate.md explains them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from gligen import cli
from gligen.data.flags import MAX_BAD
from gligen.evaluation.protocols import PROTOCOLS, get_protocol
from gligen.evaluation.settings import Settings


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command's flags, one subcommand for each way to measure."""
    description, epilog = (__doc__ or "").split("\n\n", 1)
    parser = cli.Parser(
        "evaluate.py", description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    measures = parser.add_subparsers(dest="measure", required=True, metavar="{pictures,scenes,binding,detections}")
    pictures = measures.add_parser("pictures", help="a data set or request set, with files and tools of yours")
    _add_pictures(pictures)
    scenes = measures.add_parser("scenes", help="held-out scenes of the drawn world")
    binding = measures.add_parser(
        "binding", help="two and three drawn objects alike but for colours that are exchanged"
    )
    for each in (scenes, binding):
        each.add_argument("--out", required=True, metavar="DIR", help="folder for the report and the sheet")
        _add_model(each)
        cli.add_config_flags(each, Settings())
    detections = measures.add_parser("detections", help="detections of any images, against any COCO annotations")
    _add_detections(detections)
    for each in (pictures, scenes, binding, detections):
        each.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--checkpoint", metavar="FILE", help="model or base (default: the embedded miniature)")
    model.add_argument("--adapter", metavar="FILE", help="GLIGEN weights to put on the checkpoint")
    cli.add_change_flags(model)
    model.add_argument("--mode", metavar="MODE", help="what a checkpoint is grounded in, where its tensors cannot tell")
    model.add_argument("--clip", metavar="FILE", help="CLIP with its image tower: reference images, CLIP score, FID")
    model.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu (default: auto)")
    model.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for images and report; a run goes on there")
    asked = parser.add_argument_group("what is asked for")
    asked.add_argument("--data", metavar="PATH", help="a data set, whose images are asked for again")
    asked.add_argument("--captions-file", metavar="FILE", help="COCO captions of the data that lie elsewhere")
    asked.add_argument("--images", metavar="FOLDER", help="images of the data that lie elsewhere")
    asked.add_argument("--maps", metavar="FOLDER", help="maps that lie elsewhere; canny or scribble makes them")
    asked.add_argument("--masks", metavar="FOLDER", help="inpainting masks, white where to repaint (default: boxes)")
    asked.add_argument(
        "--max-bad", type=float, default=MAX_BAD, metavar="X", help="share of images that may be bad (default: 0.01)"
    )
    asked.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="X",
        help="only the share of --data that train.py --held-out X holds out; 0: all (default: 0)",
    )
    asked.add_argument("--requests", metavar="FILE", help="requests: ours, COCO-MIG's YAML or 7Bench's CSV")
    asked.add_argument("--count", type=int, metavar="N", help="the first N of them (default: all)")
    asked.add_argument(
        "--captions",
        choices=("full", "detection", "null"),
        help="as they are, class names and commas, or none (default: full)",
    )
    asked.add_argument("--ungrounded", action="store_true", help="captions alone (β = 0), against the same boxes")
    asked.add_argument(
        "--repaint", choices=("all", "one"), help="of inpainting: all objects of an image or one (default: all)"
    )
    asked.add_argument("--protocol", metavar="NAME", help=f"a published table: {', '.join(PROTOCOLS)}")
    _add_model(parser)
    parser_generation = parser.add_argument_group(
        "generation", "override what a request file says; data sets and benchmarks are grounded throughout (1 0 0)"
    )
    parser_generation.add_argument("--vocab", metavar="FILE", help="WordPiece vocabulary, for LDM text2img-large")
    cli.add_generation_flags(parser_generation)
    parser_generation.add_argument("--batch-size", type=int, default=8, metavar="N", help="at once (default: 8)")
    tools = parser.add_argument_group("measured with", "what is not given is named in the report as not measured")
    tools.add_argument("--detections", metavar="FILE", help="COCO results of OUT/images by any tool")
    tools.add_argument("--categories", metavar="FILE", help="COCO file that names the category_id of --detections")
    tools.add_argument("--detector", metavar="NAME", help="torchvision's, such as fasterrcnn_resnet50_fpn_v2")
    tools.add_argument("--detector-weights", metavar="FILE", help="its state dict")
    tools.add_argument("--detector-classes", metavar="FILE", help="a class name a line, from label 1 (default: COCO's)")
    tools.add_argument("--class-agnostic", action="store_true", help="a detection of any class may find a box")
    tools.add_argument("--inception", metavar="FILE", help="Inception weights of FID, as torch-fidelity has them")
    tools.add_argument("--features", metavar="FILE", help=".npy (images, D): features of another network for FID")
    tools.add_argument(
        "--reference", metavar="PATH", help="real images: folder, .npz (mu, sigma), .npy (default: the data set's)"
    )
    parser.add_argument("--sheet", type=int, default=100, metavar="N", help="images on the page (default: 100)")


def _add_detections(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--truth", required=True, metavar="FILE", help="COCO annotations, such as asked.json")
    parser.add_argument("--detections", required=True, metavar="FILE", help="COCO results of any tool")
    parser.add_argument("--categories", metavar="FILE", help="COCO file that names the category_id of --detections")
    parser.add_argument("--kind", choices=("bbox", "segm", "keypoints"), default="bbox", help="default: bbox")
    parser.add_argument("--class-agnostic", action="store_true", help="a detection of any class may find an object")
    parser.add_argument("--json", action="store_true", help="print metrics as JSON")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. argv: its arguments, by default the process's own. Raises as `gligen.cli.run` reports it."""
    args = build_parser().parse_args(argv)
    {"pictures": _pictures, "detections": _detections}.get(args.measure, _drawn)(args)


def _pictures(args: argparse.Namespace) -> None:
    protocol = get_protocol(args.protocol) if args.protocol else None
    if (args.data is None) == (args.requests is None):
        raise ValueError("give either --data with a data set or --requests with a file")
    beside = ("captions_file", "images", "maps", "masks", "held_out")
    if args.data is None and (given := [name for name in beside if getattr(args, name)]):
        raise ValueError(f"--{given[0].replace('_', '-')} says more about --data: give that too")
    if not 0 <= args.held_out < 1:
        raise ValueError(f"--held-out is {args.held_out}: give a share from 0, for all, to below 1")
    if args.count is not None and args.count < 1:
        raise ValueError(f"--count is {args.count}: give 1 or more")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}: give 1 or more")
    if args.sheet < 0:
        raise ValueError(f"--sheet is {args.sheet}: give 0 or more")
    fields = {name: value for name, value in vars(args).items() if name in cli.GENERATION_FIELDS}
    if args.ungrounded and not fields.keys().isdisjoint(("schedule", "tau")):
        raise ValueError("--ungrounded and a schedule are both given: leave one out, nothing grounded has no schedule")
    from gligen.evaluation.run_pictures import run_pictures

    run_pictures(args, fields, protocol)


def _detections(args: argparse.Namespace) -> None:
    from gligen.evaluation.coco import check_dataset, coco_metrics, read_detections, read_json, require_evaluator

    require_evaluator()
    truth = check_dataset(read_json(args.truth, "--truth"), f"--truth '{args.truth}'")
    detections = read_detections(args.detections, truth, args.categories)
    metrics = coco_metrics(truth, detections, args.kind, class_agnostic=args.class_agnostic)
    if detections.unknown:
        print(f"{sum(detections.unknown.values())} detections are of classes that the truth lacks", file=sys.stderr)
    if args.json:
        print(json.dumps(metrics, indent=1))
    else:
        for name, value in metrics.items():
            print(f"{name:<12}{'–' if value is None else f'{value:.6f}'}")


def _drawn(args: argparse.Namespace) -> None:
    settings = dataclasses.replace(Settings(), **cli.config_fields(args, Settings()))
    if cli.world()[1] > 1:
        raise ValueError("an evaluation of drawn scenes needs a single process: run without torchrun")

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
        "settings": {"measure": args.measure} | dataclasses.asdict(settings) | {"schedule": settings.gate_schedule},
        "model": {"name": model.name, "mode": mode.name, **files, "dtype": str(dtype).removeprefix("torch.")},
    }
    check_folder(args.out, origin)
    pipe = build_pipeline(model, device=device, dtype=dtype)
    base = None
    if settings.ungrounded and not mode.is_inpainting and (args.adapter or args.checkpoint is None):
        plain = args.checkpoint or embedded_base()
        if not read_weights(plain).modes:
            clip = args.clip if "text_encoder" in model.from_clip else None
            base = build_pipeline(open_model(plain, clip=clip, **changes), device=device, dtype=dtype)
    start = time.perf_counter()
    with tqdm(total=settings.requests * settings.steps, unit="step", desc="sampling", disable=None) as bar:
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


def entry() -> int:
    """The command `gligen-evaluate`, and evaluate.py of a checkout."""
    return cli.run(main)
