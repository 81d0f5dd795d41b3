"""README.md and docs/: every command in them is understood, and those that begin the page on training run."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import gligen
from gligen import cli
from gligen.commands import evaluate, sample, train
from gligen.data import __main__ as data
from gligen.data.draw import FORMATS
from gligen.data.open import open_source
from gligen.data.order import split as split_source
from gligen.evaluation import detector
from gligen.modes import MODES
from gligen.pipeline import Pipeline
from gligen.request import parse_request
from gligen.training import diagnosis, positions, report
from gligen.training.data import FEW
from gligen.training.presets import PRESETS, TrainConfig
from gligen.weights import __main__ as weights

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
MAINS: dict[str, Callable[[Sequence[str] | None], Any]] = {
    "sample.py": sample.main,
    "train.py": train.main,
    "evaluate.py": evaluate.main,
    "gligen.data": data.main,
    "gligen.training.report": report.main,
    "gligen.weights": weights.main,
    "gligen.evaluation.detector": detector.main,
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[list[str]]:
    """The words of a block's commands; lines that end in a backslash go on."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def split(words: list[str]) -> tuple[str, list[str], list[str]]:
    """The program, its words, and torchrun's. Programs are scripts of ours or modules of ours after -m."""
    launcher = [] if words[0] == "python" else words
    assert words[0] in ("python", "torchrun"), words
    at = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
    at += words[at] == "-m"
    return words[at], words[at + 1 :], launcher[:at]


class ParsedError(Exception):
    """The command line was understood."""


OF_A_SHELL = ("make", "pip", "cd", "git")
COMMANDS = [
    pytest.param(words, id=f"{page}: {' '.join(words)[:60]}")
    for page in PAGES
    for block in blocks(page, "sh")
    for words in commands(block)
    if words[0] not in OF_A_SHELL
]


def test_there_are_commands_in_every_page_that_people_follow() -> None:
    for page in ("README.md", "train.md", "diagnose.md", "evaluate.md", "from_diffusers.md"):
        assert blocks(page, "sh"), page


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_is_understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags, their number of values and their choices; what they name need not be there."""
    program, given, launcher = split(words)
    parse = cli.Parser.parse_args

    def stop(self: cli.Parser, argv: Sequence[str] | None = None) -> None:
        parse(self, argv)
        raise ParsedError

    monkeypatch.setattr(cli.Parser, "parse_args", stop)
    with pytest.raises(ParsedError):
        MAINS[program](given)
    if program == "train.py":
        assert given[0] in PRESETS
        monkeypatch.undo()
        args = train.build_parser(PRESETS[given[0]]).parse_args(given)
        TrainConfig(**{**vars(PRESETS[given[0]]), **cli.config_fields(args, PRESETS[given[0]])})
    if launcher:
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args([*words[1:]])


def test_the_three_commands_run_as_they_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "mypictures"
    assert cli.run(data.main, ["draw", "--format", "yolo", "--count", "16", "--out", str(pictures)]) == 0
    for words in commands(blocks("train.md", "sh")[0]):
        program, given, _ = split(words)
        given = [w.replace("~", str(tmp_path)).replace("runs/", f"{tmp_path}/runs/") for w in given]
        device = [] if program == "gligen.data" else ["--device", "cpu"]
        assert cli.run(MAINS[program], [*given, *device]) == 0, capsys.readouterr().err
    run = tmp_path / "runs/mine"
    assert Image.open(run / "grid.png").width > 384
    for name in re.findall(r"^\| `([a-z0-9/.]+)`(?:, `([a-z.]+)`)? \|", PAGES["train.md"], re.MULTILINE):
        assert all((run / part).exists() for part in name if part), name
    assert (run / "eval/report.html").exists()
    held_out = split_source(open_source(pictures)[0], 0.25)[1]
    asked = json.loads((run / "eval/asked.json").read_text())["images"]
    assert len(asked) == held_out.size  # what training left out, and nothing else
    assert "images  " in capsys.readouterr().out


def test_the_page_on_training_knows_every_format_and_mode() -> None:
    for name in ("COCO", "YOLO", "VOC", "TSV", "tar shards", "parquet", "Flickr30k", "metadata.jsonl"):
        assert name in PAGES["train.md"]
    assert FORMATS.keys() == {"coco", "yolo", "voc", "tsv", "tar", "folder"}  # of each there is a row
    kinds = {mode.removeprefix("inpaint-") for mode in MODES} - {"hed", "normal"}  # as depth
    assert all(f"`{kind}`" in PAGES["train.md"] or f"train.py {kind} " in PAGES["train.md"] for kind in kinds)


def test_the_page_on_diagnosis_knows_every_advice() -> None:
    def losses(**given: float) -> diagnosis.Losses:
        return diagnosis.Losses(**{"right": 0.5, "null": 0.6, "shuffled": 1.0, "moved": 1.0, **given})

    said = [
        diagnosis.advise(losses(), 0.0, 1000),
        diagnosis.advise(losses(shuffled=0.5), 0.3, 1000),
        diagnosis.advise(losses(moved=0.5), 0.3, 1000),
        positions.advise({"a": positions.Positions(side=8, error=positions.CHANCE)}),
    ]
    rows = [row.removesuffix(" after N steps") for row in re.findall(r"^\| \*(.*?)\* \|", PAGES["diagnose.md"], re.M)]
    assert len(rows) == len(said)
    for row, advice in zip(rows, said, strict=True):
        assert advice is not None
        assert row in advice
    assert f"{FEW - 6} pictures are held out" in PAGES["diagnose.md"]


# __call__ of diffusers' two pipelines, by its documentation (0.36)
DIFFUSERS = [
    "prompt", "height", "width", "num_inference_steps", "guidance_scale", "gligen_scheduled_sampling_beta",
    "gligen_phrases", "gligen_images", "input_phrases_mask", "input_images_mask", "gligen_boxes",
    "gligen_inpaint_image", "negative_prompt", "num_images_per_prompt", "eta", "generator", "latents",
    "prompt_embeds", "negative_prompt_embeds", "output_type", "return_dict", "callback", "callback_steps",
    "cross_attention_kwargs", "gligen_normalize_constant", "clip_skip",
]  # fmt: skip


def test_every_argument_of_diffusers_has_a_row_and_what_it_names_is_there() -> None:
    rows = re.findall(r"^\| (`.*?) \|.*\|.*\|.*\|$", PAGES["from_diffusers.md"], re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(DIFFUSERS)
    known = {flag for action in sample.build_parser()._actions for flag in action.option_strings}
    flags = re.findall(r"(?<!-)--[a-z][a-z-]+", PAGES["from_diffusers.md"])
    assert set(flags) - {"--to"} <= known


@pytest.mark.parametrize("code", blocks("from_diffusers.md", "python"))
def test_the_python_of_the_page_for_diffusers_is_understood(
    code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    load, call = gligen.load, inspect.signature(Pipeline.__call__)
    for name in ("bear.png", "oil.png"):
        Image.new("RGB", (8, 8)).save(name)
    asked = []

    def loaded(*args: Any, **kwargs: Any) -> Callable[..., list[Image.Image]]:
        inspect.signature(load).bind(*args, **kwargs)

        def painted(**fields: Any) -> list[Image.Image]:
            asked.append(parse_request(call.bind(None, **fields).arguments["fields"]))
            return [Image.new("RGB", (8, 8))]

        return painted

    monkeypatch.setattr(gligen, "load", loaded)
    exec(compile(ast.parse(code), "from_diffusers.md", "exec"), {"gligen": gligen})
    assert len(asked) == 1
    assert len(asked[0].entities) == 2


def test_links_between_pages_lead_somewhere() -> None:
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (folder / link).exists(), f"{page}: {link}"


def test_modules_named_in_pages_can_be_imported() -> None:
    for text in PAGES.values():
        for name in re.findall(r"python -m (gligen[\w.]*)", text):
            importlib.import_module(name)
