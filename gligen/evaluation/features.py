"""Images as features: Inception's for FID, CLIP's for its score and for a Fréchet distance without Inception.

No weights come with the project and none are downloaded: they are the user's files.
"""

from __future__ import annotations

import importlib.util
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from gligen.evaluation.metrics import Float, frechet_of_statistics, statistics
from gligen.evaluation.run import embed_images
from gligen.images import fit, load_rgb
from gligen.loading import OpenModel
from gligen.modules.clip import CLIPImageEncoder, CLIPTextEncoder
from gligen.weights import load_part, read_weights, without_weights
from gligen.weights.safetensors_file import looks_like_safetensors, read_safetensors

Pixels = NDArray[np.uint8]  # (H, W, 3)
Embed = Callable[[Sequence[Pixels]], Float]  # images of one size -> (B, D)

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_state_dict(path: str | Path, what: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or a PyTorch state dict, of which nothing is run.

    what: begins errors. Raises FileNotFoundError or ValueError, one line.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{what} '{path}': there is no such file")
    if looks_like_safetensors(path):
        return {name: tensor.read() for name, tensor in read_safetensors(path)[0].items()}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's many ways to fail
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{what} '{path}' is no state dict of tensors ({reason})") from None
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # as torchvision's own training script saves it
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{what} '{path}' is no state dict of tensors")
    return state


def load_strictly(network: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Gives a network its weights. Raises ValueError, one line that begins with `what`, where they do not fit."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reasons = " ".join(str(error).split())
        raise ValueError(f"{what} does not fit: {reasons[:200]}") from None


def require_inception() -> None:
    """Raises ValueError, one line, where torch-fidelity is not installed."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ValueError("FID needs torch-fidelity for its Inception network: pip install -e .[evaluation]")


def inception(path: str | Path, device: torch.device) -> Embed:
    """FID's Inception-v3: images of any one size -> (B, 2048), by torch-fidelity, with weights of a file.

    path: torch-fidelity's `weights-inception-2015-12-05-6726825d.pth` or the same tensors as .safetensors.
    Raises ValueError, one line, without the library or for other weights.
    """
    require_inception()
    state = read_state_dict(path, "Inception weights")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.TemporaryDirectory() as folder:  # the library would unpickle the user's file: it gets ours instead
        own = Path(folder) / "weights.pth"
        torch.save(state, own)
        try:
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(own))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"Inception weights '{path}' do not fit: {reason}") from None
    network.to(device)

    def embed(images: Sequence[Pixels]) -> Float:
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
        with torch.inference_mode():
            return np.asarray(network(batch)[0].double().cpu().numpy())

    return embed


def features_of(images: Iterable[Pixels], embed: Embed, batch_size: int) -> Float:
    """Features (N, D) of images, as many at once as are of one size, up to batch_size. Raises ValueError for none."""
    found: list[Float] = []
    batch: list[Pixels] = []
    for image in images:
        if batch and (len(batch) == batch_size or image.shape != batch[0].shape):
            found.append(embed(batch))
            batch = []
        batch.append(image)
    if batch:
        found.append(embed(batch))
    if not found:
        raise ValueError("there are no images to take features of")
    return np.concatenate(found)


def folder_images(folder: str | Path, size: tuple[int, int]) -> Iterator[Pixels]:
    """The images of a folder and the folders in it, by name, each centre-cropped and resized to (width, height)."""
    for path in image_files(folder):
        yield np.asarray(fit(load_rgb(path), *size))


def image_files(folder: str | Path) -> list[Path]:
    """Image files of a folder and the folders in it, by name. Raises ValueError, one line, for none."""
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"'{folder}' holds no images ({', '.join(SUFFIXES)})")
    return files


def read_statistics(path: str | Path, flag: str) -> tuple[Float, Float]:
    """Mean and covariance of a file: .npz with `mu` and `sigma`, as FID tools write it, or .npy with features (N, D).

    flag: begins errors. Raises FileNotFoundError or ValueError, one line.
    """
    wanted = "give an .npz with mu (D,) and sigma (D, D), or an .npy with features (N, D)"
    try:
        data = np.load(path, allow_pickle=False)
        if isinstance(data, np.ndarray):
            if data.ndim != 2 or len(data) < 2 or not np.isfinite(data).all():
                raise ValueError(wanted)
            return statistics(data.astype(np.float64))
        mean, cov = data["mu"].astype(np.float64), data["sigma"].astype(np.float64)
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)) or not np.isfinite(cov).all():
            raise ValueError(wanted)
        return mean, cov
    except FileNotFoundError:
        raise FileNotFoundError(f"{flag} '{path}': there is no such file") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"{flag} '{path}': {wanted}") from None


def frechet_from(features: Float, reference: tuple[Float, Float]) -> float:
    """Fréchet distance of features (N, D) from a mean and covariance. Raises ValueError, one line, where D differs."""
    if features.shape[1] != len(reference[0]):
        raise ValueError(
            f"the reference has features of width {len(reference[0])}, the images {features.shape[1]}: they come of "
            "different networks"
        )
    return frechet_of_statistics(*statistics(features), *reference)


class Clip:
    """CLIP's towers, for images and texts, in float32.

    clip: a file of CLIP; where it holds no text tower, or None, the model's own serves, which Stable Diffusion took
    from CLIP ViT-L/14. `text` is None where neither is this CLIP's.
    Raises ValueError, one line, without an image tower.
    """

    def __init__(self, model: OpenModel, clip: str | Path | None, device: torch.device) -> None:
        parts: dict[str, Any] = dict(model.parts)
        config = model.config
        text_config, image_config = config.text_encoder, config.image_encoder
        if clip is not None:
            weights = read_weights(clip)
            parts |= weights.parts
            image_config = weights.config.image_encoder
            text_config = weights.config.text_encoder if "text_encoder" in weights.parts else text_config
        if image_config is None or "image_encoder" not in parts:
            raise ValueError(f"'{clip or model.name}' holds no CLIP image encoder: give CLIP ViT-L/14 with both towers")
        with without_weights():
            self.image = CLIPImageEncoder(image_config)
            is_clip = text_config.kind == "clip" and text_config.width == image_config.text_width
            self.text = CLIPTextEncoder(text_config) if is_clip else None
        self.device = device
        towers = {"image_encoder": self.image} | ({"text_encoder": self.text} if self.text is not None else {})
        for part, network in towers.items():
            load_part(network, parts[part], device=device, dtype=torch.float32, what=f"{clip or model.name}: {part}")
            network.to(device, torch.float32).eval().requires_grad_(False)

    def embed(self, images: Sequence[Pixels]) -> Float:
        """Image embeddings (B, E), L2-normalised, of centre crops."""
        return embed_images(self.image, [Image.fromarray(image) for image in images], len(images))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Float:
        """Text embeddings (B, E), L2-normalised: the state at end-of-text through the text projection."""
        assert self.text is not None
        ids, _ = self.text.tokenize(list(texts))
        states = self.text.phrase_features(ids.to(self.device)) @ self.image.text_projection
        return np.asarray(nn.functional.normalize(states, dim=-1).double().cpu().numpy())


def clip_scores(images: Float, texts: Float) -> Float:
    """100 · max(cos, 0) of each image's embedding (N, E) and its text's (N, E).

    Source: Hessel et al., "CLIPScore" (2021), with the factor 100 that image generation reports instead of 2.5.
    """
    return 100 * np.clip((images * texts).sum(-1), 0, None)
