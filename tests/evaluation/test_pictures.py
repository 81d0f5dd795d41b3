"""`evaluate.py pictures`: what is asked for, images generated once whatever happens, and what is measured of them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gligen import cli
from gligen.commands import evaluate
from gligen.data.__main__ import main as data_command
from gligen.data.example import BadExample, Example, Fault
from gligen.data.maps import MAPS
from gligen.data.open import open_source
from gligen.data.people import make_people_scene
from gligen.data.prepare import Prepared
from gligen.data.requests import scene_request
from gligen.data.scenes import make_scene, other_shapes, reference_image
from gligen.evaluation.asked import AskedExamples, AskedRequests, How, class_name, read_request_set
from gligen.evaluation.detector import coco_results, detect
from gligen.evaluation.generate import claim_folder, generate, image_file, missing
from gligen.evaluation.pictures import Tools, measure
from gligen.evaluation.protocols import PROTOCOLS
from gligen.evaluation.scenes import summarize
from gligen.evaluation.settings import NOISE_STRIDE
from gligen.image_files import read_record
from gligen.job import complete
from gligen.loading import build_pipeline
from gligen.modes import MODES, get_mode
from gligen.request import Entity, parse_request, to_dict
from tests.data.sets import coco_data, write_coco
from tests.generated import generated_model

pytest.importorskip("faster_coco_eval")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SERIES = 6_000_000_000
QUICK = {"steps": 2, "sampler": "dpmpp", "guidance": 1.0}


class Scenes:
    """A source of drawn scenes, prepared for a mode. bad: the numbers of those that cannot be read."""

    def __init__(self, mode: str, count: int | None, bad: tuple[int, ...] = ()) -> None:
        self.mode, self.size, self.bad = get_mode(mode), count, bad

    def key(self, n: int) -> str:
        return f"scene-{n}"

    def example(self, n: int) -> Example:
        if n in self.bad:
            raise BadExample("truncated", f"scene {n} is truncated")
        if self.mode.kind == "keypoint":
            scene = make_people_scene(SERIES, n)
            return Example(image=scene.image, caption=scene.caption, keypoints=scene.people, key=self.key(n))
        scene = make_scene(SERIES, n)
        entities = tuple(Entity(phrase=item.phrase, box=item.box) for item in scene.objects)
        references = tuple(reference_image(scene, i) for i in range(len(entities))) if self.mode.takes_images else ()
        fields = {"entities": entities, "references": references}
        if self.mode.is_map:
            fields = {"map": MAPS[self.mode.name](scene, None)}
        faults = (Fault(reason="box outside", message="a box is outside", number=n),) if n == 0 else ()
        return Example(image=scene.image, caption=scene.caption, key=self.key(n), faults=faults, **fields)


def asked_scenes(
    folder: Path, mode: str = "box-text", count: int = 3, bad: tuple[int, ...] = (), **how
) -> AskedExamples:
    how = How(**({"fields": QUICK} | how))
    return AskedExamples(Scenes(mode, count, bad), mode=mode, how=how, folder=folder, description="scenes")


def scene_requests(count: int) -> list[dict[str, object]]:
    return [to_dict(scene_request(make_scene(SERIES, i))) | QUICK | {"seed": i} for i in range(count)]


def run(*args: object) -> int:
    return cli.run(evaluate.main, [str(arg) for arg in args])


def refusal(capsys, *args: object) -> str:
    """The one line that a run is refused with, log lines aside."""
    capsys.readouterr()
    assert run(*args) == 2
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("INFO")]
    (line,) = lines
    assert line.startswith("error: ")
    return line


@pytest.fixture
def requests(tmp_path) -> Path:
    path = tmp_path / "requests.json"
    path.write_text(json.dumps(scene_requests(3)))
    return path


# --- what is asked for -----------------------------------------------------------------------------------------------


def test_coco_mig_yaml_is_read(tmp_path):
    path = tmp_path / "mig.yaml"
    path.write_text(
        "a photo of a black apple and a red cup and a red cup:\n  a black apple:\n  - [0, 0.1, 0.5, 0.6]\n"
        "  a red cup:\n  - [0.5, 0, 1, 0.5]\n  - - 0.5\n    - 0.5\n    - 1.0\n    - 0.9\n  coco_id: '769'\n"
        "a photo of a white dog:\n  a white dog:\n  - [0, 0, 1, 1]\n  coco_id: '6'\n"
    )
    asked = read_request_set(path, How())
    assert [(entity.phrase, entity.box) for entity in asked.request(0).entities] == [
        ("a black apple", (0, 0.1, 0.5, 0.6)),
        ("a red cup", (0.5, 0, 1, 0.5)),
        ("a red cup", (0.5, 0.5, 1, 0.9)),
    ]
    assert [asked.key(n) for n in range(asked.size)] == ["769", "6"]
    assert asked.request(0).prompt == "a photo of a black apple and a red cup and a red cup"
    assert [asked.request(n).seed for n in range(2)] == [0, 1]
    assert asked.request(0).schedule == (1, 0, 0)
    path.write_text("a dog:\n  a dog:\n  - [0, 0, 1, 1]\na dog:\n  a dog:\n  - [0, 0, 1, 0.5]\n")
    with pytest.raises(ValueError, match="'a dog' is there twice"):
        read_request_set(path, How())
    path.write_text("a dog:\n  a dog:\n  - [0.5, 0, 0.4, 1]\n")
    with pytest.raises(ValueError, match=r"mig.yaml, request 0: entities\[0\].box .* x0 must be below x1"):
        read_request_set(path, How())


def test_benchmark_csv_is_read_in_pixels_of_512(tmp_path):
    path = tmp_path / "bench.csv"
    head = "id,original_id,category,prompt,obj1,bbox1,obj2,bbox2\n"
    path.write_text(
        head + '0007,15,open_set,"A man , smiling .",A man,"128,0,256,512",a hat,"0,0,64,64"\n8,1,x,b,,,,\n'
    )
    asked = read_request_set(path, How(seed=2))
    first, second = asked.requests
    assert first.prompt == "A man , smiling ."
    assert [(entity.phrase, entity.box) for entity in first.entities] == [
        ("A man", (0.25, 0, 0.5, 1)),
        ("a hat", (0, 0, 0.125, 0.125)),
    ]
    assert second.entities == ()
    assert asked.keys == ("0007", "8")
    assert [request.seed for request in asked.requests] == [2 * NOISE_STRIDE, 2 * NOISE_STRIDE + 1]
    for row, reason in (
        ('1,2,x,p,a cat,"0,0,600,1",,', "row 1: bbox1 is '0,0,600,1'"),
        ("1,2,x,p,a cat,,,", "row 1: obj1 is 'a cat' and bbox1 ''"),
        ('1,2,x,p,a cat,"5,0,5,9",,', "row 1: .*x0 must be below x1"),
    ):
        path.write_text(head + row + "\n")
        with pytest.raises(ValueError, match=reason):
            read_request_set(path, How())
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns prompt, obj1, bbox1"):
        read_request_set(path, How())


def test_real_benchmark_files_are_read_whole():
    folders = [parent / "shared" / "real" / "requests" for parent in Path(__file__).parents[3:]]
    folder = next((path for path in folders if path.is_dir()), None)
    if folder is None:
        pytest.skip(f"'{folders[0]}' is not here")
    mig = read_request_set(folder / "mig_bench_anno.yaml", How())
    counts = [len(request.entities) for request in mig.requests]
    assert len(counts) == 800
    assert [counts.count(n) for n in range(2, 7)] == [160] * 5
    bench = read_request_set(folder / "o_bench_400.csv", How())
    assert (bench.size, sum(len(request.entities) for request in bench.requests)) == (399, 470)


def test_own_requests_keep_what_they_say(tmp_path):
    path = tmp_path / "requests.json"
    box = {"phrase": "a cat", "box": [0, 0, 0.5, 0.5]}
    data = [{"prompt": "p", "entities": [box], "seed": 7, "num_images": 2, "steps": 9}, {"prompt": "q", "tau": 0.25}]
    path.write_text(json.dumps(data))
    asked = read_request_set(path, How())
    assert [(r.seed, r.steps, r.num_images) for r in asked.requests] == [(7, 9, 1), (8, 9, 1), (0, 50, 1)]
    assert asked.requests[2].schedule == (0.25, 0, 0.75)
    one = read_request_set(path, How(seed=1, captions="detection", ungrounded=True, fields={"steps": 3}), count=1)
    assert [(r.seed, r.steps, r.prompt, r.schedule) for r in one.requests] == [
        (NOISE_STRIDE + n, 3, "cat", (0, 0, 1)) for n in range(2)
    ]
    assert one.fingerprint() != asked.fingerprint()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_asks_for_what_an_example_shows(tmp_path, mode):
    asked = asked_scenes(tmp_path, mode)
    model = generated_model(mode)
    for n in range(asked.size):
        request = asked.request(n)
        example = Scenes(mode, None).example(n)
        complete(request, model.facts)
        assert request.prompt == example.caption
        assert (request.size, request.seed, request.schedule) == ((64, 64), n, (1, 0, 0))
        assert request.keypoints == example.keypoints
        assert [(e.phrase, e.box) for e in request.entities] == [(e.phrase, e.box) for e in example.entities]
        assert all((entity.image is not None) == get_mode(mode).takes_images for entity in request.entities)
        assert np.array_equal(asked.reference(n), example.image)
        if get_mode(mode).is_map:
            assert np.array_equal(np.asarray(Image.open(getattr(request, mode))), example.map)
        if get_mode(mode).is_inpainting:
            assert np.array_equal(np.asarray(Image.open(request.inpaint.image)), example.image)


def test_one_object_is_repainted_where_that_is_asked(tmp_path):
    asked = asked_scenes(tmp_path, "inpaint-box-text", count=12, repaint="one")
    again = asked_scenes(tmp_path, "inpaint-box-text", count=12, repaint="one")
    drawn = [asked.request(n).entities for n in range(12)]
    assert all(len(entities) == 1 for entities in drawn)
    assert [again.request(n).entities for n in range(12)] == drawn
    places = [Scenes("box-text", None).example(n).entities.index(drawn[n][0]) for n in range(12)]
    assert len(set(places)) > 1


def test_several_images_of_an_example_have_seeds_of_their_own(tmp_path):
    asked = asked_scenes(tmp_path, count=2, fields=QUICK | {"num_images": 3})
    assert asked.size == 6
    assert [asked.request(n).seed for n in range(6)] == list(range(6))
    assert len({asked.request(n).entities for n in range(6)}) == 2


def test_what_cannot_be_used_is_counted_once_and_has_no_image(tmp_path):
    asked = asked_scenes(tmp_path, count=4, bad=(1, 3))
    for _ in range(2):
        assert [asked.request(n) is None for n in range(4)] == [False, True, False, True]
    assert asked.left_out == {"truncated": 2, "box outside": 1}
    with pytest.raises(ValueError, match="has no end: say how many of it with --count"):
        AskedExamples(Scenes("box-text", None), mode="box-text", how=How(), folder=tmp_path, description="")


def test_class_names():
    assert [class_name(text) for text in ("A  red Star", "the", "an", "Theatre", "an orange ring")] == [
        "red star",
        "the",
        "an",
        "theatre",
        "orange ring",
    ]


# --- generation ------------------------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_goes_on_and_ends_in_the_same_images(tmp_path):
    """And no image is generated twice."""
    pipe = build_pipeline(generated_model(), device="cpu", dtype="float32")
    asked = asked_scenes(tmp_path, count=5)
    whole, stopped = (claim_folder(tmp_path / name, {"a": 1}) for name in ("whole", "stopped"))
    assert generate(pipe, asked, whole, missing(asked, whole), batch_size=2) == 5

    def stop(number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, asked, stopped, missing(asked, stopped), batch_size=2, on_image=stop)
    before = {n: image_file(stopped, n).stat().st_mtime_ns for n in range(3)}
    (stopped / "images" / ".000004.png.99.tmp").write_bytes(b"half")  # as a killed process leaves it
    assert missing(asked, stopped) == [3, 4]
    assert generate(pipe, asked, claim_folder(stopped, {"a": 1}), missing(asked, stopped), batch_size=2) == 2
    assert {n: image_file(stopped, n).stat().st_mtime_ns for n in range(3)} == before
    assert missing(asked, stopped) == []
    assert_same_images(whole, stopped, 5)
    with pytest.raises(ValueError, match="exists, with a 1"):
        claim_folder(stopped, {"a": 2})
    (stopped / "run.json").unlink()
    with pytest.raises(ValueError, match=r"without run\.json"):
        claim_folder(stopped, {"a": 1})


def test_two_shares_are_the_whole(tmp_path):
    pipe = build_pipeline(generated_model(), device="cpu", dtype="float32")
    asked = asked_scenes(tmp_path, count=5, bad=(1,))
    whole, shared = (claim_folder(tmp_path / name, {}) for name in ("whole", "shared"))
    generate(pipe, asked, whole, missing(asked, whole), batch_size=4)
    shares = [missing(asked, shared, rank, 2) for rank in range(2)]
    assert shares == [[0, 2, 4], [1, 3]]
    for share in shares:
        generate(pipe, asked, shared, share, batch_size=4)
    assert_same_images(whole, shared, 4)


def assert_same_images(a: Path, b: Path, count: int) -> None:
    names = sorted(path.name for path in (a / "images").iterdir())
    assert names == sorted(path.name for path in (b / "images").iterdir())
    assert len(names) == count
    for name in names:
        one, other = (np.asarray(Image.open(folder / "images" / name)).astype(int) for folder in (a, b))
        assert np.abs(one - other).max() <= 1  # another batch may round another way


def test_images_carry_their_request(tmp_path):
    pipe = build_pipeline(generated_model(), device="cpu", dtype="float32")
    asked, out = asked_scenes(tmp_path, count=1), claim_folder(tmp_path / "out", {})
    generate(pipe, asked, out, [0], batch_size=1, extra={"checkpoint": "c"})
    assert parse_request(read_record(image_file(out, 0))["request"]) == asked.request(0)
    (again,) = pipe.generate([asked.request(0)])
    assert np.array_equal(np.asarray(again.image), np.asarray(Image.open(image_file(out, 0))))


@pytest.mark.parametrize("mode", ["box-text-image", "keypoint", "depth", "inpaint-box-text"])
def test_images_of_data_that_has_changed_since_are_not_measured(tmp_path, mode):
    """The folder may have moved, but what was asked for must be what is asked for."""
    model = generated_model(mode)
    pipe = build_pipeline(model, device="cpu", dtype="float32")
    asked, out = asked_scenes(tmp_path / "a", mode, count=1), claim_folder(tmp_path / "out", {})
    generate(pipe, asked, out, [0], batch_size=1)
    assert measure(out, asked_scenes(tmp_path / "moved", mode, count=1), model, Tools(), CPU).metrics["images"] == 1
    changed = asked_scenes(tmp_path / "a", mode, count=1, captions="null")
    with pytest.raises(ValueError, match=r"1 images, the first '.*000000\.png', were generated for other requests"):
        measure(out, changed, model, Tools(), CPU)


# --- measures --------------------------------------------------------------------------------------------------------


def put_images(out: Path, images: list[np.ndarray]) -> None:
    """As if they had been generated."""
    claim_folder(out, {})
    for n, pixels in enumerate(images):
        Image.fromarray(pixels).save(image_file(out, n))


def test_the_drawn_world_measures_as_evaluate_scenes_does(tmp_path):
    """Images of which half show what was asked for: found objects agree with the drawn world's own metrics."""
    count = 60
    scenes = [make_scene(SERIES, i) for i in range(count)]
    shown = [scene if i % 2 else make_scene(SERIES, i + 1000) for i, scene in enumerate(scenes)]
    images = [np.roll(scene.image, i % 5, axis=1) for i, scene in enumerate(shown)]  # so that IoU is below 1, too
    requests = [dataclasses.replace(scene_request(scene), size=(64, 64)) for scene in scenes]
    put_images(tmp_path, images)
    found = tmp_path / "detections.json"
    files = sorted((tmp_path / "images").glob("*.png"))
    found.write_text(json.dumps(coco_results(files)))
    asked = AskedRequests("scenes", requests, [""] * count)
    measured = measure(tmp_path, asked, generated_model(), Tools(detections=str(found)), CPU)
    own = summarize([detect(image) for image in images], [scene.objects for scene in scenes])
    assert 0.3 < own.all.found_with_shape.value < 0.7
    instances = measured.metrics["instances"]["all"]
    assert instances["instances"] == own.all.objects
    assert instances["success"]["value"] == pytest.approx(own.all.found_with_shape.value, abs=0.01)
    assert measured.metrics["boxes"]["AP50"] == pytest.approx(own.all.ap50, abs=1e-6)
    assert measured.metrics["images"] == count


def test_objects_found_by_colour_are_those_that_evaluate_scenes_finds(tmp_path):
    """Asked for by colour alone, as `found` looks at them: of a third of the scenes the shapes are others, and a sixth
    shows another scene."""
    scenes = [make_scene(SERIES, i) for i in range(60)]
    images = [
        np.roll((scenes[(i + 1) % 60] if i % 6 == 0 else scene).image, i % 5, 1) for i, scene in enumerate(scenes)
    ]
    scenes = [other_shapes(scene) if i % 3 == 1 else scene for i, scene in enumerate(scenes)]
    own = summarize([detect(image) for image in images], [scene.objects for scene in scenes])
    assert own.all.found.value > own.all.found_with_shape.value + 0.2
    put_images(tmp_path, images)
    found = coco_results(sorted((tmp_path / "images").glob("*.png")))
    for look, success, ap50 in (
        (slice(None), own.all.found_with_shape.value, own.all.ap50),
        (slice(1), own.all.found.value, own.ap50_color),
    ):
        requests = []
        for scene in scenes:
            words = [" ".join((item.color, item.shape)[look]) for item in scene.objects]
            entities = tuple(Entity(phrase=p, box=item.box) for p, item in zip(words, scene.objects, strict=True))
            requests.append(dataclasses.replace(scene_request(scene), size=(64, 64), entities=entities))
        results = [r | {"category_name": " ".join(r["category_name"].split()[look])} for r in found]
        (tmp_path / "found.json").write_text(json.dumps(results))
        asked = AskedRequests("scenes", requests, [""] * len(requests))
        measured = measure(tmp_path, asked, generated_model(), Tools(detections=str(tmp_path / "found.json")), CPU)
        assert measured.metrics["instances"]["all"]["success"]["value"] == pytest.approx(success, abs=0.01)
        assert measured.metrics["boxes"]["AP50"] == pytest.approx(ap50, abs=1e-6)


def test_an_lvis_set_is_measured_by_what_is_labelled_where(tmp_path):
    """b.png has no red car, and c.png may have one: a wrong detection counts in the one, and not in the other."""
    data = coco_data()
    data["images"][1] |= {"neg_category_ids": [6]}
    data["images"] = [{"neg_category_ids": [], **item} for item in data["images"]]
    source, findings = open_source(write_coco(tmp_path / "set", data))
    prepared = Prepared(source=source, mode=get_mode("box-text"), image_size=(64, 64), series=SERIES)
    about = {"how": How(fields=QUICK), "folder": tmp_path, "description": "LVIS", "federation": findings.federation}
    asked = AskedExamples(prepared, mode="box-text", **about)
    put_images(tmp_path / "out", [np.zeros((64, 64, 3), np.uint8)] * 3)
    truth = measure(tmp_path / "out", asked, generated_model(), Tools(), CPU).truth
    assert [item["neg_category_ids"] for item in truth["images"]] == [[], [3], []]
    names = {item["id"]: item["name"] for item in truth["categories"]}
    right = [
        {"image_id": item["image_id"], "category_name": names[item["category_id"]], "bbox": item["bbox"], "score": 0.5}
        for item in truth["annotations"]
    ]
    for image, expected in ((1, 1 / 2), (2, 1.0)):
        wrong = {"image_id": image, "category_name": "red car", "bbox": [0, 0, 9, 9], "score": 0.9}
        (tmp_path / "found.json").write_text(json.dumps([wrong, *right]))
        tools = Tools(detections=str(tmp_path / "found.json"))
        boxes = measure(tmp_path / "out", asked, generated_model(), tools, CPU).metrics["boxes"]
        assert boxes["AP"] == pytest.approx((2 + expected) / 3)


def test_inpainting_is_measured_where_it_repaints_and_where_it_must_not(tmp_path):
    asked = asked_scenes(tmp_path / "inputs", "inpaint-box-text", count=4, repaint="one")
    images = [asked.reference(n).copy() for n in range(4)]
    images[0][0, 0] = np.where(images[0][0, 0] > 99, images[0][0, 0] - 7, images[0][0, 0] + 7)  # a kept pixel, changed
    put_images(tmp_path, images)
    found = tmp_path / "detections.json"
    found.write_text(json.dumps(coco_results(sorted((tmp_path / "images").glob("*.png")))))
    metrics = measure(tmp_path, asked, generated_model("inpaint-box-text"), Tools(detections=str(found)), CPU).metrics
    assert metrics["kept pixels"]["max"] == 7
    assert 0 < metrics["kept pixels"]["mean"]["value"] < 0.01
    assert metrics["detections outside what is repainted"] > 0
    assert metrics["instances"]["all"]["instances"] == 4
    assert metrics["instances"]["all"]["success"]["value"] == 1
    shares = metrics["boxes by share of the image"]
    assert sum(value for name, value in shares.items() if name.startswith("objects")) <= 4


def test_a_real_inpainting_model_changes_no_kept_pixel(tmp_path):
    model = generated_model("inpaint-box-text")
    pipe = build_pipeline(model, device="cpu", dtype="float32")
    asked, out = asked_scenes(tmp_path / "inputs", "inpaint-box-text", count=2), claim_folder(tmp_path, {})
    generate(pipe, asked, out, [0, 1], batch_size=2)
    assert measure(out, asked, model, Tools(), CPU).metrics["kept pixels"]["max"] == 0


def test_keypoints_are_measured_by_oks_of_a_pose_detector(tmp_path):
    asked = asked_scenes(tmp_path, "keypoint", count=2)
    put_images(tmp_path, [asked.reference(n) for n in range(2)])
    entries = []
    for n in range(2):
        for person in asked.request(n).keypoints:
            points = [x for point in person for x in ((point[0] * 64, point[1] * 64, 1) if point else (0, 0, 0))]
            entries.append({"image_id": n, "category_name": "person", "keypoints": points, "score": 0.9})
    found = tmp_path / "detections.json"
    for entry in entries[1:]:
        entry["keypoints"] = [0] * 51
    found.write_text(json.dumps(entries))
    metrics = measure(tmp_path, asked, generated_model("keypoint"), Tools(detections=str(found)), CPU).metrics
    recalls = np.linspace(0, 1, 101)
    assert metrics["keypoints"]["AP"] == pytest.approx((recalls <= 1 / len(entries)).mean())
    found.write_text(json.dumps([{"image_id": 0, "category_id": 1, "bbox": [0, 0, 9, 9], "score": 1}]))
    reasons = measure(tmp_path, asked, generated_model("keypoint"), Tools(detections=str(found)), CPU).not_measured
    assert "use a pose detector" in reasons["keypoints"]


def test_what_cannot_be_measured_is_named(tmp_path):
    asked = asked_scenes(tmp_path, "sem", count=2)
    put_images(tmp_path, [asked.reference(n) for n in range(2)])
    model = generated_model("sem")
    bare = dataclasses.replace(model, parts={k: v for k, v in model.parts.items() if k != "image_encoder"})
    reasons = measure(tmp_path, asked, bare, Tools(), CPU).not_measured
    assert {"boxes", "instances", "FID", "CLIP score", "map"} <= reasons.keys()
    assert "--inception" in reasons["FID"]
    assert "--clip" in reasons["CLIP score"]
    image_file(tmp_path, 1).unlink()
    with pytest.raises(ValueError, match="1 images are missing, the first 1"):
        measure(tmp_path, asked, bare, Tools(), CPU)


# --- as people run it ------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What an HTML page refers to, and whether its tags are closed."""

    VOID = ("meta", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.targets: list[str] = []
        self.figures = 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.targets += [value for name, value in attrs if name in ("src", "href")]
        self.figures += tag == "figure"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_run_measures_again_with_other_tools_and_generates_nothing_twice(tmp_path, requests, capsys, monkeypatch):
    out = tmp_path / "out"
    args = ("pictures", "--requests", requests, "--out", out, "--device", "cpu")
    assert run(*args) == 0
    assert "not measured" in capsys.readouterr().out
    first = json.loads((out / "report.json").read_text())
    assert first["generated"]["images"] == 3
    assert first["run"]["model"]["name"] == "scenes-base.safetensors + scenes-box-text.safetensors"
    asked = json.loads((out / "asked.json").read_text())
    assert [item["file_name"] for item in asked["images"]] == [f"images/{n:06d}.png" for n in range(3)]
    assert all((out / item["file_name"]).exists() for item in asked["images"])
    assert len(asked["annotations"]) == sum(len(r["entities"]) for r in scene_requests(3))

    assert subprocess_detector(out, tmp_path / "found.json") == 0
    monkeypatch.setattr("gligen.evaluation.run_pictures.build_pipeline", None)  # a traceback if it were called
    times = {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()}
    assert run(*args, "--detections", tmp_path / "found.json", "--sheet", 2) == 0
    text = capsys.readouterr().out
    assert "boxes AP50" in text
    assert text.splitlines()[-3:] == [str(out / name) for name in ("report.json", "report.html", "asked.json")]
    second = json.loads((out / "report.json").read_text())
    assert second["generated"]["images"] == 0
    assert second["figures"]["CLIP score"] == first["figures"]["CLIP score"]
    assert {"boxes", "instances"} <= second["figures"].keys()
    assert {path: path.stat().st_mtime_ns for path in (out / "images").iterdir()} == times
    assert "2 of 3 images" in (out / "report.html").read_text()
    other = tmp_path / "other.json"
    other.write_text(json.dumps(scene_requests(2)))
    line = refusal(capsys, "pictures", "--requests", other, "--out", out, "--device", "cpu")
    assert "choose another --out" in line
    run_file = out / "run.json"
    run_file.write_text(run_file.read_text().replace(first["run"]["model"]["adapter"]["fingerprint"], "0" * 16))
    line = refusal(capsys, *args)
    assert "exists, with adapter scenes-box-text.safetensors of other content" in line


def subprocess_detector(out: Path, path: Path) -> int:
    from gligen.evaluation import detector

    return cli.run(detector.main, [str(out / "images"), "--out", str(path)])


def test_the_page_has_every_image_and_opens_offline(tmp_path, requests, capsys):
    out = tmp_path / "out"
    args = ("pictures", "--requests", requests, "--out", out, "--device", "cpu", "--protocol", "coco-mig")
    assert run(*args, "--size", 64, 64) == 0
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.figures == 3
    assert [target for target in page.targets if not target.startswith("data:")] == [
        f"images/{n:06d}.png" for n in range(3)
    ]
    assert all((out / target).exists() for target in page.targets if not target.startswith("data:"))
    assert not re.search(r"https?://|<script|@import", text)
    for request in scene_requests(3):
        assert request["prompt"] in text
    assert "DEIG" in text  # the published metrics beside ours
    assert "published, GLIGEN: success 0.296 (here –)" in capsys.readouterr().out
    assert json.loads((out / "report.json").read_text())["protocol"]["published"] == PROTOCOLS["coco-mig"].published


def test_killed_it_goes_on_and_ends_in_the_same_numbers(tmp_path):
    """SIGKILL after the first image; two processes finish what is left, and measure what one had measured."""
    path = tmp_path / "requests.json"
    path.write_text(json.dumps([request | {"steps": 8} for request in scene_requests(6)]))
    args = ["pictures", "--requests", str(path), "--device", "cpu", "--batch-size", "1"]
    out, environment = tmp_path / "out", os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "evaluate.py", *args, "--out", str(out)], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 100
    while not image_file(out, 0).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    there = {path: path.stat().st_mtime_ns for path in (out / "images").glob("0*.png")}
    assert 0 < len(there) < 6
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [  # as torchrun starts them, sooner
        subprocess.Popen(
            [sys.executable, "evaluate.py", *args, "--out", str(out)],
            cwd=ROOT,
            env=environment | address | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, told = process.communicate(timeout=200)
        assert process.returncode == 0, told
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert json.loads((out / "report.json").read_text())["generated"]["images"] == 6 - len(there)
    assert run(*args, "--out", tmp_path / "unbroken") == 0
    assert_same_images(tmp_path / "unbroken", out, 6)
    metrics = [json.loads((folder / "report.json").read_text())["figures"] for folder in (out, tmp_path / "unbroken")]
    assert metrics[0]["CLIP score"]["value"] == pytest.approx(metrics[1]["CLIP score"]["value"], abs=1e-3)


def test_a_data_set_is_asked_for_as_evaluate_scenes_asks(tmp_path, capsys):
    """The drawn world as COCO: the same images as the built-in scenes, real images to compare with, and count."""
    from gligen.data.__main__ import main as data_main

    data, out = tmp_path / "drawn", tmp_path / "out"
    draw = ("draw", "--format", "coco", "--out", data, "--count", 4, "--series", "evaluation")
    assert cli.run(data_main, [str(arg) for arg in draw]) == 0
    args = ("pictures", "--data", data, "--out", out, "--device", "cpu", "--steps", 2, "--sampler", "dpmpp")
    assert run(*args, "--count", 3) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["figures"]["images"] == 3
    assert report["figures"]["Fréchet distance of CLIP's features"] > 0
    asked = json.loads((out / "asked.json").read_text())
    truth = [(e.phrase, e.box) for n in range(3) for e in Scenes("box-text", None).example(n).entities]
    assert [item["phrase"] for item in asked["annotations"]] == [phrase for phrase, _ in truth]
    x0, y0, x1, y1 = np.array([box for _, box in truth]).T * 64
    boxes = np.array([item["bbox"] for item in asked["annotations"]])
    assert np.abs(boxes - np.stack([x0, y0, x1 - x0, y1 - y0], -1)).max() < 0.01


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ((), "either --data with a data set or --requests"),
        (("--data", "x", "--requests", "y"), "either --data"),
        (("--requests", "FILE", "--count", 0), "--count is 0"),
        (("--requests", "FILE", "--batch-size", 0), "--batch-size is 0"),
        (("--requests", "FILE", "--sheet", -1), "--sheet is -1"),
        (("--requests", "FILE", "--maps", "m"), "--maps says more about --data"),
        (("--requests", "none.json"), "'none.json' does not exist"),
        (("--data", "nowhere"), "no such file or folder"),
        (("--requests", "FILE", "--protocol", "imagenet"), "unknown protocol 'imagenet': the known ones are coco2014"),
        (("--requests", "FILE", "--ungrounded", "--tau", ".5"), "--ungrounded and a schedule"),
        (("--requests", "FILE", "--size", 62, 64), "size is 62 x 64"),
        (("--requests", "FILE", "--steps", 0), "steps is 0"),
        (("--requests", "FILE", "--adapter", "none.pth"), "no such file"),
        (("--requests", "FILE", "--mode", "keypoint"), "use a box-text"),
        (("--requests", "FILE", "--detections", "none.json"), "--detections 'none.json': there is no such file"),
        (("--requests", "FILE", "--detections", "FILE", "--detector", "x"), "leave one out"),
        (("--requests", "FILE", "--detector", "yolo", "--detector-weights", "FILE"), "torchvision has fasterrcnn"),
        (("--requests", "FILE", "--detector", "fcos_resnet50_fpn"), "give --detector-weights FILE"),
        (("--requests", "FILE", "--detector-weights", "FILE"), "without --detector NAME"),
        (("--requests", "FILE", "--categories", "FILE"), "give those too"),
        (("--requests", "FILE", "--inception", "none.pth"), "--inception 'none.pth': there is no such file"),
        (("--requests", "FILE", "--features", "FILE"), "--features '.*': give an .npz with mu"),
        (("--requests", "FILE", "--reference", "EMPTY"), "holds no images"),
        (("--requests", "FILE", "--inception", "FILE", "--features", "FILE"), "leave one out"),
    ],
)
def test_a_users_mistake_is_one_line_before_any_model_is_built(tmp_path, requests, capsys, monkeypatch, flags, reason):
    monkeypatch.setattr("gligen.evaluation.run_pictures.build_pipeline", None)
    (tmp_path / "empty").mkdir()
    names = {"FILE": requests, "EMPTY": tmp_path / "empty"}
    flags = [names.get(flag, flag) for flag in flags]
    out = tmp_path / "out"
    assert re.search(reason, refusal(capsys, "pictures", "--out", out, "--device", "cpu", *flags))
    assert not out.exists() or not list((out / "images").glob("*"))


def test_what_is_put_on_the_base_is_put_on_it_and_recorded(tmp_path, requests, capsys):
    common = ["pictures", "--requests", requests, "--count", 1, "--steps", 1, "--out", tmp_path / "out"]
    assert run(*common, "--lora", tmp_path / "none.safetensors", "--device", "cpu") == 2
    assert "--lora" in capsys.readouterr().err
    assert run(*common, "--vae", tmp_path / "none.safetensors", "--device", "cpu") == 2
    assert "--vae" in capsys.readouterr().err
    base = ROOT / "checkpoints" / "scenes-base.safetensors"
    assert run(*common, "--vae", base, "--device", "cpu") == 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model"]["vae"]["file"] == base.name


def test_images_that_cannot_be_this_runs_are_refused(tmp_path, requests, capsys):
    common = ["pictures", "--requests", requests, "--count", 1, "--steps", 1, "--out", tmp_path, "--device", "cpu"]
    assert run(*common) == 0
    path = tmp_path / "images" / "000000.png"
    path.write_bytes(path.read_bytes()[:20])
    capsys.readouterr()
    assert run(*common) == 2
    assert "is damaged: delete it" in capsys.readouterr().err
    Image.new("RGB", (10, 10)).save(path)
    assert run(*common) == 2
    assert "generated for other requests" in capsys.readouterr().err


def test_one_real_image_has_no_spread(tmp_path):
    words = ["draw", "--format", "coco", "--count", "1", "--series", "evaluation", "--out", str(tmp_path / "data")]
    data_command(words)
    common = ["pictures", "--data", tmp_path / "data", "--num-images", 2, "--steps", 1, "--device", "cpu"]
    assert run(*common, "--out", tmp_path / "out") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "one real image has no spread" in json.dumps(report)


def test_a_negative_seed_is_refused(capsys, requests, tmp_path):
    assert "--seed is -1: give 0 or more" in refusal(
        capsys, "pictures", "--requests", requests, "--out", tmp_path, "--seed", -1
    )
