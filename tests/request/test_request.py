"""Requests: what is accepted, what is refused and in which words, and that files and dicts give the same back."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from gligen.config import GroundingConfig, ModelConfig, UNetConfig
from gligen.fields import decode_file
from gligen.image_files import ImageFiles, mask_levels
from gligen.job import Job, ModelFacts, complete, complete_all
from gligen.modes import MODES
from gligen.request import (
    STYLE_BOX,
    Entity,
    Inpaint,
    Request,
    check_files,
    merge,
    parse_request,
    read_requests,
    serving_modes,
    to_dict,
)

ROOT = Path(__file__).parents[2]
BOX = [0.1, 0.2, 0.6, 0.9]
CAT = {"phrase": "a cat", "box": BOX}
PERSON = [[0.5, 0.1 + 0.05 * i] for i in range(17)]


def entity(**fields: Any) -> dict[str, Any]:
    return {"entities": [CAT, {**CAT, **fields}]}


def error_of(data: Any, where: str = "") -> str:
    with pytest.raises(ValueError, match=r".") as info:
        parse_request(data, folder=None, where=where)
    assert "\n" not in str(info.value)
    return str(info.value)


WRONG: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    # fields and types
    ({"promt": "x"}, ("'promt'", "did you mean 'prompt'", "num_images")),
    (entity(phrsae="x"), ("'entities[1].phrsae'", "did you mean 'entities[1].phrase'", "image")),
    ({"inpaint": {"imag": "x"}}, ("'inpaint.imag'", "inpaint.image", "mask")),
    ({"prompt": None}, ("prompt is None", "give text")),
    ({"prompt": False}, ("prompt is False", "in quotes")),
    ({"prompt": "\ud800"}, ("prompt is", "valid Unicode")),
    ({"negative_prompt": 3}, ("negative_prompt is 3",)),
    ({"entities": "cat"}, ("entities is 'cat'", "list of entities")),
    ({"entities": [CAT, "cat"]}, ("entities[1] is 'cat'", "phrase, image, box")),
    ({"hed": ""}, ("hed is ''", "path")),
    ({"sem": 3}, ("sem is 3", "path")),
    ({"depth": "a\0b"}, ("depth is 'a\\x00b'", "path")),
    # boxes
    (entity(box="abc"), ("entities[1].box is 'abc'", "give four numbers x0, y0, x1, y1")),
    (entity(box=[0, 0, 1]), ("entities[1].box is [0, 0, 1]", "give four numbers")),
    (entity(box=[0, 0, "1", 1]), ("entities[1].box", "give four numbers")),
    (entity(box=[0, 0, True, 1]), ("entities[1].box", "give four numbers")),
    (entity(box=[0.6, 0.1, 0.4, 0.9]), ("entities[1].box is [0.6, 0.1, 0.4, 0.9]", "x0 must be below x1")),
    (entity(box=[0.4, 0.1, 0.4, 0.9]), ("entities[1].box", "x0 must be below x1")),
    (entity(box=[0.1, 0.9, 0.4, 0.2]), ("entities[1].box", "y0 must be below y1")),
    (entity(box=[0, 0, 1.2, 1]), ("entities[1].box", "outside [0, 1]")),
    (entity(box=[-0.1, 0, 1, 1]), ("entities[1].box", "outside [0, 1]")),
    (entity(box=[10, 20, 300, 400]), ("entities[1].box", "in pixels? divide by width and height")),
    (entity(box=[0, 0, math.nan, 1]), ("entities[1].box is [0, 0, nan, 1]", "finite")),
    (entity(box=[0, 0, math.inf, 1]), ("entities[1].box", "finite")),
    (entity(box=[0, 0, 10**400, 1]), ("entities[1].box", "give four numbers")),
    (entity(box=list(STYLE_BOX)), ("entities[1].box", "x0 must be below x1")),  # a style needs a picture
    ({"entities": [{"phrase": "a cat"}]}, ("entities[0].box is missing",)),
    (entity(phrase=" \n "), ("entities[1].phrase", "entities[1].image")),
    (entity(phrase=7), ("entities[1].phrase is 7", "give text")),
    # keypoints
    ({"keypoints": 3}, ("keypoints is 3", "list of persons")),
    ({"keypoints": [PERSON, None]}, ("keypoints[1] is None", "list of points")),
    ({"keypoints": [PERSON[:16]]}, ("keypoints[0] has 16 points", "17")),
    ({"keypoints": [PERSON] * 9}, ("keypoints has 9 persons", "at most 8")),
    ({"keypoints": [[*PERSON[:16], [0.5, 1.2]]]}, ("keypoints[0][16] is [0.5, 1.2]", "outside [0, 1]")),
    ({"keypoints": [[*PERSON[:16], [50, 120]]]}, ("keypoints[0][16]", "in pixels?")),
    ({"keypoints": [[*PERSON[:16], [0.5, math.nan]]]}, ("keypoints[0][16]", "finite")),
    ({"keypoints": [[*PERSON[:16], [0.5, 0.5, 2]]]}, ("keypoints[0][16]", "give x, y")),
    # numbers
    ({"size": 512}, ("size is 512", "width and height")),
    ({"size": [512, 0]}, ("size is [512, 0]", "above 0")),
    ({"size": [512.0, 512]}, ("size is [512.0, 512]", "whole")),
    ({"steps": 0}, ("steps is 0", "from 1 to 1000")),
    ({"steps": 1001}, ("steps is 1001", "from 1 to 1000")),
    ({"steps": 20.0}, ("steps is 20.0", "whole number")),
    ({"steps": True}, ("steps is True", "whole number")),
    ({"sampler": "heun"}, ("sampler is 'heun'", "ddpm, ddim, plms, dpmpp, unipc, euler")),
    ({"sampler": ["ddim"]}, ("sampler is ['ddim']", "ddpm, ddim, plms, dpmpp")),
    ({"guidance": math.inf}, ("guidance is inf", "finite")),
    ({"guidance": "7.5"}, ("guidance is '7.5'", "give a number")),
    ({"eta": 1.5, "sampler": "ddim"}, ("eta is 1.5", "from 0 to 1")),
    ({"eta": 0.5}, ("eta is 0.5", "'plms'", "use 'ddim'")),
    ({"schedule": [0.5, 0.5]}, ("schedule is [0.5, 0.5]", "three fractions")),
    ({"schedule": [0.5, 0, 0.6]}, ("schedule is [0.5, 0, 0.6]", "sum to 1")),
    ({"schedule": [1.5, -0.5, 0]}, ("schedule is [1.5, -0.5, 0]", "in [0, 1]")),
    ({"schedule": [math.nan, 0, 1]}, ("schedule is [nan, 0, 1]", "in [0, 1]")),
    ({"tau": 1.1}, ("tau is 1.1", "from 0 to 1")),
    ({"tau": 0.3, "schedule": [0.3, 0, 0.7]}, ("tau and schedule", "leave one out")),
    ({"seed": -2}, ("seed is -2", "from 0 to 9223372036854775807")),
    ({"seed": 2**63}, ("seed is 9223372036854775808",)),
    ({"num_images": 0}, ("num_images is 0", "at least 1")),
    # what no model can do
    ({"entities": [CAT], "keypoints": [PERSON]}, ("entities and keypoints", "leave one out")),
    ({"hed": "a.png", "canny": "b.png"}, ("hed and canny", "leave one out")),
    ({"entities": [CAT], "sem": "a.png"}, ("entities and sem", "leave one out")),
    ({"inpaint": {"image": "a.png"}, "keypoints": [PERSON]}, ("inpaint and keypoints", "entities only")),
    ({"inpaint": {"image": "a.png"}, "depth": "b.png"}, ("inpaint and depth", "entities only")),
    ({"inpaint": {"mask": "a.png"}}, ("inpaint.image is missing",)),
    ({"inpaint": "a.png"}, ("inpaint is 'a.png'", "image, mask")),
]


@pytest.mark.parametrize(("data", "words"), WRONG, ids=[words[0] for _, words in WRONG])
def test_a_wrong_request_is_refused_in_one_line_naming_the_field(data: dict[str, Any], words: tuple[str, ...]) -> None:
    message = error_of({"prompt": "x", **data}, where="requests.json, request 3: ")
    assert message.startswith("requests.json, request 3: ")
    assert all(word in message for word in words), message


def test_what_is_no_object_and_what_has_no_prompt_is_refused() -> None:
    assert "the request is [1]: give an object" in error_of([1])
    assert "prompt is missing" in error_of({})
    assert len(error_of({"prompt": ["long"] * 1000})) < 200


FULL = {
    "prompt": "ein Fuchs – 狐",
    "negative_prompt": "blurry",
    "entities": [CAT, {"image": "/pictures/ball.png", "box": [0, 0, 1, 1]}, {"image": "/s", "box": list(STYLE_BOX)}],
    "inpaint": {"image": "/pictures/house.png", "mask": "/pictures/mask.png"},
    "size": [512, 768],
    "steps": 20,
    "sampler": "ddim",
    "guidance": 5,
    "eta": 0.5,
    "schedule": [0.2, 0.3, 0.5],
    "seed": 2**63 - 9,
    "num_images": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        {"prompt": ""},
        FULL,
        {"prompt": "x", "keypoints": [[None, *PERSON[1:]], PERSON], "tau": 0.3},
        {"prompt": "x", "sem": "/maps/sem.png", "size": None, "entities": [], "inpaint": None},
    ],
)
def test_plain_data_of_a_request_gives_the_same_request_back(data: dict[str, Any]) -> None:
    request = parse_request(data)
    assert parse_request(to_dict(request)) == request
    assert parse_request(json.loads(json.dumps(to_dict(request)))) == request
    hash(request)  # frozen throughout


def test_plain_data_holds_only_what_differs_from_the_defaults() -> None:
    assert to_dict(parse_request({"prompt": "x", "steps": 50, "tau": None})) == {"prompt": "x"}
    assert to_dict(parse_request(FULL)) == {**FULL, "guidance": 5.0}


def test_tau_is_short_for_a_schedule_without_decay() -> None:
    assert parse_request({"prompt": "x", "tau": 0.3}).schedule == (0.3, 0.0, 0.7)


def test_a_point_at_the_origin_is_an_absent_one() -> None:
    request = parse_request({"prompt": "x", "keypoints": [[[0, 0], None, *PERSON[2:]]]})
    assert request.keypoints[0][:3] == (None, None, (0.5, 0.2))


def test_a_style_reference_keeps_its_published_box() -> None:
    request = parse_request({"prompt": "x", "entities": [{"image": "a.png", "box": list(STYLE_BOX)}]})
    assert request.entities[0].box == STYLE_BOX


def test_what_to_repaint_has_to_be_said(tmp_path: Path) -> None:
    inpaint = {"inpaint": {"image": str(picture(tmp_path / "a.png"))}}
    style = {"entities": [{"image": str(tmp_path / "a.png"), "box": list(STYLE_BOX)}]}
    for data in (inpaint, inpaint | style):
        message = file_error(data)
        assert "inpaint has no mask, and there is no box to repaint: give inpaint.mask or entities" in message
    check_files(parse_request({"prompt": "x", **inpaint, "entities": [CAT]}))


def test_relative_paths_start_from_the_folder(tmp_path: Path) -> None:
    data = {"prompt": "x", "entities": [{"image": "a.png", "box": BOX}], "inpaint": {"image": "in/b.png"}}
    request = parse_request(data, folder=tmp_path)
    assert request.entities[0].image == str(tmp_path / "a.png")
    assert request.inpaint == Inpaint(image=str(tmp_path / "in" / "b.png"))
    assert parse_request({"prompt": "x", "hed": "/a.png"}, folder=tmp_path).hed == "/a.png"


def test_merging_replaces_fields_and_checks_again() -> None:
    request = parse_request({"prompt": "x", "tau": 0.3, "steps": 10, "entities": [CAT]})
    assert merge(request, {}) == request
    merged = merge(request, {"steps": 20, "tau": 0.5, "prompt": "y"})
    assert (merged.steps, merged.schedule, merged.prompt) == (20, (0.5, 0.0, 0.5), "y")
    assert merged.entities == request.entities
    with pytest.raises(ValueError, match="entities and keypoints"):
        merge(request, {"keypoints": [PERSON]})
    with pytest.raises(ValueError, match="tau and schedule"):
        merge(request, {"tau": 0.5, "schedule": [1, 0, 0]})


# Models


GENERATION = tuple(name for name, mode in MODES.items() if not mode.is_inpainting)
INPAINT = {"inpaint": {"image": "a.png", "mask": "b.png"}}
PICTURED = {"entities": [CAT, {**CAT, "image": "a.png"}]}


@pytest.mark.parametrize(
    ("data", "modes"),
    [
        ({}, GENERATION),
        ({"entities": [CAT]}, ("box-text", "box-text-image")),
        (PICTURED, ("box-text-image",)),
        ({"keypoints": [PERSON]}, ("keypoint",)),
        *(({name: "a.png"}, (name,)) for name in ("hed", "canny", "depth", "normal", "sem", "scribble")),
        (INPAINT, ("inpaint-box-text", "inpaint-box-text-image")),
        ({**INPAINT, "entities": [CAT]}, ("inpaint-box-text", "inpaint-box-text-image")),
        ({**INPAINT, **PICTURED}, ("inpaint-box-text-image",)),
    ],
)
def test_a_request_is_served_by_the_modes_that_take_all_of_it(
    data: dict, modes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (8, 8), 151).save("a.png")
    Image.new("L", (8, 8), 255).save("b.png")
    request = parse_request({"prompt": "x", **data})
    assert serving_modes(request) == modes
    for mode in MODES:
        if mode in modes:
            assert for_model(request, mode).request.schedule == (MODES[mode].schedule if data else None)
        else:
            with pytest.raises(ValueError, match=f"^w: this request has .*mode is {mode}: use a {modes[0]}"):
                for_model(request, mode)


def for_model(request: Request, mode: str | None, **limits: int) -> Job:
    return complete(request, facts(mode, **limits), where="w: ")


def facts(mode: str | None, **limits: int) -> ModelFacts:
    grounding = GroundingConfig(mode=mode, **limits) if mode else None
    config = ModelConfig(unet=UNetConfig(grounding=grounding))
    return ModelFacts(config=config, has_image_encoder=True, has_base_conv=True)


def test_without_grounding_the_fusers_stay_off_unless_asked_for() -> None:
    job = for_model(parse_request({"prompt": "x"}), "box-text")
    assert (job.request.schedule, set(job.gates)) == (None, {0.0})
    job = for_model(parse_request({"prompt": "x", "tau": 1}), "box-text")
    assert (job.request.schedule, set(job.gates)) == ((1.0, 0.0, 0.0), {1.0})


def test_a_base_model_serves_only_text() -> None:
    job = for_model(parse_request({"prompt": "x"}), None)
    assert (job.size, job.request.size, job.request.schedule) == ((512, 512), (512, 512), None)
    for data, has in (({"entities": [CAT]}, "entities"), ({"sem": "a.png"}, "a sem map"), (INPAINT, "inpaint")):
        with pytest.raises(ValueError, match=f"has .*{has}.*, but the checkpoint has no grounding: use a"):
            for_model(parse_request({"prompt": "x", **data}), None)


def test_the_refusal_of_a_mode_says_what_to_use() -> None:
    with pytest.raises(ValueError, match="x") as info:
        for_model(parse_request({"prompt": "x", "keypoints": [PERSON]}), "box-text")
    expected = "this request has keypoints, but the checkpoint's mode is box-text: use a keypoint checkpoint"
    assert str(info.value) == f"w: {expected}"


def test_a_model_keeps_the_size_and_schedule_that_were_asked_for() -> None:
    request = parse_request({"prompt": "x", "entities": [CAT], "size": [512, 768], "tau": 0.5})
    assert for_model(request, "box-text").request == request


def test_sizes_and_counts_beyond_the_model_are_refused_with_what_it_takes() -> None:
    crowd = parse_request({"prompt": "x", "entities": [CAT] * 3, "size": [500, 520]})
    with pytest.raises(ValueError, match=r"^w: entities has 3 entries: this model takes at most 2$"):
        for_model(crowd, "box-text", max_entities=2)
    with pytest.raises(ValueError, match=r"^w: size is 500 x 520: .* of 8, such as 496 x 520 or 504 x 520$"):
        for_model(crowd, "box-text")
    tiny = parse_request({"prompt": "x", "size": [10, 64]})
    with pytest.raises(ValueError, match=r"such as 8 x 64 or 16 x 64$"):
        for_model(tiny, "box-text")
    people = parse_request({"prompt": "x", "keypoints": [PERSON] * 3})
    with pytest.raises(ValueError, match=r"^w: keypoints has 3 entries: this model takes at most 2$"):
        for_model(people, "keypoint", max_persons=2)


BY_HAND = [data for data, _ in WRONG if not {"promt", "tau"} & set(data)]  # Python itself refuses unknown fields


@pytest.mark.parametrize("data", BY_HAND)
def test_a_request_made_by_hand_is_refused_as_a_parsed_one_is(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".") as info:
        Request(**{"prompt": "x", **data})
    assert str(info.value) == error_of({"prompt": "x", **data})


def test_entities_and_inpaint_check_themselves() -> None:
    with pytest.raises(ValueError, match=r"^entity\.box is \[0.5, 0.1, 0.2, 0.9\]: x0 must be below x1$"):
        Entity(phrase="a cat", box=(0.5, 0.1, 0.2, 0.9))
    with pytest.raises(ValueError, match=r"^entity\.phrase is ' ': name the thing"):
        Entity(phrase=" ", box=(0, 0, 1, 1))
    with pytest.raises(ValueError, match=r"^inpaint\.mask is 3: give the path"):
        Inpaint(image="a.png", mask=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x0 must be below x1"):
        dataclasses.replace(Entity(**CAT), box=(0.5, 0, 0.5, 1))  # type: ignore[arg-type]


def test_fields_take_what_python_has(tmp_path: Path) -> None:
    plain = parse_request(
        {
            "prompt": "x",
            "entities": [CAT, {"image": str(tmp_path / "a.png"), "box": [0.25, 0.5, 0.75, 1]}],
            "size": [512, 768],
            "steps": 20,
            "guidance": 5,
            "seed": 7,
            "schedule": [0.5, 0.25, 0.25],
        }
    )
    rich = Request(
        prompt=np.str_("x"),
        entities=[
            Entity(phrase="a cat", box=torch.tensor(BOX, dtype=torch.float64)),
            {"image": tmp_path / "a.png", "box": np.array([0.25, 0.5, 0.75, 1])},
        ],
        size=np.array([512, 768]),
        steps=np.int64(20),
        guidance=torch.tensor(5),
        seed=np.uint8(7),
        schedule=[np.float32(0.5), np.float64(0.25), 0.25],
    )
    assert rich == plain
    assert parse_request(json.loads(json.dumps(to_dict(rich)))) == rich
    people = np.array([PERSON, PERSON])
    assert Request(prompt="x", keypoints=torch.from_numpy(people)) == parse_request(
        {"prompt": "x", "keypoints": [PERSON, PERSON]}
    )
    for wrong in (np.zeros((2, 3)), torch.zeros(4, 2), np.array(["a"] * 4), np.array([True] * 4)):
        with pytest.raises(ValueError, match=r"^entity\.box is [^\n]*give four numbers"):
            Entity(phrase="a cat", box=wrong)
    with pytest.raises(ValueError, match=r"steps is .*whole number"):
        Request(prompt="x", steps=np.float64(20))  # type: ignore[arg-type]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_request({"prompt": "x", "hed": "~/a.png"}, folder=Path("/b")).hed == str(tmp_path / "a.png")
    assert Inpaint(image=Path("~/a.png")).image == str(tmp_path / "a.png")


def test_images_in_memory_stand_for_files_but_not_in_json(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", "L")
    image = Image.open(tmp_path / "a.png")
    request = Request(prompt="x", depth=image)
    check_files(request)
    assert request.depth is image
    assert request == Request(prompt="x", depth=image)
    assert serving_modes(request) == ("depth",)
    assert merge(request, {"seed": 3}).depth is image
    with pytest.raises(ValueError, match=r"^depth is an image in memory"):
        to_dict(request)
    with pytest.raises(ValueError, match=r"^sem, a semantic colouring"):
        check_files(Request(prompt="x", sem=Image.new("RGB", (8, 8))))
    wide, tall = Image.new("RGB", (60, 40)), Image.new("L", (40, 60), 255)
    with pytest.raises(ValueError, match=r"inpaint\.mask is 40 x 60 pixels, but inpaint\.image 60 x 40"):
        check_files(Request(prompt="x", inpaint=Inpaint(image=wide, mask=tall)))


def test_each_file_of_a_run_is_opened_once(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    images = ImageFiles()
    first = images.open(str(path))
    path.unlink()
    assert images.open(path) is first
    few = ImageFiles(limit=100)  # bytes: nothing of this is kept
    with pytest.raises(FileNotFoundError):
        few.open(path)


def test_a_job_has_everything_that_painting_needs() -> None:
    request = parse_request({"prompt": "x", "entities": [CAT], "steps": 10, "num_images": 3, "seed": 5})
    job = for_model(request, "box-text")
    assert job.size == (512, 512)
    assert job.latent_shape == (4, 64, 64)
    assert job.gates == (1.0,) * 3 + (0.0,) * 7
    assert job.seeds == (5, 6, 7)
    assert job.alone(2) == dataclasses.replace(
        request, num_images=1, seed=7, size=(512, 512), schedule=MODES["box-text"].schedule
    )
    wide = for_model(dataclasses.replace(request, size=(768, 512)), "box-text")
    assert (wide.size, wide.latent_shape) == ((768, 512), (4, 64, 96))
    short = wide.shortened(4, 2)
    assert (short.size, short.gates, short.seeds) == ((768, 512), (1.0, 1.0, 0.0, 0.0), (5, 6))


# Files


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Path:
    noise = Image.effect_noise(size, 60)
    noise.convert(mode).save(path)
    return path


def file_error(data: dict[str, Any], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind, match=r".") as info:
        check_files(parse_request({"prompt": "x", **data}), where="w: ")
    message = str(info.value)
    assert "\n" not in message
    assert message.startswith("w: ")
    return message


def test_missing_files_are_named_with_their_field(tmp_path: Path) -> None:
    entities = [CAT, {"image": str(tmp_path / "none.png"), "box": BOX}]
    message = file_error({"entities": entities}, FileNotFoundError)
    assert "entities[1].image is" in message
    assert "none.png" in message
    picture(tmp_path / "a.png")
    inpaint = {"image": str(tmp_path / "a.png"), "mask": str(tmp_path / "m.png")}
    assert "inpaint.mask is" in file_error({"inpaint": inpaint}, FileNotFoundError)


def test_files_that_are_no_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    assert "canny is" in file_error({"canny": str(tmp_path / "a.png")})
    assert "Is a directory" in file_error({"canny": str(tmp_path)})
    assert "Not a directory" in file_error({"canny": str(tmp_path / "a.png" / "b.png")})
    picture(tmp_path / "f.tif", "F")
    assert "floating-point" in file_error({"depth": str(tmp_path / "f.tif")})


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp"])
def test_a_truncated_image_is_found_before_it_is_used(tmp_path: Path, suffix: str) -> None:
    path = picture(tmp_path / f"a.{suffix}", size=(64, 64))
    check_files(parse_request({"prompt": "x", "hed": str(path)}))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    message = file_error({"hed": str(path)})
    assert "hed is" in message
    assert "truncated" in message or "not an image" in message


def test_a_damaged_png_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    content = bytearray(path.read_bytes())
    content[-13] ^= 255  # the checksum of the pixels, in front of the 12 bytes of IEND: decoding alone skips it
    path.write_bytes(content)
    assert "depth is" in file_error({"depth": str(path)})


def test_label_maps_have_one_channel_of_known_labels(tmp_path: Path) -> None:
    path = str(tmp_path / "sem.tif")
    for mode in ("L", "P", "I", "I;16"):
        for value, is_known in ((0, True), (151, True), (152, False), (255, False)):
            labels = Image.new(mode, (8, 8), value)
            if mode == "P":
                labels.putpalette(bytes(range(256)) * 3)
            labels.save(path)
            if is_known:
                check_files(parse_request({"prompt": "x", "sem": path}))
            else:
                assert f"{value}..{value}" in file_error({"sem": path})
    picture(tmp_path / "sem.tif", "RGB")
    assert "semantic colouring (mode RGB)" in file_error({"sem": path})
    picture(tmp_path / "sem.tif", "LA")
    assert "not a label map (mode LA)" in file_error({"sem": path})


def test_a_mask_has_the_shape_of_its_picture(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", size=(60, 40))
    inpaint = {"image": str(tmp_path / "a.png"), "mask": str(tmp_path / "m.png")}
    Image.new("L", (30, 20), 255).save(tmp_path / "m.png")
    check_files(parse_request({"prompt": "x", "inpaint": inpaint}))
    Image.new("L", (20, 30), 255).save(tmp_path / "m.png")
    assert "inpaint.mask is 20 x 30 pixels, but inpaint.image 60 x 40" in file_error({"inpaint": inpaint})


def on_sheet(size: tuple[int, int], sheet: Any, shape: Any, mode: str = "L") -> Image.Image:
    """A left half of one kind on a sheet of another."""
    if mode == "I;16":  # which PIL cannot paste into
        return Image.fromarray(np.repeat(np.array([shape, sheet], np.uint16), size[0] // 2)[None].repeat(size[1], 0))
    image = Image.new(mode, size, sheet)
    image.paste(shape, (0, 0, size[0] // 2, size[1]))
    return image


def test_what_is_neither_black_nor_white_is_no_mask(tmp_path: Path) -> None:
    photograph = picture(tmp_path / "a.png", size=(60, 40))
    red = on_sheet((60, 40), "black", "red", "RGB")
    blue = on_sheet((60, 40), "black", (0, 0, 255), "RGB")  # of a brightness that is nearly black
    red.save(tmp_path / "red.png")
    blue.save(tmp_path / "blue.png")
    for mask in ("a.png", "red.png", "blue.png"):
        inpaint = {"image": str(photograph), "mask": str(tmp_path / mask)}
        message = file_error({"inpaint": inpaint})
        assert "black" in message
        assert "white" in message
    soft = on_sheet((60, 40), 0, 255).filter(ImageFilter.GaussianBlur(2))
    soft.save(tmp_path / "soft.png")
    check_files(
        parse_request({"prompt": "x", "inpaint": {"image": str(photograph), "mask": str(tmp_path / "soft.png")}})
    )


HOLED = on_sheet((60, 40), (200, 180, 40, 255), (200, 180, 40, 0), "RGBA")
HOLED.paste((20, 90, 200, 255), (40, 0, 60, 40))  # a picture, if a plain one


@pytest.mark.parametrize("sheet", ["picture", "black"])
def test_a_transparent_hole_in_a_mask_is_what_is_repainted(sheet: str) -> None:
    mask = HOLED if sheet == "picture" else on_sheet((60, 40), (0, 0, 0, 255), (0, 0, 0, 0), "RGBA")
    expected = np.zeros((40, 60), np.uint8)
    expected[:, :30] = 255
    request = Request(prompt="x", inpaint=Inpaint(image=Image.new("RGB", (60, 40)), mask=mask))
    assert check_files(request) == ["the transparent part of inpaint.mask, 50 % of it, is what is repainted"]
    assert np.array_equal(np.asarray(mask_levels(mask)), expected)


def test_a_layer_painted_in_a_colour_is_refused() -> None:
    layer = on_sheet((60, 40), (0, 0, 0, 0), (255, 0, 0, 255), "RGBA")
    with pytest.raises(ValueError, match=r"^inpaint\.mask, whose opaque part has one colour, [^\n]*paint it white$"):
        check_files(Request(prompt="x", inpaint=Inpaint(image=Image.new("RGB", (60, 40)), mask=layer)))


def test_a_transparent_hole_in_the_picture_is_what_is_repainted(tmp_path: Path) -> None:
    HOLED.save(tmp_path / "a.png")
    job = for_model(Request(prompt="x", inpaint=Inpaint(image=tmp_path / "a.png")), "inpaint-box-text")
    opened = job.opened().inpaint
    assert opened is not None
    assert np.array_equal(np.asarray(opened.mask), np.asarray(HOLED)[..., 3] ^ 255)
    assert job.notes[0] == "the transparent part of inpaint.image, 50 % of it, is what is repainted"
    boxes = Request(prompt="x", inpaint=Inpaint(image=HOLED), entities=[CAT])
    assert check_files(boxes) == [job.notes[0] + ", not the boxes"]
    mask = Inpaint(image=HOLED, mask=on_sheet((60, 40), 0, 255))
    assert "inpaint.mask says what is repainted" in check_files(Request(prompt="x", inpaint=mask))[0]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((96, 64), (576, 384)),  # exactly; of 640 x 448 and others nothing fits
        ((64, 64), (512, 512)),
        ((1920, 1080), (704, 384)),
        ((1080, 1920), (384, 704)),
        ((500, 502), (512, 512)),
        ((4000, 100), (3200, 64)),
    ],
)
def test_without_a_size_the_picture_gives_its_shape(size: tuple[int, int], expected: tuple[int, int]) -> None:
    inpaint = Request(prompt="x", entities=[CAT], inpaint=Inpaint(image=Image.new("RGB", size)))
    depth = Request(prompt="x", depth=Image.linear_gradient("L").resize(size))
    for request, mode in ((inpaint, "inpaint-box-text"), (depth, "depth")):
        job = for_model(request, mode)
        assert job.size == job.request.size == expected
        W, H = size
        is_cut = abs(W * expected[1] / (H * expected[0]) - 1) > 1e-9
        assert any(f"is {W} x {H}: its middle" in note for note in job.notes) is is_cut
        square = for_model(dataclasses.replace(request, size=(512, 512)), mode)
        assert square.size == (512, 512)
        assert bool(square.notes) is (W != H)
    people = Request(prompt="x", keypoints=[PERSON])
    assert for_model(people, "keypoint").size == (512, 512)


def test_a_reference_that_is_not_square_is_said_to_be_cut() -> None:
    for size, count in (((60, 40), 1), ((40, 40), 0)):
        reference = Entity(image=Image.new("RGB", size), box=(0, 0, 1, 1))
        job = for_model(Request(prompt="x", entities=[reference]), "box-text-image")
        assert len(job.notes) == count
        assert all(note.startswith("entities[0].image: not square") for note in job.notes)


@pytest.mark.parametrize(
    ("name", "options"), [("a.jpg", {"quality": 95}), ("a.webp", {}), ("a.tif", {"compression": "jpeg"})]
)
def test_a_lossy_label_map_is_refused(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    labels = Image.effect_noise((32, 32), 30).point([level % 3 for level in range(256)])
    labels.save(tmp_path / name, **options)
    assert "compression has changed its pixels" in file_error({"sem": str(tmp_path / name)})
    check_files(parse_request({"prompt": "x", "hed": str(tmp_path / name)}))  # other maps may be
    labels.save(tmp_path / "a.png")
    check_files(parse_request({"prompt": "x", "sem": str(tmp_path / "a.png")}))


def test_a_lossless_webp_is_not_called_lossy(tmp_path: Path) -> None:
    frames = [Image.effect_noise((16, 16), 60).convert("RGBA") for _ in range(2)]
    for name, lossless in (("a.webp", True), ("b.webp", False)):
        frames[0].save(tmp_path / name, lossless=lossless)
        frames[0].save(tmp_path / f"frames-{name}", lossless=lossless, save_all=True, append_images=frames[1:])
        for path in (name, f"frames-{name}"):
            assert ("compression" in file_error({"sem": str(tmp_path / path)})) is not lossless


@pytest.mark.parametrize(
    ("mode", "levels", "is_said"),
    [
        ("L", (0, 12), True),
        ("L", (100, 113), False),
        ("I;16", (500, 3700), True),
        ("I;16", (0, 3300), False),
        ("RGB", (7, 9), True),
    ],
)
def test_a_map_of_hardly_any_range_is_pointed_out(mode: str, levels: tuple[int, int], is_said: bool) -> None:
    values = [(level,) * 3 if mode == "RGB" else level for level in levels]
    notes = check_files(Request(prompt="x", depth=on_sheet((8, 8), values[0], values[1], mode)))
    assert [f"levels are {levels[0]} to {levels[1]}" in note for note in notes] == [True] * is_said


SURPRISES: list[tuple[dict[str, Any], str | None, str]] = [
    ({"guidance": 0}, None, "guidance is 0: the prompt has no effect"),
    ({"guidance": 0, "entities": [CAT], "tau": 1}, "box-text", "guidance is 0: neither the prompt nor entities"),
    ({"guidance": 1, "negative_prompt": "fog"}, None, "guidance is 1, which turns guidance off: the negative prompt"),
    ({"guidance": -2.5}, None, "guidance is -2.5: images are sampled away"),
    ({"tau": 0.5}, None, "no grounding: the schedule has no effect"),
    ({"keypoints": [PERSON, [None] * 17]}, "keypoint", "keypoints[1] has no point"),
    ({"entities": [CAT], "steps": 2}, "box-text", "grounding is never on"),
]


@pytest.mark.parametrize(("data", "mode", "words"), SURPRISES, ids=[words for *_, words in SURPRISES])
def test_what_has_no_effect_is_said_once(
    data: dict[str, Any], mode: str | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    request = parse_request({"prompt": "x", **data})
    assert [words in note for note in for_model(request, mode).notes] == [True]
    with caplog.at_level(logging.WARNING, logger="gligen"):
        jobs = complete_all([request, parse_request({"prompt": "y"}), request], facts(mode))
        complete_all(jobs, facts(mode))  # jobs have been told of
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith("request 0 and 1 more: ")
    assert words in caplog.messages[0]


def test_markup_that_is_read_as_weights_is_not_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    request = parse_request({"prompt": "(a star:1.4)", "prompt_weights": True})
    jobs = complete_all([request], facts(None))
    complete_all([dataclasses.replace(jobs[0])], facts(None))  # a job has been told of
    assert not caplog.records


def test_every_image_that_is_cut_is_said() -> None:
    request = Request(
        prompt="x", init_image=Image.new("RGB", (60, 40)), depth=Image.linear_gradient("L").resize((40, 60))
    )
    notes = for_model(dataclasses.replace(request, size=(512, 512)), "depth").notes
    assert sorted(note.split(" is ")[0] for note in notes) == ["depth", "init_image"]


def test_nothing_is_said_of_plain_requests(caplog: pytest.LogCaptureFixture) -> None:
    requests = [
        parse_request({"prompt": text, "guidance": 1})
        for text in ("a cat (1998)", "a: b", "BREAKING news", "SALT AND PEPPER", "C++ -- a {b}")
    ]
    complete_all(requests, facts(None))
    assert not caplog.records


@pytest.mark.parametrize(
    "text",
    [
        *("(a star:1.4)", "((a star))", "[a star]", "BREAK", "<lora:name:.8>", "embedding:name", "[a:b:0.5]"),
        *("AND", "{red|blue}", "{{star}}", "__colour__", "star++", "star--"),
    ],
)
@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "entities"])
def test_markup_of_web_uis_is_pointed_out_once(text: str, field: str, caplog: pytest.LogCaptureFixture) -> None:
    value: Any = [{"phrase": f"x {text} y", "box": BOX}] if field == "entities" else f"x {text} y"
    request = parse_request({"prompt": "x", "tau": 1, field: value})
    with caplog.at_level(logging.WARNING, logger="gligen"):
        jobs = complete_all([request] * 3, facts("box-text"))
        complete_all(jobs, facts("box-text"))
    assert [f"'{text}' is read as text" in message for message in caplog.messages] == [True]


def read_error(path: Path, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind, match=r".") as info:
        read_requests(path)
    assert "\n" not in str(info.value)
    assert path.name in str(info.value)
    return str(info.value)


def test_json_and_yaml_files_hold_one_request_or_a_list(tmp_path: Path) -> None:
    data = {"prompt": "a – b", "entities": [CAT], "hed": None, "tau": 0.3}
    expected = parse_request(data)
    (tmp_path / "one.json").write_text("\ufeff" + json.dumps(data), encoding="utf-8")
    (tmp_path / "two.json").write_text(json.dumps([data, data]))
    (tmp_path / "one.yaml").write_text(
        "prompt: a – b\ntau: .3\nentities:\n- {phrase: a cat, box: [.1, .2, .6, .9]}\n", encoding="utf-8"
    )
    (tmp_path / "two.yml").write_text("- prompt: x\n- prompt: y\n  hed: maps/h.png\n")
    assert read_requests(tmp_path / "one.json") == [expected]
    assert read_requests(str(tmp_path / "two.json")) == [expected, expected]
    assert read_requests(tmp_path / "one.yaml") == [expected]
    assert read_requests(tmp_path / "two.yml")[1].hed == str(tmp_path / "maps" / "h.png")


def test_unreadable_request_files_are_named_with_the_line(tmp_path: Path) -> None:
    assert "does not exist" in read_error(tmp_path / "none.json", FileNotFoundError)
    path = tmp_path / "r.json"
    for content, words in (
        ('{\n"prompt": "x",\n}', "line 3"),
        ("[]", "the list is empty"),
        ("3", "the request is 3"),
        ('[{"prompt": "x"}, {"prompt": 3}]', "request 1: prompt is 3"),
        ('{"prompt": "x", "guidance": NaN}', "guidance is nan"),
        (f'{{"prompt": "x", "seed": {"9" * 5000}}}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"prompt": "x", "seed": 1, "seed": 2}', "'seed' is given twice"),
        (
            '{"prompt": "x", "entities": [{"phrase": "a", "box": [0, 0, 1, 1], "phrase": "b"}]}',
            "'phrase' is given twice",
        ),
    ):
        path.write_text(content)
        assert words in read_error(path)
    path = tmp_path / "r.yaml"
    for content, words in (
        ("prompt: x\nhed: [a\nseed: 1\n", "line 3"),
        ("prompt: \x07", "not valid YAML"),
        ("prompt: 2001-99-99", "not valid YAML"),
        ("", "the request is None"),
        ("prompt: no", "prompt is False: give text, in quotes"),
        ("prompt: x\n3: 4", "unknown field '3'"),
        ("[" * 3000, "not valid YAML"),
        ("prompt: x\nseed: 1\nprompt: y\n", "line 1: 'prompt' is given twice"),
        ("prompt: x\nentities:\n- phrase: a\n  box: [0, 0, 1, 1]\n  box: [0, 0, .5, 1]\n", "line 3: 'box' is given"),
    ):
        path.write_text(content)
        assert words in read_error(path)
    path.write_bytes(b"\xff\xfe\x00")
    assert "not a JSON or YAML file" in read_error(path)
    assert "Is a directory" in read_error(tmp_path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["r.jsonl", "r.ndjson", "R.JSONL"])
def test_json_lines_hold_a_request_a_line(tmp_path: Path, name: str, end: str) -> None:
    path = tmp_path / name
    given = [{"prompt": "one\u2028line"}, {"prompt": "two", "hed": "h.png"}, {"prompt": "three", "entities": [CAT]}]
    lines = [json.dumps(data, ensure_ascii=False) for data in given]
    path.write_bytes(("\ufeff" + end.join([lines[0], "", *lines[1:], "  ", ""])).encode())
    assert read_requests(path) == [parse_request(data, folder=tmp_path) for data in given]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "x"}\n\n{"prompt" "y"}\n', "line 3, column 11: not valid JSON"),
        ('{"prompt": "x"}\n{"prompt": 3}', "line 2: prompt is 3"),
        ('{"prompt": "x"}\n{"prompt": "a", "seed": 1, "seed": 2}', "line 2: 'seed' is given twice"),
        ('{"prompt": "x"} {"prompt": "y"}', "line 1, column 17: not valid JSON: Extra data"),
        ('[{"prompt": "x"}]', "line 1: the request is [{'prompt': 'x'}]: give an object"),
        ('{\n"prompt": "x"}', "line 1, column 2"),
        ("\n \n", "no line holds a request"),
        ("", "no line holds a request"),
    ],
)
def test_faults_of_json_lines_are_named_with_their_line(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    assert words in read_error(path)


@pytest.mark.parametrize("name", ["r.json", "r.yaml", "r.txt"])
def test_json_lines_of_another_name_are_told_how_to_be_called(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"prompt": "x"}\n{"prompt": "y", "seed": 3}\n')
    assert "call it r.jsonl, or put all in one list" in read_error(tmp_path / name)
    (tmp_path / "r.yaml").write_text("prompt: x\n---\nprompt: y\n")
    assert "line 2: a second document: put them in one list" in read_error(tmp_path / "r.yaml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_request_files_may_have_any_usual_encoding(tmp_path: Path, encoding: str, suffix: str) -> None:
    text = "caf\u00e9 \u00fcber" if encoding == "latin-1" else "caf\u00e9 \u72d0"
    path = tmp_path / f"r.{suffix}"
    path.write_bytes(json.dumps({"prompt": text}, ensure_ascii=False).encode(encoding))
    assert read_requests(path) == [Request(prompt=text)]


def test_numbers_in_yaml_may_have_an_exponent_without_a_point(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("prompt: x\ntau: 1e-1\nguidance: 5e0\nentities:\n- {phrase: '1e3', box: [1E-1, 2e-1, .3, 1]}\n")
    (request,) = read_requests(path)
    assert (request.schedule, request.guidance) == ((0.1, 0.0, 0.9), 5.0)
    assert request.entities == (Entity(phrase="1e3", box=(0.1, 0.2, 0.3, 1.0)),)


def test_whole_numbers_in_yaml_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("[{prompt: x, seed: 010}, {prompt: x, seed: 0x10}, {prompt: x, seed: 0o10}]")
    assert [request.seed for request in read_requests(path)] == [10, 16, 8]
    path.write_text("[1.5, -.5, 1., +2.5e-1, .inf, -7, 0, 1:30, 1_000, 2001-1, 1e]")  # YAML 1.2.2, section 10.3.2
    expected = [1.5, -0.5, 1.0, 0.25, float("inf"), -7, 0, "1:30", "1_000", "2001-1", "1e"]
    assert decode_file(path.read_bytes(), path) == expected
    path.write_text("{prompt: x, seed: 1:30}")
    assert "seed is '1:30': give a whole number" in read_error(path)


@pytest.mark.parametrize(
    ("name", "ours"), [("cfg_scale", "guidance"), ("num_inference_steps", "steps"), ("gligen_boxes", "entities")]
)
def test_a_name_of_another_programs_is_told_by_ours(name: str, ours: str) -> None:
    with pytest.raises(ValueError, match=f"unknown field '{name}': did you mean '{ours}'"):
        parse_request({"prompt": "x", name: 3})


def test_a_request_for_endless_images_is_refused() -> None:
    with pytest.raises(ValueError, match="num_images is 1000000000: give at most 1000000"):
        parse_request({"prompt": "x", "num_images": 10**9})


def test_a_base_without_grounding_keeps_the_fusers_off_whatever_the_schedule() -> None:
    job = complete(parse_request({"prompt": "x", "schedule": [1, 0, 0]}), facts(None))
    assert not any(job.gates)
    assert not any(job.shortened(2, 1).gates)
    assert job.request.schedule is None


COLOURED = Image.merge("RGB", [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("L", (256, 256))])


@pytest.mark.parametrize(
    ("name", "image", "said"),
    [
        ("depth", COLOURED, "in colour"),
        ("hed", on_sheet((60, 40), 0, 255).crop((0, 0, 40, 40)), "mostly white"),
        ("scribble", on_sheet((60, 40), 255, 0).crop((20, 0, 60, 40)), "mostly white"),
        ("normal", Image.linear_gradient("L"), "grey"),
        ("depth", Image.linear_gradient("L"), None),
        ("canny", on_sheet((60, 40), 0, 255).crop((20, 0, 60, 40)), None),
        ("normal", COLOURED, None),
    ],
)
def test_a_map_of_another_kind_is_pointed_out(name: str, image: Image.Image, said: str | None) -> None:
    notes = check_files(parse_request({"prompt": "x", name: image}))
    assert len(notes) == (said is not None)
    assert all(said in note and note.startswith(f"{name}, which is ") for note in notes)


def test_what_of_an_image_is_not_used_is_said(tmp_path: Path) -> None:
    frames = [on_sheet((60, 40), 0, 255), on_sheet((60, 40), 255, 0)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    depth = Image.linear_gradient("L").convert("RGBA")
    depth.putpixel((3, 3), (9, 9, 9, 200))
    for field, image, expected in (
        ("canny", tmp_path / "a.gif", "canny holds 2 pictures: the first is used"),
        ("depth", depth, "depth has transparent parts, which become white"),
        ("init_image", depth, "init_image has transparent parts, which become white"),
    ):
        assert expected in check_files(parse_request({"prompt": "x", field: image}))


def test_a_picture_that_is_transparent_everywhere_is_refused() -> None:
    invisible = Image.new("RGBA", (60, 40), (200, 10, 10, 0))
    with pytest.raises(ValueError, match=r"^inpaint\.image is transparent everywhere"):
        check_files(Request(prompt="x", entities=[CAT], inpaint=Inpaint(image=invisible)))


def test_boxes_outside_of_what_is_repainted_are_said() -> None:
    mask = Image.new("L", (60, 40))
    mask.paste(255, (0, 0, 20, 40))  # of the middle 40 x 40, that a square size keeps, the left quarter
    inpaint = Inpaint(image=Image.new("RGB", (60, 40)), mask=mask)
    boxes = [(0, 0, 0.2, 1), (0.2, 0, 0.5, 1), (0.3, 0, 0.9, 1)]
    entities = [Entity(phrase="x", box=box) for box in boxes]
    job = for_model(Request(prompt="x", entities=entities, inpaint=inpaint, size=(512, 512)), "inpaint-box-text")
    assert [note for note in job.notes if "outside" in note] == [
        "entities[2].box lies outside of what is repainted: it has no effect"
    ]


@pytest.mark.parametrize("name", MODES)
def test_each_mode_has_an_example_that_it_serves(name: str) -> None:
    (request,) = read_requests(ROOT / "examples" / f"{name}.json")
    check_files(request)
    assert name in serving_modes(request)
    assert for_model(request, name).size == (512, 512)
    assert parse_request(to_dict(request)) == request


def test_the_mixed_example_has_twenty_requests_for_box_text() -> None:
    requests = read_requests(ROOT / "examples" / "mixed.json")
    assert len(requests) == len({request.seed for request in requests}) == 20
    assert {len(request.entities) for request in requests} >= {0, 1, 2, 3}
    for request in requests:
        check_files(request)
        for_model(request, "box-text")


def test_the_examples_are_small_and_complete() -> None:
    files = list((ROOT / "examples").rglob("*.*"))
    assert {path.stem for path in files if path.suffix == ".json"} == {*MODES, "mixed"}
    assert sum(path.stat().st_size for path in files) < 300_000


def test_checking_requests_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from gligen.request import read_requests, check_files\n"
        "for r in read_requests('examples/sem.json'): check_files(r)\n"
        "sys.exit(str({'torch', 'numpy'} & set(sys.modules)) if {'torch', 'numpy'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
