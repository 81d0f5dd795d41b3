"""The page of results and the picture of a run, from made-up figures in a temporary folder."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from experiments import results
from experiments.claims import CLAIMS, Measure, Row, compare
from gligen import cli
from gligen.plots import read_log, series
from gligen.training import report
from gligen.training.grounding_task import train
from gligen.training.presets import PRESETS
from tests.training.helpers import quick, write_base

pytest.importorskip("matplotlib", reason="pictures need it: pip install gligen[results]")


def evaluation(table: str, row: str, found: float, *, fid: float | None = None, **settings: Any) -> dict[str, Any]:
    """As an evaluation's file; found is the share of objects in place, of held-out pairs half as many are."""
    group = {
        "objects": 400,
        "found": {"value": found, "spread": 0.02},
        "found_with_shape": {"value": found / 2, "spread": 0.02},
        "mean_iou": {"value": 0.9 * found, "spread": 0.01},
        "mean_iou_found": {"value": None, "spread": None},
        "ap50": 0.321,
    }
    held_out = {**group, "found": {"value": found / 2, "spread": 0.03}}
    figures: dict[str, Any] = {"images": 256, "all": group, "seen": group, "held_out": held_out}
    if fid is not None:
        figures["fid"] = {"value": fid, "floor": 0.5}
    return {"table": table, "row": row, "settings": {"seeds": 2, **settings}, "figures": figures}


def write(docs: Path, **files: dict[str, Any]) -> str:
    """The page made of these evaluations, after all that lies there already."""
    folder = docs / "results/data"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return results.write_results(docs).read_text()


def verdict(name: str, *rows: dict[str, Any]) -> str:
    claim = next(claim for claim in CLAIMS if claim.name == name)
    return claim.verdict(
        [Row(table=r["table"], label=r["row"], settings=r["settings"], metrics=r["figures"]) for r in rows]
    )


def test_page_holds_the_numbers_and_lists_what_was_not_measured(tmp_path: Path) -> None:
    page = write(
        tmp_path,
        a=evaluation("grounded", "grounded", 0.8, fid=2.5),
        b=evaluation("grounded", "not grounded", 0.1),
    )
    assert "| grounded | 80.0 ± 2.0 % | 40.0 ± 2.0 % | 0.720 ± 0.010 | 0.321 | 2.5 (floor 0.5) | 256 | 2 |" in page
    assert "| not grounded | 10.0 ± 2.0 % | 5.0 ± 2.0 % | 0.090 ± 0.010 | 0.321 | – | 256 | 2 |" in page
    flat = " ".join(page.split())
    assert "ordering shows here: grounded finds 80.0 ± 2.0 % of the asked objects" in flat
    assert "(+70.0 points)" in flat
    assert "of held-out pairs grounding finds 40.0 ± 3.0 %, the caption alone 5.0 ± 3.0 %" in flat  # of the same rows
    missing = page[page.index("## Not measured yet") :]
    for title in (
        "Scheduled sampling",
        "Gated self-attention",
        "Null caption",
        "Curves of the base",
        "Nothing is forgotten",
    ):
        assert title in missing
        assert f"## {title}" not in page
    assert "Grounded or not" not in missing


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (0.7, 0.5, "The paper's ordering shows here"),
        (0.5, 0.7, "the other way round"),
        (0.52, 0.5, "No difference shows here beyond the spread"),  # 0.02, where the spread is 0.028
    ],
)
def test_verdict_follows_the_ordering(first: float, second: float, said: str) -> None:
    assert said in verdict("fuser", evaluation("fuser", "gatedSA", first), evaluation("fuser", "gatedCA", second))


def test_a_report_of_evaluate_becomes_a_row(tmp_path: Path) -> None:
    objects = evaluation("grounded", "grounded", 0.8)["figures"]
    fid = {"pictures": {"value": 0.0123, "spread": 0.002}, "floor": {"value": 0.004, "spread": 0.001}, "width": 96}
    report = {
        "settings": {"requests": 256, "schedule": [0.3, 0, 0.7], "sampler": "dpmpp", "steps": 20, "guidance": 4.0},
        "model": {"name": "base + adapter"},
        "figures": {"objects": objects, "fid": fid},
    }
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report))
    docs = tmp_path / "docs"
    argv = ["--docs", str(docs), "--add", "tau", "0.3", str(file)]
    assert cli.run(results.main, argv) == 0
    page = (docs / "results.md").read_text()
    cells = "80.0 ± 2.0 % | 40.0 ± 2.0 % | 0.720 ± 0.010 | 0.321 | 0.0123 ± 0.002 (floor 0.004) | dpmpp 20, 4 | 256 | 1"
    assert f"| 0.3 | {cells} |" in page
    file.write_text("{}")
    assert cli.run(results.main, argv) == 2


def test_reports_of_several_seeds_become_one_row_of_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for seed, found in enumerate((0.80, 0.86, 0.89)):  # their mean 0.85, s = √(0.0021) = 0.0458, s / √3 = 0.0265
        figures = {"objects": evaluation("tau", "", found)["figures"], "fid": None}
        settings = {"schedule": [1.0, 0, 0], "sampler": "dpmpp", "steps": 20, "guidance": 4.0, "requests": 100}
        file = tmp_path / f"{seed}.json"
        file.write_text(
            json.dumps({"settings": {**settings, "seed": seed}, "model": {"name": "m"}, "figures": figures})
        )
        files.append(file)
    argv = ["--docs", str(tmp_path), "--add", "tau", "1.0"]
    assert cli.run(results.main, [*argv, *map(str, files)]) == 0
    # of held-out pairs half as many are found: s is 0.0229, below the 0.03 of resampled images, whose part is 0.0173
    made = json.loads((tmp_path / "results/data/tau-1.0.json").read_text())
    assert made["settings"]["seeds"] == [0, 1, 2]
    assert made["figures"]["held_out"]["found"]["spread"] == pytest.approx(0.03 / 3**0.5)
    assert "| 1.0 | 85.0 ± 2.6 % |" in (tmp_path / "results.md").read_text()
    assert "| dpmpp 20, 4 | 100 | 3 |" in (tmp_path / "results.md").read_text()
    other = json.loads(files[2].read_text())
    other["settings"]["steps"] = 50
    files[2].write_text(json.dumps(other))
    assert cli.run(results.main, [*argv, *map(str, files)]) == 2
    assert "in steps, not in its seed alone" in capsys.readouterr().err
    assert cli.run(results.main, argv) == 2


def test_binding_has_a_table_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docs = tmp_path / "docs"
    for row, success in (("grounded", 0.5), ("not grounded", 0.1)):
        shares = {"success": success, "exchanged": 0.25, "pictures": 0.3, "mean_iou": 0.4}
        figures = {"instances": 240} | {name: {"value": value, "spread": 0.01} for name, value in shares.items()}
        settings = {"requests": 100, "schedule": [1, 0, 0], "sampler": "dpmpp", "steps": 20, "guidance": 4.0}
        file = tmp_path / f"{row}.json"
        report = {"settings": settings, "model": {"name": "m"}, "figures": {"binding": {"all": figures}}}
        file.write_text(json.dumps(report))
        assert cli.run(results.main, ["--docs", str(docs), "--add", "binding", row, str(file)]) == 0
    page = (docs / "results.md").read_text()
    assert "| grounded | 50.0 ± 1.0 % | 25.0 ± 1.0 % | 30.0 ± 1.0 % | 0.400 ± 0.010 | dpmpp 20, 4 | 100 | 1 |" in page
    assert "Grounding binds: 50.0 ± 1.0 % of the instances are as asked" in " ".join(page.split())
    assert cli.run(results.main, ["--docs", str(docs), "--add", "grounded", "grounded", str(file)]) == 2
    assert "table binding, and no other" in capsys.readouterr().err


def test_what_a_table_cannot_take_is_not_filed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    settings = {"requests": 256, "schedule": [1.0, 0, 0]}
    file.write_text(json.dumps({"settings": settings, "model": {"name": "m"}, "figures": {"fid": None}}))
    for table, told in (("grunded", "table is 'grunded': the known ones are grounded"), ("steps", "--training-steps")):
        assert cli.run(results.main, ["--docs", str(tmp_path), "--add", table, "x", str(file)]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_verdict_is_withheld_where_numbers_do_not_allow_one() -> None:
    a, b = (
        evaluation("fuser", "gatedSA", 0.7, training_steps=900),
        evaluation("fuser", "gatedCA", 0.5, training_steps=800),
    )
    assert "No verdict: gatedSA had 900 training steps, gatedCA 800" in verdict("fuser", a, b)
    assert "No verdict: it takes the rows" in verdict("fuser", a)
    b = evaluation("fuser", "gatedCA", 0.5)
    b["figures"]["images"] = 8
    assert "were not measured on as many images" in verdict("fuser", a, b)
    b = evaluation("fuser", "gatedCA", 0.5, training_steps=900)
    b["figures"]["all"]["found"]["spread"] = None
    assert "No verdict, as a spread is missing" in verdict("fuser", a, b)
    assert compare(Measure(0.5, 0.1), Measure(0.4)) is None
    assert verdict("tau", evaluation("tau", "1", 0.5, tau=1.0)).startswith("No verdict")


def test_null_caption_needs_to_do_no_better_only_as_well() -> None:
    def said(null: float) -> str:
        rows = evaluation("caption", "caption", 0.6), evaluation("caption", "null caption", null)
        return verdict("caption", *rows)

    assert "As the paper has it" in said(0.6)
    assert "the other way round" in said(0.4)


def test_scheduled_sampling_is_judged_by_quality_and_by_cost(tmp_path: Path) -> None:
    def rows(fid: float, found: float, spread: float | None = 0.1) -> list[dict[str, Any]]:
        taus = ((1.0, 0.8, 3.0), (0.3, found, fid), (0.0, 0.1, 2.0))
        made = [evaluation("tau", f"τ = {tau}", share, fid=f, tau=tau) for tau, share, f in taus]
        for row in made:
            row["figures"]["fid"] |= {"spread": spread}
        return made

    assert "trade shows here" in verdict("tau", *rows(2.5, 0.79))
    assert "FID is 2.5 ± 0.1 at τ = 0.3" in verdict("tau", *rows(2.5, 0.79))
    assert "grounding is clearly worse" in verdict("tau", *rows(2.5, 0.5))
    assert "gain in quality does not show here" in verdict("tau", *rows(3.5, 0.79))
    assert "nowhere clearly lower" in verdict("tau", *rows(2.8, 0.79))  # 0.2 less, where the spread is 0.14
    assert "No verdict, as a spread is missing" in verdict("tau", *rows(2.5, 0.79, None))
    page = write(tmp_path, **{f"row{i}": row for i, row in enumerate(rows(2.5, 0.79))})
    assert page.index("| τ = 0.0 |") < page.index("| τ = 0.3 |") < page.index("| τ = 1.0 |")
    assert "(results/tau.png)" in page
    assert (tmp_path / "results/tau.png").exists()


def test_other_verdicts() -> None:
    kept = {"table": "forgetting", "row": "box-text", "settings": {}, "figures": {"images": 8, "max_difference": 0.0}}
    assert "bit-equal" in verdict("forgetting", kept)
    assert "differ" in verdict("forgetting", kept, {**kept, "figures": {"max_difference": 1e-3}})
    few, many = (evaluation("steps", "", found, training_steps=n) for n, found in ((100, 0.2), (900, 0.6)))
    assert verdict("steps", few, many).startswith("Accuracy rises with training: 20.0 ± 2.0 %")
    more = evaluation("steps", "", 0.5, training_steps=2000)
    assert verdict("steps", few, many, more).endswith("50.0 ± 2.0 % after 2,000; most, 60.0 ± 2.0 %, after 900.")
    people = {"table": "other-modes", "row": "keypoint", "settings": {}, "figures": {"near": 0.75}}
    plain = {**people, "row": "keypoint, not grounded", "figures": {"near": 0.05}}
    assert "keypoint 75.0 %, without grounding 5.0 % (no spread given)" in verdict("other-modes", people, plain)


def write_log(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for step in (0, 50, 100):
        losses = {"right": 0.09 - step / 2000, "null": 0.09, "shuffled": 0.1, "right_over_shuffled": 0.9 - step / 200}
        lines += [
            {"step": step, "loss": 0.3, "gates": {"mean": 0.1, "max": step / 200}},
            {"step": step, "diagnosis": losses, "fusers": {"input_blocks.1.1": [0.1, 0.2]}},
            {"step": step, "preview": {"found": step / 100, "found_with_shape": step / 200}},
        ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '7\n{"step": 150, "los')


def test_logs_become_curves_and_sheets_are_shown_and_the_same_data_give_the_same_page(tmp_path: Path) -> None:
    data = tmp_path / "results/data"
    write_log(data / "box-text.jsonl")
    for name, metric in {"base-clip": "object_top1", "base-vae": "psnr", "base-unet": "eval_loss"}.items():
        (data / f"{name}.jsonl").write_text(f'{{"step": 10, "loss": 1.0}}\n{{"step": 10, "{metric}": 0.5}}\n')
    (tmp_path / "results/sheets").mkdir()
    for name in ("grounded", "all-modes"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"results/sheets/{name}.png")
    page = write(tmp_path, a=evaluation("grounded", "grounded", 0.8))
    for picture in ("base.png", "log-box-text.png", "sheets/grounded.png", "sheets/all-modes.png"):
        assert page.count(f"(results/{picture})") == 1
    assert "`box-text`, 100 steps" in page
    assert page.index("sheets/grounded.png") < page.index("## Curves") < page.index("sheets/all-modes.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    assert write(tmp_path) == page
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before


def test_wrong_data_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(docs: Path) -> str:
        assert cli.run(results.main, ["--docs", str(docs)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "is not there" in error(tmp_path / "none")
    data = tmp_path / "results/data"
    data.mkdir(parents=True)
    file = data / "a.json"
    file.write_text("{")
    assert "a.json' is no JSON" in error(tmp_path)
    file.write_text('{"table": "grounded", "row": "x", "settings": {}}')
    assert "a.json' has no figures" in error(tmp_path)
    file.write_text(json.dumps(evaluation("gates", "x", 0.5)))
    assert "'gates': the known ones are grounded, fuser" in error(tmp_path)
    file.write_text(json.dumps(evaluation("tau", "x", 0.5)))
    assert "settings has no tau" in error(tmp_path)
    assert not (tmp_path / "results.md").exists()


def run_folder(folder: Path) -> Path:
    write_log(folder / "log.jsonl")
    config = dataclasses.asdict(dataclasses.replace(PRESETS["scenes-first"], steps=100, base="base.safetensors"))
    config |= {"samples_per_step": 32, "batch_size": 16, "adapter": "early.safetensors", "seed": 3}  # two processes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "previews/inputs").mkdir(parents=True)
    for step in (0, 50, 100, 900):  # the last of an earlier run
        Image.new("RGB", (64, 64), (step // 4, 0, 0)).save(folder / f"previews/{step:07d}.png")
    return folder


def test_report_shows_curves_and_previews_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run")
    assert cli.run(report.main, [str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.png")
    assert Image.open(run / "report.png").width > 1000
    lines = read_log(run / "log.jsonl")
    assert report.describe(run, lines) == "scenes-first – 100 steps, batch of 32"
    shown = report.before_and_after(run / "previews", lines)
    assert [path.name for _, path in shown] == ["0000000.png", "0000100.png"]
    assert series(lines, "gates", "max") == ([0, 50, 100], [0.0, 0.25, 0.5])


def test_report_reads_what_the_trainer_writes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    fields = {"preview_every": 2, "preview_images": 1, "diagnose_every": 1, "diagnosis_samples": 2}
    train(quick(write_base(tmp_path), **fields), run)
    lines = read_log(run / report.LOG)
    assert report.describe(run, lines) == "box-text, gatedSA – 2 steps, batch of 2"
    assert series(lines, "preview", "found")[0] == [0, 2]
    assert series(lines, "diagnosis", "right_over_shuffled")[0] == [0, 1, 2]
    assert series(lines, "gates", "mean")[0] == [1, 2]
    assert [heading for heading, _ in report.before_and_after(run / report.PREVIEWS, lines)] == [
        "Before: step 0",
        "After: step 2",
    ]
    assert report.write_report(run, run / "report.png").exists()


def test_report_of_a_run_with_little_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(report.main, [str(tmp_path)]) == 2
    assert "has no log.jsonl" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text("{broken\n")
    assert cli.run(report.main, [str(tmp_path)]) == 2
    assert "holds no metrics yet" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text('{"step": 50, "loss": 0.3}\n')
    out = tmp_path / "elsewhere/picture.png"
    assert cli.run(report.main, [str(tmp_path), "--out", str(out)]) == 0
    assert out.exists()


def test_missing_matplotlib_is_one_line_and_torch_is_not_needed(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    (tmp_path / "results/data").mkdir(parents=True)
    hide = "import sys; sys.modules['matplotlib'] = sys.modules['torch'] = None; from gligen import cli; "
    for module, args in (("gligen.training.report", [str(run)]), ("experiments.results", ["--docs", str(tmp_path)])):
        code = f"{hide}from {module} import main; sys.exit(cli.run(main, {args!r}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr == "error: drawing figures needs matplotlib: pip install gligen[results]\n"
