"""FID against SciPy's matrix root, CLIP's score against its formula, detectors and Inception with weights of a file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gligen.evaluation.asked import AskedRequests
from gligen.evaluation.features import (
    Clip,
    clip_scores,
    features_of,
    folder_images,
    frechet_from,
    inception,
    read_state_dict,
    read_statistics,
)
from gligen.evaluation.generate import claim_folder, image_file
from gligen.evaluation.metrics import frechet_of_statistics, statistics
from gligen.evaluation.pictures import Tools, measure
from gligen.evaluation.torchvision_detector import build_detector, class_names, detect_images
from gligen.images import fit
from gligen.request import Entity, Request
from gligen.weights.names_clip import image_to_hf, text_to_hf
from tests.generated import generated_model

CPU = torch.device("cpu")
DETECTOR = "ssdlite320_mobilenet_v3_large"  # torchvision's smallest


def correlated(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


@pytest.mark.parametrize(("count", "width"), [(50, 8), (400, 64), (20, 32)])
def test_the_frechet_distance_is_that_of_scipys_matrix_root(count: int, width: int):
    """Also with fewer images than features, where covariances are singular."""
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(count)
    a, b = (correlated(rng, count, width) for _ in range(2))
    (mean_a, cov_a), (mean_b, cov_b) = statistics(a), statistics(b)
    offset = 1e-10 * np.eye(width)  # SciPy's root needs full rank
    root = linalg.sqrtm((cov_a + offset) @ (cov_b + offset)).real
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_from(a, (mean_b, cov_b)) == pytest.approx(expected, rel=1e-4)
    assert frechet_of_statistics(mean_a, cov_a, mean_a, cov_a) == pytest.approx(0, abs=1e-6 * np.trace(cov_a))


def test_reference_statistics_are_read_as_fid_tools_write_them(tmp_path):
    features = correlated(np.random.default_rng(0), 30, 5)
    mean, cov = statistics(features)
    np.savez(tmp_path / "s.npz", mu=mean, sigma=cov)
    np.save(tmp_path / "f.npy", features.astype(np.float32))
    for name in ("s.npz", "f.npy"):
        found = read_statistics(tmp_path / name, "--reference")
        assert np.abs(found[0] - mean).max() < 1e-6
        assert np.abs(found[1] - cov).max() < 1e-5
    np.savez(tmp_path / "bad.npz", mean=mean)
    np.save(tmp_path / "bad.npy", mean)
    (tmp_path / "bad.txt").write_text("1")
    for name in ("bad.npz", "bad.npy", "bad.txt"):
        with pytest.raises(ValueError, match=r"--reference .* give an \.npz with mu"):
            read_statistics(tmp_path / name, "--reference")
    with pytest.raises(ValueError, match="width 5, the images 4"):
        frechet_from(features[:, :4], (mean, cov))


def test_features_are_taken_in_batches_of_one_size():
    sizes = [(4, 4), (4, 4), (4, 4), (6, 4), (4, 4)]
    images = [np.full((*size, 3), i, np.uint8) for i, size in enumerate(sizes)]
    batches = []

    def embed(batch):
        batches.append(len(batch))
        return np.array([[image.mean()] for image in batch])

    assert features_of(images, embed, 2)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert batches == [2, 1, 1, 1]
    with pytest.raises(ValueError, match="no images"):
        features_of([], embed, 2)


def test_images_of_a_folder_come_by_name_and_cropped(tmp_path):
    (tmp_path / "b").mkdir()
    wide = np.random.default_rng(0).integers(0, 255, (20, 40, 3), np.uint8)
    Image.fromarray(wide).save(tmp_path / "b" / "1.png")
    Image.new("L", (10, 10), 9).save(tmp_path / "a.PNG")
    found = list(folder_images(tmp_path, (10, 10)))
    assert [image.shape for image in found] == [(10, 10, 3)] * 2
    assert (found[0] == 9).all()
    assert np.array_equal(found[1], np.asarray(fit(Image.fromarray(wide), 10, 10)))


@pytest.mark.parametrize("is_own_file", [False, True])
def test_clip_score_is_the_cosine_of_both_towers(tmp_path, is_own_file):
    """Written out: the state at end-of-text, projected; the image's embedding; both of length 1."""
    model, path = generated_model(), None
    if is_own_file:  # towers of another CLIP than the checkpoint's, in a file of their own
        path = tmp_path / "clip.safetensors"
        text = {f"text_model.{name}": t for name, t in text_to_hf(model.parts["text_encoder"]).items()}
        towers = text | image_to_hf(model.parts["image_encoder"])
        save_file({name: -tensor.read() for name, tensor in towers.items()}, path)
    clip = Clip(model, path, CPU)
    sign = -1 if is_own_file else 1
    assert torch.equal(clip.text.ln_final.weight, sign * model.parts["text_encoder"]["ln_final.weight"].read())
    assert torch.equal(clip.image.text_projection, sign * model.parts["image_encoder"]["text_projection"].read())
    images = [np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8) for i in range(3)]
    texts = ["a red star", "a cat on a sofa", ""]
    with torch.inference_mode():
        ids, _ = clip.text.tokenize(texts)
        states = clip.text(ids)
        size = clip.image.config.image_size
        expected = []
        for i, pixels in enumerate(images):
            end = ids[i].tolist().index(ids.max().item())
            text = states[i, end] @ clip.image.text_projection
            square = np.array(fit(Image.fromarray(pixels), size, size))
            image = clip.image.visual(
                clip.image.preprocess(torch.from_numpy(square).permute(2, 0, 1)[None] / 127.5 - 1)
            )[0]
            expected.append(100 * max(0, (text @ image / text.norm() / image.norm()).item()))
    found = clip_scores(clip.embed(images), clip.embed_texts(texts))
    assert found == pytest.approx(expected, abs=1e-3)


def test_fid_of_a_run_with_features_of_another_network(tmp_path):
    """The user's own features, row n of image n, against their own statistics."""
    request = Request(prompt="a cat", entities=(Entity(phrase="a cat", box=(0, 0, 0.5, 0.5)),), size=(64, 64))
    claim_folder(tmp_path, {})
    rng = np.random.default_rng(0)
    for n in range(4):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(image_file(tmp_path, n))
    features, reference = correlated(rng, 4, 3), correlated(rng, 9, 3)
    np.save(tmp_path / "f.npy", features)
    np.save(tmp_path / "r.npy", reference)
    asked = AskedRequests("", [request] * 4, [""] * 4)

    def measured(**tools):
        return measure(tmp_path, asked, generated_model(), Tools(**tools), CPU)

    path = str(tmp_path / "f.npy")
    metrics = measured(features=path, reference=str(tmp_path / "r.npy")).metrics
    assert metrics["FID"] == pytest.approx(frechet_of_statistics(*statistics(features), *statistics(reference)))
    assert "--reference" in measured(features=path).not_measured["FID"]
    np.save(tmp_path / "f.npy", features[:3])
    with pytest.raises(ValueError, match="but there are 4 images"):
        measured(features=path, reference=str(tmp_path / "r.npy"))


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_weights_of_strangers_run_nothing(tmp_path, capsys):
    with open(tmp_path / "evil.pth", "wb") as file:
        pickle.dump({"a": Evil()}, file, protocol=2)
    torch.save({"a": Evil()}, tmp_path / "evil.pt")
    torch.save({"a": 3}, tmp_path / "numbers.pt")
    for name in ("evil.pth", "evil.pt", "numbers.pt"):
        with pytest.raises(ValueError, match="no state dict of tensors"):
            read_state_dict(tmp_path / name, "weights")
    assert "ran" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_state_dict(tmp_path / "none.pt", "weights")


@pytest.fixture(scope="module")
def detector_weights(tmp_path_factory) -> Path:
    """Generated weights, of which the surest guesses are many."""
    from torchvision.models import get_model

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("detector") / "weights.pth"
    torch.save(get_model(DETECTOR, weights=None, weights_backbone=None, num_classes=4).state_dict(), path)
    return path


def test_a_torchvision_detector_finds_what_it_finds_alone(tmp_path, detector_weights):
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\n")
    names = class_names(DETECTOR, tmp_path / "names.txt")
    assert names == ["__background__", "cat", "dog", "bird"]
    network = build_detector(DETECTOR, detector_weights, names, CPU)
    images = [np.random.default_rng(i).integers(0, 255, (40 + i, 64, 3), np.uint8) for i in range(3)]
    found = detect_images(network, names, enumerate(images), CPU, batch_size=2)
    assert len(found) > 3
    for number, image in enumerate(images):
        with torch.inference_mode():
            (alone,) = network([torch.from_numpy(image).permute(2, 0, 1) / 255])
        own = [result for result in found if result["image_id"] == number]
        assert [result["category_name"] for result in own] == [names[label] for label in alone["labels"].tolist()]
        boxes = torch.tensor([result["bbox"] for result in own])
        assert (torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1) - alone["boxes"]).abs().max() < 1e-2
        assert torch.tensor([result["score"] for result in own]).allclose(alone["scores"], atol=1e-4)


def test_a_detector_measures_a_run(tmp_path, detector_weights):
    pytest.importorskip("faster_coco_eval")
    request = Request(prompt="", entities=(Entity(phrase="a cat", box=(0, 0, 0.5, 0.5)),), size=(64, 64))
    claim_folder(tmp_path, {})
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(image_file(tmp_path, 0))
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\n")
    tools = Tools(
        detector=DETECTOR, detector_weights=str(detector_weights), detector_classes=str(tmp_path / "names.txt")
    )
    measured = measure(tmp_path, AskedRequests("", [request], [""]), generated_model(), tools, CPU)
    written = json.loads((tmp_path / "detections.json").read_text())
    assert measured.metrics["detections"] == sum(item["category_name"] == "cat" for item in written)
    assert sum(measured.detections.unknown.values()) == sum(item["category_name"] != "cat" for item in written)


def test_detectors_that_cannot_be_are_refused(tmp_path, detector_weights):
    assert class_names("fasterrcnn_resnet50_fpn")[1] == "person"
    with pytest.raises(ValueError, match="torchvision has fasterrcnn"):
        class_names("yolo")
    with pytest.raises(ValueError, match=r"detector weights .* with 91 labels does not fit"):
        build_detector(DETECTOR, detector_weights, class_names(DETECTOR), CPU)
    (tmp_path / "names.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        class_names(DETECTOR, tmp_path / "names.txt")


def test_inceptions_features_are_those_of_torch_fidelity(tmp_path, monkeypatch):
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    made = library.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:  # the library has no other way to a network without published weights
        patch.setattr(library, "load_state_dict_from_url", lambda *args, **kwargs: None)
        patch.setattr(made, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = made("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    images = [np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8) for i in range(2)]
    found = inception(tmp_path / "inception.pth", CPU)(images)
    own = network(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))[0]
    assert found.shape == (2, 2048)
    assert np.abs(found - own.numpy()).max() < 1e-5
    torch.save({"Conv2d_1a_3x3.conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"Inception weights .* do not fit"):
        inception(tmp_path / "other.pth", CPU)
