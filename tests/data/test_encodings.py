"""Encodings stored with a set, and `check`: made by the embedded miniature's own encoders."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gligen.cli import run
from gligen.data import __main__ as commands
from gligen.data.build import build
from gligen.data.encode import Encoders, encode, fingerprint, open_encoders
from gligen.data.encodings import ENCODINGS
from gligen.data.shards import ShardSource
from gligen.images import fit, load_rgb, to_tensor
from gligen.loading import embedded_base
from gligen.weights import read_weights, save_model
from tests.data.test_build import FOUND, Photographs, killed, tree

MODE, SIZE = "box-text-image", (64, 128)


@pytest.fixture(scope="module")
def encoders() -> Encoders:
    with torch.random.fork_rng():
        return open_encoders(None, None, latents=True, features=True, references=True, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "set"
    build(Photographs(14), FOUND, out, mode=MODE, shard_size=0.016)
    return out


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, plain, encoders) -> Path:
    out = tmp_path_factory.mktemp("encoded") / "set"
    shutil.copytree(plain, out)
    assert encode(ShardSource(out, MODE), out, encoders, size=SIZE)
    return out


def test_latents_are_what_the_autoencoder_makes_of_the_cropped_picture(encoded, encoders):
    source = ShardSource(encoded, MODE)
    assert len(source.shards) > 2
    assert source.encodings.facts["latents"]["size"] == list(SIZE)
    for n in (0, 5, 13):
        image = to_tensor(fit(load_rgb(Photographs(14).picture(n)), *SIZE))[None]
        posterior = encoders.vae.posterior(image)
        mean, logvar = source.latents(n)
        # float16 keeps 11 bits
        torch.testing.assert_close(torch.from_numpy(mean), posterior.mean[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.from_numpy(logvar), posterior.logvar[0], rtol=1e-3, atol=1e-3)


def test_phrase_features_are_found_by_their_phrase(encoded, encoders):
    features = ShardSource(encoded, MODE).phrase_features
    assert sorted(features) == sorted(f"thing {i}" for i in range(7) if i in {n % 7 for n in range(14) if n % 4})
    for phrase in features:
        expected = encoders.text.phrase_features(encoders.text.tokenize([phrase])[0])[0]
        torch.testing.assert_close(torch.from_numpy(features[phrase].copy()), expected, rtol=1e-4, atol=1e-4)
    assert "thing" not in features
    with pytest.raises(KeyError):
        features["zebra"]


def test_reference_features_are_of_what_is_in_the_boxes(encoded, encoders):
    source, side = ShardSource(encoded, MODE), encoders.image.config.image_size
    for n in (0, 3, 13):
        example = source.example(n)
        features = source.reference_features(n)
        assert features.shape == (len(example.entities), encoders.image.config.text_width)
        H, W, _ = example.image.shape
        for entity, found in zip(example.entities, features, strict=True):
            x0, y0, x1, y1 = entity.box
            shown = example.image[int(y0 * H) : int(np.ceil(y1 * H)), int(x0 * W) : int(np.ceil(x1 * W))]
            pixels = to_tensor(fit(Image.fromarray(shown), side, side))[None]
            expected = encoders.image.image_features(encoders.image.preprocess(pixels))[0]
            torch.testing.assert_close(torch.from_numpy(found.copy()), expected, rtol=1e-3, atol=1e-3)


def test_a_set_without_encodings_gives_none(plain):
    source = ShardSource(plain, MODE)
    assert (source.latents(0), source.reference_features(0), source.phrase_features) == (None, None, None)
    assert source.encoder_fingerprints == {}


def test_parts_and_killed_runs_end_in_the_same_bytes(tmp_path, plain, encoded, encoders):
    # encoders compute in this process and its forks: one thread, so that a fork does not wait for threads it lacks
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for nth in (1, 2, 5, 9):
            out = tmp_path / f"{nth}"
            shutil.copytree(plain, out)
            assert killed(lambda out=out: encode(ShardSource(out, MODE), out, encoders, size=SIZE), "replace", nth)
            if nth == 5:
                left = ShardSource(out, MODE)
                assert any("unfinished" in note for note in left.findings.notes)
                assert left.latents(0) is None
            assert encode(ShardSource(out, MODE), out, encoders, size=SIZE)
            assert tree(out) == tree(encoded)
        out = tmp_path / "parts"
        shutil.copytree(plain, out)
        done = [encode(ShardSource(out, MODE), out, encoders, size=SIZE, part=(i, 2)) for i in (1, 0)]
        assert done == [False, True]
        assert tree(out) == tree(encoded)
    finally:
        torch.set_num_threads(threads)


def test_building_again_leaves_alone_what_another_process_is_encoding(tmp_path, plain, encoders):
    """A part that starts later finds the shards built, while an earlier one writes encodings."""
    out = tmp_path / "set"
    shutil.copytree(plain, out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert killed(lambda: encode(ShardSource(out, MODE), out, encoders, size=SIZE), "replace", 2)
    torch.set_num_threads(threads)
    before = tree(out)
    assert any(name.endswith(".tmp") for name in before)
    assert build(Photographs(14), FOUND, out, mode=MODE, shard_size=0.016)
    assert tree(out) == before


def test_another_encoder_is_refused_by_name(tmp_path, encoded, encoders):
    source = ShardSource(encoded, MODE)
    marks = encoders.fingerprints()
    assert source.encoder_fingerprints == marks
    source.encodings.require("latents", marks["latents"], "whatever it is called")
    other = open_encoders(None, None, latents=True, features=False, references=False, device="cpu", dtype="float32")
    with torch.no_grad():
        other.vae.decoder.conv_out.bias += 1  # its latents are the same
    assert fingerprint("latents", other.vae) == marks["latents"]
    with torch.no_grad():
        other.vae.encoder.conv_in.bias[0] += 1e-3
    with pytest.raises(ValueError, match="scenes-base") as caught:
        source.encodings.require("latents", fingerprint("latents", other.vae), "my-model.ckpt")
    assert "my-model.ckpt" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="autoencoder of 'scenes-base"):
        encode(source, encoded, other, size=SIZE)
    with pytest.raises(ValueError, match="made otherwise"):
        encode(source, encoded, encoders, size=(64, 64))
    with pytest.raises(ValueError, match="multiples of 64"):
        encode(source, encoded, encoders, size=(64, 60))


def test_a_full_disk_while_encoding_is_told(tmp_path, plain, encoders, monkeypatch):
    out, real, calls = tmp_path / "set", os.fsync, 0
    shutil.copytree(plain, out)

    def full(file: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"no space left.*2 of \d+ files are finished"):
        encode(ShardSource(out, MODE), out, encoders, size=SIZE)


def test_the_build_command_makes_encodings(tmp_path, capsys):
    commands.main(["draw", "--format", "folder", "--count", "3", "--out", str(tmp_path / "drawn")])
    out = tmp_path / "set"
    commands.main(["build", str(tmp_path / "drawn"), "--out", str(out)])
    commands.main(["build", str(tmp_path / "drawn"), "--out", str(out), "--latents", "--features", "--device", "cpu"])
    source = ShardSource(out)
    assert source.latents(2)[0].shape == source.latents(2)[1].shape
    assert set(source.encoder_fingerprints) == {"latents", "phrases"}
    assert "stored: latents by scenes-base.safetensors" in source.findings.notes[0]
    capsys.readouterr()
    assert run(commands.main, ["check", str(out)]) == 0
    assert "3 examples read, 0 faults" in capsys.readouterr().out


# -- check -------------------------------------------------------------------------------------------------------------


def checked(folder: Path, capsys: pytest.CaptureFixture[str], status: int = 1) -> dict:
    capsys.readouterr()
    assert run(commands.main, ["check", str(folder), "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_a_good_set_has_no_faults(encoded, capsys):
    assert checked(encoded, capsys, 0) == {
        "found": ShardSource(encoded, MODE).findings.lines(),
        "read": 14,
        "wrong": {},
        "offenders": {},
    }


def test_a_picture_that_was_damaged_is_named(tmp_path, plain, capsys):
    shutil.copytree(plain, tmp_path / "set")
    path = tmp_path / "set" / "00001.tar"
    content = bytearray(path.read_bytes())
    at = content.index(b"\xff\xd8\xff")
    content[at : at + 600] = bytes(600)
    path.write_bytes(content)
    found = checked(tmp_path / "set", capsys)
    assert found["read"] == 13
    assert found["wrong"] == {"picture: not an image file": 1}
    assert "photo-" in found["offenders"]["picture: not an image file"][0]


def test_a_shard_that_was_cut_off_is_counted_record_by_record(tmp_path, plain, capsys):
    shutil.copytree(plain, tmp_path / "set")
    os.truncate(tmp_path / "set" / "00000.tar", 5000)
    (tmp_path / "set" / "00001.tar").unlink()
    found = checked(tmp_path / "set", capsys)
    shards = ShardSource(plain, MODE).shards
    gone = shards[1].records
    assert found["wrong"]["file that cannot be read"] == gone
    assert found["wrong"]["tar shorter than its index"] + found["read"] + gone == 14
    assert len(found["offenders"]["tar shorter than its index"]) <= 3


def test_damaged_and_unfinished_encodings_are_counted(tmp_path, encoded, capsys):
    shutil.copytree(encoded, tmp_path / "set")
    rows = np.load(tmp_path / "set" / "00000.latents.npy")
    rows[0, 0, 0, 0, 0] = np.nan
    np.save(tmp_path / "set" / "00000.latents.npy", rows)
    np.save(tmp_path / "set" / "00001.latents.npy", rows[:1])
    os.truncate(tmp_path / "set" / "phrases.npy", 200)
    (tmp_path / "set" / "00002.entities.npy").unlink()
    found = checked(tmp_path / "set", capsys)
    assert set(found["wrong"]) == {
        "encodings with numbers that are none",
        "encodings of another number",
        "damaged encodings",
        "unfinished encodings",
    }
    with pytest.raises(ValueError, match="fully copied"):
        list(ShardSource(tmp_path / "set", MODE).phrase_features.values())


def test_another_set_is_checked_too(tmp_path, capsys):
    commands.main(["draw", "--format", "folder", "--count", "3", "--out", str(tmp_path / "drawn")])
    picture = next((tmp_path / "drawn").rglob("*.png"))
    picture.write_bytes(picture.read_bytes()[:100])
    found = checked(tmp_path / "drawn", capsys)
    assert sum(found["wrong"].values()) == 1
    assert found["read"] == 2
    assert (tmp_path / ENCODINGS).exists() is False


def test_encoders_that_a_base_lacks_come_from_files_of_their_own(tmp_path, encoders):
    weights = read_weights(embedded_base())
    save_model(tmp_path / "bare", {"unet": weights.parts["unet"]}, weights.config)
    towers = {n: t.read() for part in ("text_encoder", "image_encoder") for n, t in weights.parts[part].items()}
    torch.save(towers, tmp_path / "clip.pt")
    torch.save({name: t.read() for name, t in weights.parts["vae"].items()}, tmp_path / "vae.pt")
    given = {"latents": True, "features": True, "references": True, "device": "cpu", "dtype": "float32"}
    bare, clip, vae = (str(tmp_path / name) for name in ("bare", "clip.pt", "vae.pt"))
    assert open_encoders(bare, clip, vae, **given).fingerprints() == encoders.fingerprints()
    with pytest.raises(ValueError, match="holds no vae: give a whole checkpoint, or one by --vae"):
        open_encoders(bare, clip, **given)
    with pytest.raises(ValueError, match="holds no text encoder: give a whole checkpoint, or CLIP by --clip"):
        open_encoders(bare, None, vae, **given)
