"""Every format gives the same pictures, boxes and phrases, and says what it found."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from gligen.data.coco import spans
from gligen.data.example import BadExample, Source
from gligen.data.open import open_source, split_weight
from tests.data.sets import (
    NAMES,
    REAL,
    TRUTH,
    coco_data,
    needs_voc,
    noise,
    png,
    same_boxes,
    truth,
    write_coco,
    write_csv,
    write_jsonl,
    write_objects,
    write_pictures,
    write_voc,
    write_yolo,
)

WRITERS = {
    "coco": lambda folder: write_coco(folder).parent.parent,
    "yolo": write_yolo,
    "voc": write_voc,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "objects": write_objects,
}


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_gives_the_same_boxes_and_pixels(form, tmp_path):
    source, findings = open_source(WRITERS[form](tmp_path / "set"))
    assert isinstance(source, Source)
    assert (source.size, findings.images, findings.entities, findings.phrases) == (3, 3, 6, 3)
    assert not findings.left_out
    for n in range(3):
        example = source.example(n)
        name = Path(example.key).name
        assert source.key(n) == example.key
        assert same_boxes(example.entities, truth(name)), name
        i, (_, width, height, _) = next((i, row) for i, row in enumerate(TRUTH) if row[0] == name)
        assert (example.image == np.asarray(noise(width, height, i))).all()
        assert example.caption == (f"picture {name}" if form in ("jsonl", "csv") else "")
    with pytest.raises(IndexError):
        source.example(3)


@pytest.mark.parametrize("form", WRITERS)
def test_sources_go_to_worker_processes(form, tmp_path):
    source, _ = open_source(WRITERS[form](tmp_path / "set"))
    other = pickle.loads(pickle.dumps(source))
    assert other.example(1).entities == source.example(1).entities


def test_boxes_are_the_same_in_the_second_epoch(tmp_path):
    source, _ = open_source(write_coco(tmp_path))
    first = [source.example(n).entities for n in range(3)]
    assert [source.example(n).entities for n in range(3)] == first


@needs_voc
def test_real_photographs_have_equal_boxes_in_coco_voc_and_yolo():
    by_format = []
    for part in ("instances.json", "voc_xml", "yolo"):
        source, findings = open_source(REAL / "voc" / part)
        assert (findings.images, findings.entities, findings.phrases) == (60, 152, 20)
        rows = {}
        for n in range(60):
            example = source.example(n)
            rows[example.key] = example.image.shape, sorted((e.phrase, e.box) for e in example.entities)
        by_format.append(rows)
    coco, voc, yolo = by_format
    assert coco == voc
    assert coco.keys() == yolo.keys()
    for key, (shape, entities) in coco.items():
        assert yolo[key][0] == shape
        # names and boxes pair up by place: YOLO's 6 digits are half a millionth of a side off, centre and half width
        for name, box in entities:
            near = [e for e in yolo[key][1] if e[0] == name and np.allclose(e[1], box, rtol=0, atol=1.01e-6)]
            assert len(near) >= 1, (key, name, box)


# COCO and its dialects


def test_captions_lie_beside_instances(tmp_path):
    path = write_coco(tmp_path)
    captions = [{"id": i, "image_id": i % 3, "caption": f" caption\n{i} "} for i in range(5)]
    path.with_name("captions_x.json").write_text(json.dumps({"annotations": captions, "images": []}))
    source, findings = open_source(tmp_path)
    assert "captions from captions_x.json" in findings.notes
    example = source.example(1)
    assert (example.caption, example.other_captions) == ("caption 1", ("caption 4",))
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"images": [], "annotations": captions[:1]}))
    assert open_source(path, captions=other)[0].example(1).caption == ""


def test_goldg_cuts_phrases_from_captions(tmp_path):
    data = coco_data()
    data["images"][1]["caption"] = "two people, and a small dog in a hat"
    data["annotations"] = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 32, 48], "tokens_positive": [[16, 27]]},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [8, 8, 32, 48], "tokens_positive": [[4, 10], [31, 36]]},
        {"id": 3, "image_id": 1, "category_id": 1, "bbox": [8, 8, 32, 48], "tokens_positive": [[90, 95]]},
    ]
    data["categories"] = [{"id": 1, "name": "object"}]
    source, findings = open_source(write_coco(tmp_path, data))
    example = source.example(0)
    assert [entity.phrase for entity in example.entities] == ["a small dog", "people a hat"]
    assert example.caption == "two people, and a small dog in a hat"
    assert findings.left_out == {"box without a phrase": 1, "picture without boxes": 2}


def test_spans_that_are_none_are_nothing():
    assert spans("a cat", [[0, 5]]) == "a cat"
    assert spans("a cat", [[2, 99], "x", [1]]) == "cat"
    assert spans("a cat", None) == ""


def test_lvis_names_pictures_by_url(tmp_path):
    data = coco_data()
    for image in data["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/images/{image.pop('file_name')}"
    data["categories"][0]["name"] = "house_cat"
    source, _ = open_source(write_coco(tmp_path, data))
    assert source.example(1).entities[0].phrase == "house cat"


def test_objects365_finds_pictures_in_another_unpacking(tmp_path):
    data = coco_data()
    for i, image in enumerate(data["images"]):
        image["file_name"] = f"images/v1/patch{i}/{image['file_name']}"
    path = write_coco(tmp_path, data)
    for i in range(3):
        (tmp_path / f"images/patch{i}").mkdir()
    for i, (name, *_) in enumerate(TRUTH):
        (tmp_path / "images" / name).rename(tmp_path / f"images/patch{i}" / name)
        Image.new("RGB", (5, 5)).save(tmp_path / f"images/patch{(i + 1) % 3}/{name}")  # another of that name
    source, _ = open_source(path)
    assert [source.key(n) for n in range(3)] == [f"patch{i}/{row[0]}" for i, row in enumerate(TRUTH)]
    assert same_boxes(source.example(2).entities, truth("c.png"))


def test_names_that_fit_several_files_are_not_guessed(tmp_path):
    path = write_coco(tmp_path)
    for part in ("x", "y"):
        (tmp_path / "images" / part).mkdir()
        noise(80, 60).save(tmp_path / "images" / part / "a.png")
    (tmp_path / "images/a.png").unlink()
    _, findings = open_source(path, max_bad=0.5)
    assert findings.left_out == {"picture name that several files have": 1}
    assert findings.lost == 1


def test_coco_keypoints(tmp_path):
    data = coco_data()
    points = [0.0] * 51
    points[:3], points[3:6], points[6:9] = [40, 30, 2], [20, 15, 1], [7, 7, 0]
    data["annotations"] = [{"id": 1, "image_id": 0, "category_id": 5, "bbox": [8, 6, 40, 30], "keypoints": points}]
    data["annotations"].append({"id": 2, "image_id": 0, "category_id": 5, "bbox": [1, 1, 9, 9], "keypoints": [0] * 51})
    data["annotations"].append({"id": 3, "image_id": 1, "category_id": 5, "bbox": [1, 1, 9, 9], "keypoints": [1, 1, 2]})
    source, findings = open_source(write_coco(tmp_path, data, "person_keypoints_x.json"), "keypoint")
    assert (source.size, findings.persons) == (1, 1)
    (person,) = source.example(0).keypoints
    assert person == ((0.5, 0.5), (0.25, 0.25), *[None] * 15)
    assert findings.left_out["person without a visible keypoint"] == 1
    assert findings.left_out["keypoints that are not COCO's 17"] == 1
    assert "1 image, 1 person" in findings.lines()[0]


def test_a_folder_of_several_coco_files_is_not_guessed(tmp_path):
    write_coco(tmp_path, name="instances_train.json")
    write_coco(tmp_path, name="instances_val.json")
    with pytest.raises(ValueError, match=r"2 COCO files \(instances_train.json, instances_val.json\): name the one"):
        open_source(tmp_path)


def test_coco_lists_come_in_any_order_and_others_are_passed_over(tmp_path):
    data = {"info": {"a": [1, {"b": []}]}, "licenses": [], "empty": {}, **coco_data()}
    assert open_source(write_coco(tmp_path, data))[0].size == 3
    data = dict(reversed(data.items()))
    assert open_source(write_coco(tmp_path / "2", data))[0].size == 3


# YOLO


def test_darknet_has_text_files_beside_pictures(tmp_path):
    write_yolo(tmp_path / "a")
    write_pictures(tmp_path / "b")
    for label in (tmp_path / "a/labels/train").iterdir():
        (tmp_path / "b" / label.name).write_text(label.read_text())
    (tmp_path / "b/obj.names").write_text("\n".join(NAMES))
    source, findings = open_source(tmp_path / "b")
    assert findings.format.startswith("YOLO")
    assert same_boxes(source.example(0).entities, truth("a.png"))


def test_yolo_polygons_become_their_bounds_and_negatives_are_counted(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "labels/train/a.txt").write_text("2 0.1 0.2 0.5 0.1 0.4 0.9\n")
    (tmp_path / "labels/train/b.txt").write_text("")
    (tmp_path / "labels/train/c.txt").unlink()
    source, findings = open_source(tmp_path)
    assert same_boxes(source.example(0).entities, [("dog", (0.1, 0.1, 0.5, 0.9))])
    assert findings.left_out == {
        "label file (a picture without one has no boxes)": 1,
        "picture without boxes": 2,
    }
    assert findings.lost == 0


def test_yolo_poses(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("names: [person]\nkpt_shape: [17, 3]\n")
    for name in ("b", "c"):
        (tmp_path / f"labels/train/{name}.txt").write_text("")
    (tmp_path / "labels/train/a.txt").write_text("0 .5 .5 .5 .5 .25 .75 2" + " 0 0 0" * 16)
    (person,) = open_source(tmp_path, "keypoint")[0].example(0).keypoints
    assert person == ((0.25, 0.75), *[None] * 16)


def test_yolo_without_names_says_so(tmp_path):
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(ValueError, match=r"no class names: add data.yaml or .*obj.names"):
        open_source(tmp_path)


def test_bad_yolo_lines_are_counted_by_reason(tmp_path):
    write_yolo(tmp_path)
    lines = [
        "0 .5 .5 .2 .2",
        "cat .5 .5 .2 .2",
        "0 .5 .5",
        "9 .5 .5 .2 .2",
        "0 .5 .5 nan .2",
        "0 .5 .5 0 .2",
        "0 3 3 .1 .1",
    ]
    (tmp_path / "labels/train/a.txt").write_text("\n".join(lines))
    source, findings = open_source(tmp_path)
    assert len(source.example(0).entities) == 1
    assert findings.left_out == {
        "label line that is not numbers": 1,
        "label line of another length": 1,
        "label of a class without a name": 1,
        "box with a number that is none": 1,
        "box without area": 1,
        "box outside its picture": 1,
    }
    assert any("a.txt, line 2: cat" in line for line in findings.lines())


# folders


def test_caption_files_beside_pictures(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "a.txt").write_text("a caption\n")
    (tmp_path / "b.caption").write_text("another")
    (tmp_path / "lonely.txt").write_text("of nothing")
    source, findings = open_source(tmp_path, "canny")
    assert [source.example(n).caption for n in range(3)] == ["a caption", "another", ""]
    assert findings.left_out == {"text file of no picture": 1, "caption (a picture without one)": 1}
    assert findings.made_maps == "canny"
    with pytest.raises(ValueError, match=r"without one picture for box-text: .*3 × picture without boxes"):
        open_source(tmp_path)


def test_keypoints_and_several_captions_in_a_line(tmp_path):
    write_pictures(tmp_path)
    person = [[0.5, 0.25], *[None] * 16]
    line = {"file_name": "a.png", "caption": ["one", "two"], "keypoints": [person, [[1, 2]]]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    source, findings = open_source(tmp_path, "keypoint")
    example = source.example(0)
    assert example.keypoints == (((0.5, 0.25), *[None] * 16),)
    assert (example.caption, example.other_captions) == ("one", ("two",))
    assert findings.left_out == {
        "keypoints that are not 17 points [x, y] or null": 1,
        "picture that metadata.jsonl does not name": 2,
    }


def test_csv_boxes_in_fractions(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "x.csv").write_text(
        "image,text,phrase,x0,y0,x1,y1\na.png,words,a cat,0.1,0.2,0.3,0.4\nb.png,no box,,,,,\n"
    )
    source, findings = open_source(tmp_path)
    assert same_boxes(source.example(0).entities, [("a cat", (0.1, 0.2, 0.3, 0.4))])
    assert findings.left_out["picture without boxes"] == 1


def test_a_csv_without_file_names_says_so(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "x.csv").write_text("name,text\na.png,words\n")
    with pytest.raises(ValueError, match=r"no column of file names \(file_name, .*among name, text"):
        open_source(tmp_path)


# which format


def test_what_nothing_recognises_says_what_was_looked_for_and_what_is_there(tmp_path):
    (tmp_path / "notes.md").write_text("hello")
    (tmp_path / "sub").mkdir()
    with pytest.raises(
        ValueError, match=r"Looked for COCO JSON: .*YOLO: .*Pascal VOC: .*There is notes.md, sub/"
    ) as told:
        open_source(tmp_path)
    assert "\n" not in str(told.value)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="a file of 5 bytes"):
        open_source(tmp_path / "notes.md")


def test_a_folder_of_two_formats_is_not_guessed(tmp_path):
    write_voc(tmp_path)
    write_coco(tmp_path)
    with pytest.raises(ValueError, match=r"could be COCO JSON .* Pascal VOC .*: name the one that is meant"):
        open_source(tmp_path)


def test_annotations_without_pictures_say_where_they_were_looked_for(tmp_path):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(coco_data()))
    with pytest.raises(FileNotFoundError, match=r"no pictures in .*: say where they are with --images"):
        open_source(path)
    write_pictures(tmp_path.parent / "elsewhere")
    assert open_source(path, images=tmp_path.parent / "elsewhere")[0].size == 3


def test_weights_follow_the_last_colon(tmp_path, monkeypatch):
    assert split_weight("a/b:2.5") == ("a/b", 2.5)
    assert split_weight("s3://bucket/set") == ("s3://bucket/set", 1.0)
    assert split_weight("plain") == ("plain", 1.0)
    monkeypatch.chdir(tmp_path)
    Path("odd:2").mkdir()
    assert split_weight("odd:2") == ("odd:2", 1.0)
    with pytest.raises(ValueError, match="the weight is 0, give a number above 0"):
        split_weight("a:0")


# maps and masks


@pytest.mark.parametrize("mode", ["hed", "canny", "depth", "normal", "sem", "scribble"])
def test_maps_are_matched_by_name(mode, tmp_path):
    write_pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / mode).mkdir()
    labels = np.arange(80 * 60, dtype=np.int64).reshape(60, 80) % 150
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "pictures" / mode / "a.png")
    source, findings = open_source(tmp_path / "pictures", mode)
    assert findings.left_out[f"picture without {mode} map"] == 2
    shown = source.example(0).map
    assert shown.shape == ((60, 80) if mode == "sem" else (60, 80, 3))
    assert (shown.reshape(60, 80, -1)[..., 0] == labels).all()


def test_map_folders_are_not_pictures(tmp_path):
    write_pictures(tmp_path)
    write_pictures(tmp_path / "depth")
    assert open_source(tmp_path, "depth")[0].size == 3
    with pytest.raises(FileNotFoundError, match=r"no folder 'normal' with normal maps .* --maps"):
        open_source(tmp_path, "normal")
    write_pictures(tmp_path / "n")
    source, _ = open_source(tmp_path, "normal", maps="n")
    assert source.size == 6  # a folder of another name holds pictures too


def test_hed_can_follow_scribbles_made_from_pictures(tmp_path):
    write_pictures(tmp_path)
    _, findings = open_source(tmp_path, "hed", maps="scribble")
    assert findings.made_maps == "scribble"
    with pytest.raises(FileNotFoundError, match="no folder 'hed'"):
        open_source(tmp_path, "hed")


def test_masks_by_folder_for_inpainting(tmp_path):
    write_jsonl(tmp_path / "set")
    (tmp_path / "masks").mkdir()
    mask = np.zeros((60, 80), np.uint8)
    mask[10:20, 30:50] = 200
    Image.fromarray(mask).save(tmp_path / "masks/a.png")
    source, findings = open_source(tmp_path / "set", "inpaint-box-text", masks=tmp_path / "masks")
    assert (source.example(0).mask == np.where(mask, 255, 0)).all()
    assert findings.left_out == {"picture without a mask": 2}
    with pytest.raises(ValueError, match="masks are for the inpainting modes"):
        open_source(tmp_path / "set", masks=tmp_path / "masks")
    assert open_source(tmp_path / "set", "inpaint-box-text")[0].example(0).mask is None


# GLIGEN's TSV


def write_tsv(path: Path, *, is_det: bool = False, with_index: bool = False) -> list[int]:
    """TRUTH as a TSV; returns the lines' offsets."""
    offsets, content = [], b""
    for i, (name, width, height, boxes) in enumerate(TRUTH):
        caption = ", a ".join(["we see", *(box[0] for box in boxes)])
        annos = []
        for phrase, x0, y0, x1, y1 in boxes:
            start = caption.find(phrase)
            extra = {"category_name": phrase} if is_det else {"tokens_positive": [[start, start + len(phrase)]]}
            annos.append({"bbox": [x0, y0, x1 - x0, y1 - y0], **extra})
        row = {
            "data_id": i,
            "image": base64.b64encode(png(noise(width, height, i))).decode(),
            "file_name": name,
            "annos": annos,
        }
        row |= {"is_det": 1} if is_det else {"caption": caption}
        offsets.append(len(content))
        content += f"{i}\t{json.dumps(row)}\n".encode()
    path.write_bytes(content)
    if with_index:
        path.with_suffix(".lineidx").write_text("".join(f"{offset}\n" for offset in offsets))
    return offsets


@pytest.mark.parametrize("is_det", [False, True])
@pytest.mark.parametrize("with_index", [False, True])
def test_tsv_rows(is_det, with_index, tmp_path):
    write_tsv(tmp_path / "train-0000.tsv", is_det=is_det, with_index=with_index)
    write_tsv(tmp_path / "train-0001.tsv", is_det=is_det)
    source, findings = open_source(tmp_path)
    assert source.size == findings.images == 6
    assert "boxes not counted" in findings.lines()[0]
    for n in range(6):
        name, width, height, _ = TRUTH[n % 3]
        example = source.example(n)
        assert same_boxes(example.entities, truth(name))
        assert (example.image == np.asarray(noise(width, height, n % 3))).all()
        assert example.caption.startswith("" if is_det else "we see, a ")
        assert bool(example.caption) != is_det
        assert source.key(n) == f"train-000{n // 3}.tsv/{n % 3}"
    assert pickle.loads(pickle.dumps(source)).example(4).key == "train-0001.tsv/1"


def test_faults_of_tsv_rows(tmp_path):
    path = tmp_path / "x.tsv"
    write_tsv(path)
    good = path.read_bytes().splitlines()
    row = json.loads(good[0].split(b"\t")[1])
    broken = [
        (b"1\t{", "TSV row that is not JSON"),
        (b"1\t[]", "TSV row that is no JSON object"),
        (b"no tab", "TSV row that is not JSON"),
        (f"1\t{json.dumps({**row, 'image': 7})}".encode(), "TSV row without a picture"),
        (f"1\t{json.dumps({**row, 'image': '!'})}".encode(), "TSV row whose picture is not base64"),
        (f"1\t{json.dumps({**row, 'image': 'AAAA'})}".encode(), "picture: not an image file"),
        (f"1\t{json.dumps({**row, 'annos': None})}".encode(), "TSV row without annos"),
    ]
    path.write_bytes(b"\n".join([good[0], *(line for line, _ in broken), b""]))
    source, _ = open_source(path)
    for n, (_, reason) in enumerate(broken, 1):
        with pytest.raises(BadExample) as bad:
            source.example(n)
        assert bad.value.reason == reason
    annos = [*row["annos"], {"bbox": [1, 2]}, {"bbox": [1, 1, 5, 5]}, {"bbox": [900, 1, 5, 5], "category_name": "x"}]
    path.write_bytes(f"0\t{json.dumps({**row, 'annos': annos})}\n".encode())
    example = open_source(path)[0].example(0)
    assert same_boxes(example.entities, truth("a.png"))
    assert [fault.reason for fault in example.faults] == [
        "annotation without a box of four numbers",
        "annotation without a phrase",
        "box outside its picture",
    ]


def test_a_line_index_of_another_file_is_refused(tmp_path):
    path = tmp_path / "x.tsv"
    offsets = write_tsv(path)
    for content in ("0\n99999999\n", "5\n6\n", "0\n0\n", "zero", ""):
        path.with_suffix(".lineidx").write_text(content)
        with pytest.raises(ValueError, match="remove it, and it will be made"):
            open_source(path)
    path.with_suffix(".lineidx").write_text(" ".join(map(str, offsets)))
    assert open_source(path)[0].size == 3
    with pytest.raises(ValueError, match="holds boxes, nothing for the mode keypoint"):
        open_source(path, "keypoint")


def test_what_a_set_cannot_use_is_not_ignored(tmp_path):
    write_tsv(tmp_path / "x.tsv")
    write_jsonl(tmp_path / "set")
    with pytest.raises(ValueError, match="is GLIGEN TSV, which takes no images from elsewhere: leave them out"):
        open_source(tmp_path / "x.tsv", images=tmp_path)
    with pytest.raises(ValueError, match="is pictures, which takes no captions from elsewhere"):
        open_source(tmp_path / "set", captions=tmp_path / "c.json")
    with pytest.raises(ValueError, match="maps are for the map modes, but the mode is box-text"):
        open_source(tmp_path / "set", maps="canny")


# parquet


def write_parquet(path: Path, columns: dict[str, list], rows_a_group: int = 2, features: dict | None = None) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = arrow.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=rows_a_group)


def pictures() -> list[bytes]:
    return [png(noise(width, height, i)) for i, (_, width, height, _) in enumerate(TRUTH)]


def hugging_face(path: Path) -> None:
    """Pictures as {bytes, path}, and class numbers whose names are in the schema."""
    objects = [
        {
            "bbox": [[x0, y0, x1 - x0, y1 - y0] for _, x0, y0, x1, y1 in boxes],
            "category": [NAMES.index(box[0]) for box in boxes],
        }
        for *_, boxes in TRUTH
    ]
    images = [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(pictures())]
    labels = {"feature": {"names": list(NAMES), "_type": "ClassLabel"}, "_type": "Sequence"}
    features = {"objects": {"bbox": {}, "category": labels}}
    write_parquet(path, {"image": images, "objects": objects}, features=features)


def test_a_class_number_of_none_is_not_the_last_class(tmp_path):
    """-1 is what Hugging Face's datasets write for a label that is not known."""
    objects = [{"bbox": [[1.0, 1.0, 9.0, 9.0]], "category": [label]} for label in (0, -1)]
    features = {"objects": {"category": {"feature": {"names": list(NAMES), "_type": "ClassLabel"}}}}
    images = [{"bytes": content, "path": ""} for content in pictures()[:2]]
    write_parquet(tmp_path / "0.parquet", {"image": images, "objects": objects}, features=features)
    source, findings = open_source(tmp_path)
    assert [entity.phrase for n in range(source.size) for entity in source.example(n).entities] == [NAMES[0]]
    assert findings.left_out["objects without as many category names as boxes"] == 1


def layout_sam(path: Path) -> None:
    """Lists stored as text, xyxy in pixels."""
    columns = {
        "image": pictures(),
        "file_name": [row[0] for row in TRUTH],
        "width": [row[1] for row in TRUTH],
        "height": [row[2] for row in TRUTH],
        "global_caption": ["a picture"] * 3,
        "bbox_list": [str([list(box[1:]) for box in row[3]]) for row in TRUTH],
        "region_captions": [str([box[0] for box in row[3]]) for row in TRUTH],
    }
    write_parquet(path, columns)


def grit(path: Path) -> None:
    """Spans of the caption with fractions."""
    captions = [", ".join(box[0] for box in boxes) for *_, boxes in TRUTH]
    chunks = []
    for (_, w, h, boxes), caption in zip(TRUTH, captions, strict=True):
        starts = [caption.find(box[0]) for box in boxes]
        chunks.append(
            [
                [start, start + len(n), x0 / w, y0 / h, x1 / w, y1 / h, 0.9]
                for start, (n, x0, y0, x1, y1) in zip(starts, boxes, strict=True)
            ]
        )
    write_parquet(path, {"jpg": pictures(), "caption": captions, "noun_chunks": chunks})


@pytest.mark.parametrize("write", [hugging_face, layout_sam, grit])
def test_parquet(write, tmp_path):
    write(tmp_path / "data/train-00000-of-00001.parquet")
    source, findings = open_source(tmp_path)
    assert (findings.images, findings.entities, findings.phrases) == (3, 6, 3)
    assert not findings.left_out
    source = pickle.loads(pickle.dumps(source))
    for n, (name, width, height, _) in enumerate(TRUTH):
        example = source.example(n)
        assert same_boxes(example.entities, truth(name))
        assert (example.image == np.asarray(noise(width, height, n))).all()
        assert bool(example.caption) == (write is not hugging_face)


def test_parquet_splits_and_urls(tmp_path):
    hugging_face(tmp_path / "data/train-00000-of-00002.parquet")
    hugging_face(tmp_path / "data/train-00001-of-00002.parquet")
    hugging_face(tmp_path / "data/test-00000-of-00001.parquet")
    source, findings = open_source(tmp_path)
    assert source.size == 6
    assert "the split train; there are test, train: name a file to use another" in findings.notes
    assert (source.example(4).image == np.asarray(noise(64, 96, 1))).all()
    assert open_source(tmp_path / "data/test-00000-of-00001.parquet")[0].size == 3
    write_parquet(tmp_path / "urls.parquet", {"url": ["http://x"], "caption": ["x"]})
    with pytest.raises(ValueError, match=r"no column of pictures .* among url, caption. It has URLs: fetch them first"):
        open_source(tmp_path / "urls.parquet")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="not a parquet file"):
        open_source(tmp_path / "no.parquet")


def test_faults_of_parquet_rows(tmp_path):
    columns = {
        "image": [pictures()[0], None],
        "caption": ["a cat"] * 2,
        "noun_chunks": ["[[2, 5, 0.1, 0.1, 0.5, 0.5, 1], [1, 2]]", "[[2, 5, 0.1, 0.1, 0.5, 0.5, 1]]"],
    }
    write_parquet(tmp_path / "x.parquet", columns)
    source, findings = open_source(tmp_path)
    assert findings.left_out == {"noun chunk of fewer than 6 numbers": 1}
    assert source.example(0).entities[0].phrase == "cat"
    with pytest.raises(BadExample) as bad:
        source.example(1)
    assert bad.value.reason == "parquet row without picture bytes"


def test_side_tsvs_hold_maps(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "side").mkdir()
    write_tsv(tmp_path / "set/x.tsv")
    maps = [noise(width, height, 50 + i) for i, (_, width, height, _) in enumerate(TRUTH)]

    def write_side(ids: list[int], field: str) -> None:
        rows = [
            f"{i}\t{json.dumps({'data_id': i, field: base64.b64encode(png(shown)).decode()})}\n"
            for i, shown in zip(ids, maps, strict=True)
        ]
        (tmp_path / "side/x.tsv").write_text("".join(rows))

    write_side([0, 1, 2], "hed_edge")
    for maps_at in (tmp_path / "side", tmp_path / "side/x.tsv"):
        source, findings = open_source(tmp_path / "set", "hed", maps=str(maps_at))
        assert findings.images == 3
        for n, shown in enumerate(maps):
            assert (source.example(n).map == np.asarray(shown)).all()
    write_side([0, 7, 2], "hed_edge")
    with pytest.raises(BadExample, match=r"x.tsv/1: x.tsv has 7"):
        open_source(tmp_path / "set", "hed", maps=str(tmp_path / "side"))[0].example(1)
    with pytest.raises(FileNotFoundError, match="name its side TSV"):
        open_source(tmp_path / "set", "depth")
    with pytest.raises(ValueError, match="side TSVs hold hed, canny, depth, nothing for the mode sem"):
        open_source(tmp_path / "set", "sem")
    assert open_source(tmp_path / "set", "canny")[1].made_maps == "canny"
    assert open_source(tmp_path / "set", "hed", maps="scribble")[1].made_maps == "scribble"


# arrays


def test_depth_arrays_become_nearness(tmp_path):
    write_pictures(tmp_path / "set")
    (tmp_path / "set/depth").mkdir()
    metres = np.full((60, 80, 1), 4.0)
    metres[:, 20:40], metres[:, 40:60], metres[:, 60:] = 2.0, 1.0, 0.0
    np.save(tmp_path / "set/depth/a_depth.npy", metres)
    shown = open_source(tmp_path / "set", "depth")[0].example(0).map
    assert shown.shape == (60, 80, 3)
    # 1/4, 1/2 and 1 are 0, a third and the whole of the way; what has no depth is black
    assert shown[0, [0, 20, 40, 60], 0].tolist() == [0, 85, 255, 0]
    mask = np.ones((60, 80))
    mask[:, 40:60] = 0
    np.save(tmp_path / "set/depth/a_depth_mask.npy", mask)
    assert open_source(tmp_path / "set", "depth")[0].example(0).map[0, [0, 20, 40, 60], 0].tolist() == [0, 255, 0, 0]


def test_normal_arrays_become_colours(tmp_path):
    write_pictures(tmp_path / "set")
    (tmp_path / "set/normal").mkdir()
    np.save(tmp_path / "set/normal/a.npy", np.tile([-1.0, 0.2, 1.0], (60, 80, 1)))
    np.save(tmp_path / "set/normal/b.npy", np.zeros((96, 64)))
    np.save(tmp_path / "set/normal/c.npy", np.zeros((64, 65, 3), object))
    source, _ = open_source(tmp_path / "set", "normal")
    assert source.example(0).map[5, 5].tolist() == [0, 153, 255]
    for n, told in ((1, r"normals of shape \(96, 64\)"), (2, "pickle|Object arrays")):
        with pytest.raises(BadExample, match=told) as bad:
            source.example(n)
        assert bad.value.reason == "normal map that cannot be read"


# splits, and Flickr30k Entities


@pytest.mark.parametrize("layout", ["ultralytics", "roboflow"])
def test_yolo_reads_the_training_split_and_names_the_others(layout, tmp_path):
    write_yolo(tmp_path)
    if layout == "ultralytics":
        (tmp_path / "images/val").mkdir()
        (tmp_path / "labels/val").mkdir()
        (tmp_path / "images/train/c.png").rename(tmp_path / "images/val/c.png")
        (tmp_path / "labels/train/c.txt").rename(tmp_path / "labels/val/c.txt")
        (tmp_path / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {list(NAMES)}\n")
        other = tmp_path / "images/val"
    else:
        for split in ("train", "valid"):
            for part in ("images", "labels"):
                (tmp_path / split / part).mkdir(parents=True)
        for part, suffix in (("images", "png"), ("labels", "txt")):
            for name, split in (("a", "train"), ("b", "train"), ("c", "valid")):
                (tmp_path / f"{part}/train/{name}.{suffix}").rename(tmp_path / f"{split}/{part}/{name}.{suffix}")
            (tmp_path / part / "train").rmdir()
            (tmp_path / part).rmdir()
        text = f"train: ../train/images\nval: ../valid/images\nnames: {list(NAMES)}\n"
        (tmp_path / "data.yaml").write_text(text)
        other = tmp_path / "valid/images"
    source, findings = open_source(tmp_path)
    assert [Path(source.key(n)).name for n in range(source.size)] == ["a.png", "b.png"]
    assert findings.left_out == {"picture of the split val": 1}
    source, findings = open_source(tmp_path, images=other)
    assert [source.key(n) for n in range(source.size)] == ["c.png"]
    assert same_boxes(source.example(0).entities, truth("c.png"))
    assert not findings.left_out


def test_flickr30k_entities(tmp_path):
    for part in ("Sentences", "Annotations", "flickr30k-images"):
        (tmp_path / part).mkdir()
    noise(80, 60).save(tmp_path / "flickr30k-images/7.jpg")
    (tmp_path / "Sentences/7.txt").write_text(
        "[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] in [/EN#3/scene the yard] .\n"
        "[/EN#1/people Men] outside .\nNobody .\n"
    )
    boxes = [(1, (8, 6, 40, 30)), (1, (40, 6, 80, 60)), (2, (10, 10, 20, 20))]
    objects = "".join(
        f"<object><name>{n}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for n, (a, b, c, d) in boxes
    )
    objects += "<object><name>3</name><scene>1</scene><nobndbox>1</nobndbox></object>"
    size = "<size><width>80</width><height>60</height></size>"
    (tmp_path / "Annotations/7.xml").write_text(f"<annotation><filename>7.jpg</filename>{size}{objects}</annotation>")
    (tmp_path / "Sentences/8.txt").write_text("[/EN#9/people Nobody] .")
    source, findings = open_source(tmp_path, max_bad=0.5)
    assert findings.format.startswith("Flickr30k Entities")
    assert findings.left_out == {"picture file missing": 1, "picture without boxes": 1}
    first, second = source.example(0), source.example(1)
    assert first.caption == "Two young guys with shaggy hair in the yard ."
    two = [(0.1, 0.1, 0.5, 0.5), (0.5, 0.1, 1.0, 1.0)]
    hair = ("shaggy hair", (0.125, 1 / 6, 0.25, 1 / 3))
    assert same_boxes(first.entities, [*(("Two young guys", box) for box in two), hair])
    assert same_boxes(second.entities, [("Men", box) for box in two])
    assert source.key(0) == source.key(1) == "7.jpg"


def keys(path: Path, **choices: Path) -> list[str]:
    """The names of the pictures that are read, all with their own boxes; the findings' lines in `keys.lines`."""
    source, findings = open_source(path, **choices)
    keys.lines = findings.lines()
    for n in range(source.size):
        example = source.example(n)
        assert same_boxes(example.entities, truth(Path(example.key).name), within=1e-9)
    return [Path(source.key(n)).name for n in range(source.size)]


def told(text: str) -> bool:
    return any(text in line for line in keys.lines)


def test_pascal_voc_reads_the_training_split_and_lists_by_name(tmp_path):
    write_voc(tmp_path)
    lists = tmp_path / "ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("c\n")
    assert keys(tmp_path) == ["a.png", "b.png", "c.png"]
    assert told(f"all pictures are read, as ImageSets/Main has no train.txt; fewer by --data {lists}/val.txt")
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "trainval.txt").write_text("a\nb\nc\n")
    for whole in (tmp_path, tmp_path / "Annotations"):
        assert keys(whole) == ["a.png", "b.png"]
        assert told(
            f"the split train alone is read, by ImageSets/Main/train.txt; others by --data {lists}/val.txt, --data"
        )
    assert told("left out: 1 × picture that train.txt does not list, the first: c")
    assert keys(lists / "val.txt") == ["c.png"]
    assert not told("left out")
    assert told("Pascal VOC (Annotations/*.xml), those that val.txt lists: 1 image")
    (lists / "cat_trainval.txt").write_text("a  1\nb -1\nc  0\n")
    assert keys(lists / "cat_trainval.txt") == ["a.png", "c.png"]
    (tmp_path / "paths.txt").write_text("JPEGImages/b.png Annotations/b.xml\n")  # as PaddleX lists them
    assert keys(tmp_path / "paths.txt") == ["b.png"]
    (lists / "val.txt").write_text("c\nd\n")
    with pytest.raises(ValueError, match=r"listed without an XML file, the first: d: no Annotations/d.xml"):
        open_source(lists / "val.txt")
    (lists / "val.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"val.txt: lists no pictures"):
        open_source(lists / "val.txt")


def test_voc_pictures_may_have_spaces_in_their_names(tmp_path):
    write_voc(tmp_path)
    for path in [*tmp_path.rglob("a.*")]:
        path.rename(path.with_stem("a 1"))
    xml = tmp_path / "Annotations/a 1.xml"
    xml.write_text(xml.read_text().replace("a.png", "a 1.png"))
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a 1\n")
    assert open_source(tmp_path)[0].key(0) == "a 1.png"


def write_splits(folder: Path) -> None:
    """a and b in images/train, c in images/val."""
    write_yolo(folder)
    for part, suffix in (("images", "png"), ("labels", "txt")):
        (folder / part / "val").mkdir()
        (folder / f"{part}/train/c.{suffix}").rename(folder / f"{part}/val/c.{suffix}")


@pytest.mark.parametrize(
    "told_as",
    [
        {"train": "images/train", "val": "images/val"},
        {"train": "train.txt", "val": "val.txt"},
        {"train": ["lists/a.txt", "one.txt"], "val": ["val.txt"]},
        {"train": ["images/train"], "val": "val.txt", "path": "/content/nowhere"},
        {"train": "/content/nowhere/images/train", "val": "../images/val"},
    ],
    ids=["folders", "lists", "several", "path elsewhere", "absolute elsewhere"],
)
def test_yolo_splits_are_folders_lists_or_several(told_as, tmp_path):
    write_splits(tmp_path)
    (tmp_path / "train.txt").write_text("./images/train/a.png\nimages/train/b.png\n")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/a.txt").write_text("../images/train/a.png\n")
    (tmp_path / "one.txt").write_text("/content/elsewhere/images/train/b.png\n")
    (tmp_path / "val.txt").write_text("images\\val\\c.png\n")
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({**told_as, "names": list(NAMES)}))
    for whole in (tmp_path, tmp_path / "data.yaml"):
        assert keys(whole) == ["a.png", "b.png"]
        assert told("the split train alone is read; others by --data ")
        assert told("1 × picture of the split val, the first: images/val/c.png")
    assert keys(tmp_path / "images") == ["a.png", "b.png"]  # above both
    assert told("1 × picture of the split val, the first: images/val/c.png")
    assert keys(tmp_path, images=tmp_path / "images") == ["a.png", "b.png", "c.png"]
    assert told("holds pictures of the splits train, val: all are read")
    for part in ("val.txt", "images/val"):
        assert keys(tmp_path / part) == ["c.png"]
        assert not told("left out")
    assert keys(tmp_path / "train.txt") == ["a.png", "b.png"]
    assert told("YOLO (class names from data.yaml), those listed in train.txt: 2 images")


def test_a_yaml_may_lie_apart_from_its_pictures(tmp_path):
    write_splits(tmp_path / "sets/coco8")
    (tmp_path / "sets/coco8/data.yaml").unlink()
    (tmp_path / "code").mkdir()
    described = {"path": "../sets/coco8", "train": "images/train", "val": "images/val", "names": list(NAMES)}
    (tmp_path / "code/coco8.yaml").write_text(yaml.safe_dump(described))
    assert keys(tmp_path / "code/coco8.yaml") == ["a.png", "b.png"]
    described = {"train": str(tmp_path / "sets/coco8/images/train"), "val": "nowhere", "names": list(NAMES)}
    (tmp_path / "code/coco8.yaml").write_text(yaml.safe_dump(described))
    assert keys(tmp_path / "code/coco8.yaml") == ["a.png", "b.png"]
    assert told("1 × picture of no split")


def test_a_training_split_that_is_not_there_is_not_all_pictures(tmp_path):
    write_splits(tmp_path)
    (tmp_path / "data.yaml").write_text(f"train: images/training\nval: images/val\nnames: {list(NAMES)}\n")
    with pytest.raises(FileNotFoundError, match="its train is 'images/training', which is not there: mend it"):
        open_source(tmp_path)
    assert keys(tmp_path, images=tmp_path / "images/train") == ["a.png", "b.png"]
    (tmp_path / "data.yaml").write_text(f"val: images/val\nnames: {list(NAMES)}\n")
    assert keys(tmp_path) == ["a.png", "b.png", "c.png"]
    assert told("all pictures are read, as there is no split train; fewer by --data ")


def test_splits_without_a_yaml_are_darknets_lists_or_folders(tmp_path):
    write_splits(tmp_path / "folders")
    (tmp_path / "folders/data.yaml").unlink()
    (tmp_path / "folders/classes.txt").write_text("\n".join(NAMES))
    assert keys(tmp_path / "folders") == ["a.png", "b.png"]
    write_pictures(tmp_path / "darknet/obj_train_data")
    for label in (tmp_path / "folders/labels").rglob("*.txt"):
        (tmp_path / "darknet/obj_train_data" / label.name).write_text(label.read_text())
    (tmp_path / "darknet/obj.names").write_text("\n".join(NAMES))
    (tmp_path / "darknet/train.txt").write_text("data/obj_train_data/a.png\ndata/obj_train_data/c.png\n")
    (tmp_path / "darknet/valid.txt").write_text("data/obj_train_data/b.png\n")
    assert keys(tmp_path / "darknet") == ["a.png", "c.png"]
    assert told(f"others by --data {tmp_path}/darknet/valid.txt")
    assert keys(tmp_path / "darknet/valid.txt") == ["b.png"]


def test_pictures_that_are_listed_and_not_there_are_lost(tmp_path):
    write_splits(tmp_path)
    (tmp_path / "val.txt").write_text("images/val/c.png\nimages/val/a.png\n")  # there is one in train/
    with pytest.raises(ValueError, match=r"1 of 2 pictures .* listed and not there, the first: val.txt: images/val/a"):
        open_source(tmp_path / "val.txt")
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(ValueError, match=r"val.txt: a list of pictures, with neither class names \(data.yaml or"):
        open_source(tmp_path / "val.txt")


def test_validation_that_is_trained_on_is_told(tmp_path):
    write_yolo(tmp_path)  # train and val are one folder, as in coco128
    assert keys(tmp_path) == ["a.png", "b.png", "c.png"]
    assert told("all pictures of the split val are in train too")
    (tmp_path / "labels/train/d.txt").write_text("0 .5 .5 .2 .2\n")
    assert open_source(tmp_path, max_bad=1)[1].lost == 1


def test_a_folder_of_captions_below_class_names_is_no_yolo_set(tmp_path):
    write_yolo(tmp_path)
    write_pictures(tmp_path / "mine")
    (tmp_path / "mine/a.txt").write_text("a picture of two things here")
    assert open_source(tmp_path / "mine", "canny", maps="canny")[1].format == "pictures with caption files"
