"""Faulty pictures and annotations: mended where they can be, else counted by reason, and too many end the run."""

from __future__ import annotations

import json
import logging
import os
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gligen.data.annotations import LONG_PHRASE
from gligen.data.example import BadExample, Example, Fault, Findings
from gligen.data.faults import FaultLog, Tolerant
from gligen.data.open import open_source
from gligen.data.order import Shuffled, name_hash
from gligen.data.prepare import Prepared
from gligen.modes import get_mode
from tests.data.sets import coco_data, noise, png, write_coco, write_csv, write_jsonl, write_pictures, write_voc

# pictures


def with_picture(folder: Path, content: bytes, name: str = "a.png") -> Example:
    """The example of a set whose first picture has this content. Raises BadExample as it does."""
    write_jsonl(folder)
    (folder / name).write_bytes(content)
    source, _ = open_source(folder)
    return source.example(0)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no picture at all", "picture: not an image file"),
        (b"", "picture: not an image file"),
        (png(noise(80, 60))[:900], "picture: the image is truncated or damaged"),
        (png(noise(80, 60)).replace(b"IDAT", b"IDAT\0", 1), "picture: the image is truncated or damaged"),
    ],
    ids=["text", "empty", "truncated", "corrupt"],
)
def test_pictures_that_cannot_be_read_have_a_reason(tmp_path, content, reason):
    with pytest.raises(BadExample) as bad:
        with_picture(tmp_path, content)
    assert bad.value.reason == reason
    assert "a.png" in str(bad.value)
    assert "\n" not in str(bad.value)


def test_a_truncated_jpeg_is_bad(tmp_path):
    noise(80, 60).save(tmp_path / "x.jpg")
    content = (tmp_path / "x.jpg").read_bytes()
    with pytest.raises(BadExample, match="truncated or damaged"):
        with_picture(tmp_path / "set", content[: len(content) // 2])


def test_a_picture_that_vanished_is_bad(tmp_path):
    source, _ = open_source(write_jsonl(tmp_path))
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadExample, match=r"a.png: No such file") as bad:
        source.example(0)
    assert bad.value.reason == "picture file missing or unreadable"


def test_every_kind_of_picture_becomes_upright_rgb(tmp_path):
    rgb = noise(80, 60)
    pixels = np.asarray(rgb).astype(int)
    deep = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
    alpha = rgb.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize((80, 60)))
    a = np.asarray(alpha)[..., 3:].astype(float) / 255
    grey = np.asarray(rgb.convert("L")).astype(int)[..., None].repeat(3, -1)
    palette = Image.fromarray(np.arange(4800, dtype=np.uint16).astype(np.uint8).reshape(60, 80), "P")
    colours = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
    palette.putpalette(colours.tobytes())
    kinds = {
        "palette": (palette, colours[np.arange(4800).reshape(60, 80) % 256].astype(int), 0),
        "16-bit": (Image.fromarray(deep), grey, 1),
        "alpha": (alpha, np.rint(pixels * a + 255 * (1 - a)), 1),
        "grey": (rgb.convert("L"), grey, 0),
    }
    for name, (image, expected, within) in kinds.items():
        example = with_picture(tmp_path / name, png(image))
        assert example.image.shape == (60, 80, 3)
        assert example.image.dtype == np.uint8
        assert abs(example.image.astype(int) - expected).max() <= within, name
    rgb.convert("CMYK").save(tmp_path / "x.jpg", quality=100, subsampling=0)
    example = with_picture(tmp_path / "cmyk", (tmp_path / "x.jpg").read_bytes())
    assert abs(example.image.astype(int) - pixels).mean() < 3


@pytest.mark.parametrize("is_stored", [True, False])
def test_boxes_of_rotated_pictures_are_where_their_annotation_saw_them(tmp_path, is_stored):
    """A white box on black, stored lying (EXIF 6); the annotation says 80 x 60, or 60 x 80 as people see it."""
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[10:20, 40:72] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    data = coco_data()
    data["images"] = [
        {"id": 0, "file_name": "a.png", "width": 80 if is_stored else 60, "height": 60 if is_stored else 80}
    ]
    box = [40, 10, 32, 10] if is_stored else [40, 40, 10, 32]  # turned clockwise: x is 60 - y
    data["annotations"] = [{"id": 1, "image_id": 0, "category_id": 5, "bbox": box}]
    path = write_coco(tmp_path, data)
    Image.fromarray(pixels).save(tmp_path / "images/a.png", exif=exif)
    example = open_source(path)[0].example(0)
    assert example.image.shape == (80, 60, 3)
    x0, y0, x1, y1 = example.entities[0].box
    inside = example.image[round(y0 * 80) : round(y1 * 80), round(x0 * 60) : round(x1 * 60)]
    assert inside.min() > 128
    assert (example.image > 128).sum() == inside.size


def test_a_picture_of_another_shape_than_annotated_is_bad_but_a_resized_one_is_not(tmp_path):
    path = write_coco(tmp_path)
    source, _ = open_source(path)
    before = source.example(0).entities
    noise(160, 120).save(tmp_path / "images/a.png")
    assert source.example(0).entities == before
    noise(80, 80).save(tmp_path / "images/a.png")
    with pytest.raises(BadExample, match="80 x 80 pixels, but annotated as 80 x 60"):
        source.example(0)


# annotations


def test_bad_boxes_are_counted_by_reason_and_the_first_told(tmp_path):
    data = coco_data()
    for i, box in enumerate(
        (
            [90, 10, 5, 5],
            [10, 70, 5, 5],
            [-9, -9, 5, 5],
            [10, 10, 0, 9],
            [10, 10, 9, -3],
            [float("nan"), 1, 2, 3],
            [1, 1, float("inf"), 3],
            [60, 40, 40, 40],
            "box",
            [1, 2, 3],
        )
    ):
        data["annotations"].append({"id": 100 + i, "image_id": 0, "category_id": 5, "bbox": box})
    data["annotations"].append({"id": 0, "image_id": 0, "category_id": 5, "bbox": [1, 1, 9, 9]})
    data["annotations"].append({"id": 120, "image_id": 0, "category_id": 99, "bbox": [1, 1, 9, 9]})
    data["annotations"].append({"id": 121, "image_id": 77, "category_id": 5, "bbox": [1, 1, 9, 9]})
    data["annotations"].append({"id": 122, "image_id": 0, "category_id": 5, "bbox": [1, 1, 9, 9], "iscrowd": 1})
    source, findings = open_source(write_coco(tmp_path, data))
    assert findings.left_out == {
        "box outside its picture": 3,
        "box without area": 2,
        "box with a number that is none": 2,
        "part of a box beyond its picture": 1,
        "annotation without a box of four numbers": 2,
        "annotation id given twice": 1,
        "annotation of a category without a name": 1,
        "annotation of an image that is not listed": 1,
        "crowd region, not one thing": 1,
    }
    assert "left out: 3 × box outside its picture, the first: a.png, 'cat' at 90, 10, 95, 15" in findings.lines()
    example = source.example(0)
    assert len(example.entities) == 3
    assert example.entities[2].box == (0.75, 40 / 60, 1.0, 1.0)
    assert findings.lost == 0


def test_boxes_found_outside_only_when_the_picture_is_read_are_faults_of_the_example(tmp_path):
    write_csv(tmp_path)
    with open(tmp_path / "boxes.csv", "a") as file:
        file.write("a.png,picture a.png,ghost,500,500,600,600\n")
    source, findings = open_source(tmp_path)
    assert not findings.left_out  # nothing says how large a.png is
    example = source.example(0)
    assert [entity.phrase for entity in example.entities] == ["cat", "red car"]
    assert [(fault.reason, fault.is_lost) for fault in example.faults] == [("box outside its picture", False)]


def test_missing_files_and_ids_given_twice_lose_pictures(tmp_path):
    data = coco_data()
    data["images"].append({"id": 1, "file_name": "a.png", "width": 80, "height": 60})
    data["images"].append({"id": 8, "file_name": "gone.png", "width": 80, "height": 60})
    data["images"].append({"file_name": "c.png"})
    path = write_coco(tmp_path, data)
    with pytest.raises(ValueError, match=r"3 of 6 pictures are lost to faults, more than 1.00%: .*--max-bad"):
        open_source(path)
    _, findings = open_source(path, max_bad=0.5)
    assert findings.lost == 3
    assert findings.images == 3
    assert findings.left_out == {
        "image id given twice": 1,
        "picture file missing": 1,
        "image without id or file_name": 1,
    }


def test_broken_json_says_where(tmp_path):
    path = write_coco(tmp_path)
    text = json.dumps(coco_data(), indent=1)
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"instances_x.json, line \d+, column \d+: not valid JSON"):
        open_source(path)
    path.write_text(text.replace('"image_id": 2,', '"image_id": 2;', 1))
    with pytest.raises(ValueError, match=r"line \d+, column \d+: not valid JSON: Expecting ',' delimiter"):
        open_source(path)


def test_broken_lines_and_xml_lose_their_picture(tmp_path):
    write_jsonl(tmp_path / "lines")
    with open(tmp_path / "lines/metadata.jsonl", "a") as file:
        file.write('{"file_name": "a.png", \n[1]\n{"caption": "x"}\n{"file_name": "a.png"}\n')
    _, findings = open_source(tmp_path / "lines", max_bad=1)
    assert findings.left_out == {
        "line that is not JSON": 1,
        "line that is no JSON object": 1,
        "line without a file name": 1,
        "line of a picture that has one": 1,
    }
    assert findings.lost == 3

    write_voc(tmp_path / "voc")
    (tmp_path / "voc/Annotations/a.xml").write_text("<annotation><object>")
    (tmp_path / "voc/Annotations/d.xml").write_text("<annotation><filename>d.png</filename></annotation>")
    text = (tmp_path / "voc/Annotations/b.xml").read_text()
    (tmp_path / "voc/Annotations/b2.xml").write_text(text)
    (tmp_path / "voc/Annotations/b.xml").write_text(text.replace("<xmin>0</xmin>", "<xmin>zero</xmin>"))
    _, findings = open_source(tmp_path / "voc", max_bad=1)
    assert findings.left_out == {
        "XML file that cannot be read": 1,
        "picture file missing": 1,
        "picture annotated twice": 1,
        "object without a box of four numbers": 1,
        "picture without boxes": 1,
    }


def test_long_phrases_and_many_boxes_are_told(tmp_path):
    write_pictures(tmp_path)
    boxes = [{"phrase": "dot", "box": [i / 200, 0, i / 200 + 0.1 + i / 1000, 1]} for i in range(100)]
    boxes.append({"phrase": " ".join(["very"] * 199 + ["long"]), "box": [0, 0, 1, 1]})
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "entities": boxes}))
    source, findings = open_source(tmp_path)
    assert findings.left_out[f"end of a phrase of more than {LONG_PHRASE} words"] == 1
    assert "1 pictures have more than 30 boxes, up to 101: the 30 largest are used, 71 are not" in findings.notes
    prepared = Prepared(source=source, mode=get_mode("box-text"), image_size=(64, 64), series=0)
    kept = prepared.example(0).entities
    assert len(kept) == 30
    assert kept[-1].phrase.endswith("very long")


# in a long run


@dataclass(frozen=True)
class Partly:
    """Numbers 0 to size - 1, of which some are bad."""

    size: int
    bad: frozenset[int]

    def example(self, n: int) -> Example:
        if n in self.bad:
            raise BadExample("rotten", f"{n} is rotten")
        return Example(image=np.full((64, 64, 3), n, np.uint8), caption=str(n), key=str(n))

    def key(self, n: int) -> str:
        return str(n)


def test_the_next_good_example_stands_in():
    source = Tolerant(Partly(10, frozenset({3, 4, 9})), 0.5)
    assert [source.example(n).caption for n in range(10)] == ["0", "1", "2", "5", "5", "5", "6", "7", "8", "0"]
    faults = source.example(3).faults
    assert faults == tuple(Fault(reason="rotten", message=f"{n} is rotten", number=n, is_lost=True) for n in (3, 4))
    assert source.example(0).faults == ()


def test_a_source_of_nothing_but_bad_examples_ends():
    with pytest.raises(ValueError, match=r"bad examples, more than 1.00% of 1000: .* × rotten, the first: 0 is rotten"):
        Tolerant(Partly(1000, frozenset(range(1000)))).example(0)


def test_faults_are_counted_once_and_the_first_is_logged(caplog):
    source = Tolerant(Partly(100, frozenset({7, 50})), 0.05)
    log = FaultLog(100, 0.05)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):  # epochs
            for n in range(100):
                log.add(source.example(n).faults)
    assert log.counts == {"rotten": 2}
    assert log.lines() == ["2 × rotten"]
    assert [record.getMessage() for record in caplog.records] == [
        "another example stands in for 7 is rotten (rotten: more of these are counted, not told)"
    ]


def test_more_bad_examples_than_allowed_end_the_run_with_the_reasons():
    source = Tolerant(Partly(100, frozenset({7, 50})), 0.01)
    log = FaultLog(100, 0.01)
    log.add(source.example(7).faults)
    with pytest.raises(
        ValueError, match=r"2 bad examples, more than 1.00% of 100: 2 × rotten, the first: 7 .*--max-bad"
    ):
        log.add(source.example(50).faults)
    with pytest.raises(ValueError, match="1 bad examples and 1 when the set was opened"):
        FaultLog(100, 0.01, start=1).add(source.example(7).faults)


def test_faults_that_lose_nothing_do_not_count_towards_the_limit():
    log = FaultLog(3, 0.0)
    log.add([Fault(reason="box outside its picture", message=f"box {i}", number=0) for i in range(50)])
    assert log.counts.total() == 50


class Loaded(torch.utils.data.Dataset):
    """A source as a loader's workers see it."""

    def __init__(self, source: Shuffled) -> None:
        self.source = source

    def __getitem__(self, k: int) -> Example:
        return self.source.example(k)


@pytest.mark.parametrize("workers", [0, 2])
def test_faults_reach_the_process_that_logs_from_any_number_of_workers(workers):
    source = Shuffled(Tolerant(Partly(40, frozenset({1, 2, 30})), 0.5), 3)
    loader = torch.utils.data.DataLoader(
        Loaded(source), sampler=range(80), batch_size=None, collate_fn=lambda item: item, num_workers=workers
    )
    log, seen = FaultLog(40, 0.5), []
    for example in loader:
        log.add(example.faults)
        seen.append(example.caption)
    assert log.counts == {"rotten": 3}
    for epoch in (seen[:40], seen[40:]):
        assert sorted(epoch, key=int) == sorted(
            [*(str(n) for n in range(40) if n not in (1, 2, 30)), "3", "3", "31"], key=int
        )


def test_bad_examples_come_back_from_other_processes():
    bad = pickle.loads(pickle.dumps(BadExample("rotten", "3 is rotten")))
    assert (bad.reason, str(bad)) == ("rotten", "3 is rotten")


def test_findings_read_as_sentences():
    findings = Findings(format="YOLO", images=1, entities=1, phrases=1)
    assert findings.lines() == ["YOLO: 1 image, 1 box, 1 phrase"]
    findings = replace(findings, images=12345, entities=None, phrases=None)
    assert findings.lines() == ["YOLO: 12,345 images, boxes not counted: they are read with the pictures"]
    findings.leave_out("box without area", "a\nb", 2)
    findings.lose("picture file missing", "x")
    assert findings.lines()[1] == "left out: 2 × box without area, the first: a b"
    assert findings.lost == 1


def test_names_and_words_that_are_no_unicode_are_harmless(tmp_path):
    write_jsonl(tmp_path)
    odd = os.fsdecode(b"odd\xff.png")
    try:
        (tmp_path / "a.png").rename(tmp_path / odd)
    except OSError:
        pytest.skip("this file system wants Unicode")
    line = {
        "file_name": odd,
        "caption": "half \ud800 a pair",
        "entities": [{"phrase": "\ud83d cat", "box": [0, 0, 1, 1]}],
    }
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    (tmp_path / "canny").mkdir()
    noise(80, 60).save(tmp_path / "canny" / odd)
    for mode in ("box-text", "canny"):
        source, findings = open_source(tmp_path, mode)
        example = source.example(0)
        for text in (source.key(0), example.key, example.caption, *findings.lines()):
            text.encode()
        name_hash(source.key(0))
    assert open_source(tmp_path)[0].example(0).entities[0].phrase == "? cat"
