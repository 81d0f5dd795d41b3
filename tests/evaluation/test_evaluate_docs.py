"""docs/evaluate.md: its first commands run as they stand (tests/test_docs.py: all others are understood)."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

from gligen import cli
from gligen.commands import evaluate
from gligen.evaluation.protocols import PROTOCOLS
from gligen.evaluation.run_pictures import gather

PAGE = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()
FIRST, *_ = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)


def test_the_way_on_the_embedded_miniature_can_be_gone(tmp_path, capsys):
    pytest.importorskip("faster_coco_eval")
    for line in FIRST.strip().splitlines():
        _, *words = shlex.split(line.replace("runs/", f"{tmp_path}/"))
        if words[0] == "-m":
            name = words[1] if words[1] != "gligen.data" else "gligen.data.__main__"
            assert cli.run(importlib.import_module(name).main, words[2:]) == 0, line
        else:
            assert words[0] == "evaluate.py"
            assert cli.run(evaluate.main, [*words[1:], "--device", "cpu"]) == 0, line
    assert "boxes AP50" in capsys.readouterr().out
    report = json.loads((tmp_path / "val" / "report.json").read_text())
    assert report["generated"]["images"] == 0
    assert report["figures"]["images"] == 6
    for name in re.findall(r"^\| `([a-z]+\.[a-z]+)` \|", PAGE, re.MULTILINE):
        assert (tmp_path / "val" / name).exists()


def test_the_protocols_are_those_of_the_table():
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` \| .* \| (.*) \|$", PAGE, re.MULTILINE))
    assert rows.keys() == PROTOCOLS.keys()
    for name, text in rows.items():
        said = {float(number) for number in re.findall(r"\d+\.\d+", text)}
        scale = {"FID": 1}
        rows = [{round(v * scale.get(k, 100), 2) for k, v in row.items()} for row in PROTOCOLS[name].published.values()]
        assert said in rows


def test_flags_override_a_protocol():
    parse = evaluate.build_parser().parse_args
    protocol = PROTOCOLS["coco2014-detection"]
    base = ["pictures", "--data", "x", "--out", "y"]
    how = gather(parse(base), {}, protocol)
    assert (how.captions, how.fields, how.seed) == ("null", {"size": [256, 256]}, None)
    how = gather(parse([*base, "--captions", "full"]), {"size": [64, 64], "seed": 3}, protocol)
    assert (how.captions, how.fields, how.seed) == ("full", {"size": [64, 64]}, 3)
