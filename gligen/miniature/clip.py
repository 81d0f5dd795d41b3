"""The small CLIP: captions, phrases and images in one space, from which GLIGEN takes three kinds of features.

The UNet reads the text tower's last states; phrases enter grounding as the state at end-of-text, *before* CLIP's text
projection P; images enter as their embedding carried back by Pᵀ, which inverts P only where P is orthogonal. Here it
is: a fixed random rotation, not trained (the towers around it are, so nothing is lost), so that a phrase and an image
of the same thing point the same way in both spaces.

Loss: CLIP's (Radford et al., 2021), with targets shared among all texts of a batch that mean the same, since 64 phrases
come up again and again.
"""

from __future__ import annotations

import math
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gligen.data.scenes import make_scene, reference_image
from gligen.data.shapes import PAIRS, phrase_of
from gligen.data.streams import Series
from gligen.images import to_pixels
from gligen.miniature.config import IMAGE_SIZE, CLIPStage
from gligen.miniature.data import MakeCLIP, SceneBatches, Tensors, stack, swapped_captions
from gligen.miniature.stage import StageTask
from gligen.modules.clip import CLIPImageEncoder, CLIPTextEncoder, tokenize

MAX_LOGIT_SCALE = 100.0  # CLIP's


class CLIPTask(StageTask):
    """network: text_encoder, image_encoder (with P), and CLIP's temperature, which only training needs."""

    name = "clip"
    config: CLIPStage
    is_recorded = False  # texts are cut to the longest, and not every scene has a caption to tell apart

    def __init__(self, config: CLIPStage, device: torch.device, dtype: torch.dtype) -> None:
        batches = SceneBatches(MakeCLIP(config), config.seed, self.name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            text_encoder = CLIPTextEncoder(config.text_encoder)
            image_encoder = CLIPImageEncoder(config.image_encoder)
            nn.init.orthogonal_(image_encoder.text_projection)
        image_encoder.text_projection.requires_grad_(False)
        towers = {"text_encoder": text_encoder, "image_encoder": image_encoder, "temperature": Temperature()}
        super().__init__(config, nn.ModuleDict(towers), batches, device, dtype)
        self.tokenize = partial(
            tokenize, context_length=config.text_encoder.context_length, vocab_size=config.vocab_size
        )

    def loss(self, batch: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        with self.autocast():
            images = embed_images(self.network, batch["images"])  # (B, E)
            texts = embed_texts(self.network, batch["ids"])  # (B + K, E)
            scale = self.network["temperature"]()
            logits = scale * images.float() @ texts.float().T  # (B, B + K)
            loss = contrastive_loss(logits, batch["labels"])
        return loss, {"loss": loss.detach(), "logit_scale": scale.detach()}

    def fixed(self) -> dict[str, Tensor]:
        """P, which is drawn and stays."""
        return {"image_encoder.text_projection": _towers(self.network)[1].text_projection.detach()}

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out scenes. object_top1: images of one object whose own phrase is the nearest of all 64;
        swap: scenes nearer to their caption than to the same with two colours exchanged (0.5 is chance)."""
        networks, device = self.network, self.device
        drawn = [make_scene(Series.MINIATURE_HELD_OUT, n, size=IMAGE_SIZE) for n in range(self.config.eval_scenes)]
        items = [(scene, n % len(scene.objects)) for n, scene in enumerate(drawn)]
        phrases = [phrase_of(color, shape) for color, shape in PAIRS]
        texts = embed_texts(networks, self.tokenize(phrases)[0].to(device))
        images = embed_images(networks, stack([reference_image(scene, i) for scene, i in items]).to(device))
        nearest = (images @ texts.T).argmax(dim=1).tolist()
        right = [phrases[k] == scene.objects[i].phrase for k, (scene, i) in zip(nearest, items, strict=True)]

        scenes = [(scene, swapped[0]) for scene, _ in items if (swapped := swapped_captions(scene))]
        images = embed_images(networks, stack([scene.image for scene, _ in scenes]).to(device))
        ids = self.tokenize([scene.caption for scene, _ in scenes] + [swapped for _, swapped in scenes])[0]
        true, false = embed_texts(networks, ids.to(device)).chunk(2)
        is_nearer = (images * true).sum(dim=1) > (images * false).sum(dim=1)
        return {"object_top1": sum(right) / len(right), "swap": is_nearer.float().mean().item()}


class Temperature(nn.Module):
    """The factor of the logits, learnt as its logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self) -> Tensor:
        return self.log_scale.exp().clamp(max=MAX_LOGIT_SCALE)


def embed_images(networks: nn.ModuleDict, images: Tensor) -> Tensor:
    """Embeds images (B, 3, H, W) uint8 as (B, E), L2-normalised."""
    _, encoder = _towers(networks)
    return encoder(encoder.preprocess(to_pixels(images)))


def embed_texts(networks: nn.ModuleDict, ids: Tensor) -> Tensor:
    """Embeds texts (B, M) as (B, E), L2-normalised: CLIP's text embedding, phrase features times P."""
    text_encoder, image_encoder = _towers(networks)
    return F.normalize(text_encoder.phrase_features(ids) @ image_encoder.text_projection, dim=-1)


def contrastive_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of both directions' cross-entropy.

    logits: (B, B + K), images against texts, of which the last K belong to none; labels: (B + K,). A row's target is
    even over all texts that have its label.
    """
    B = len(logits)
    same = (labels[:B, None] == labels[None, :]).float()
    to_text = F.cross_entropy(logits, same / same.sum(dim=1, keepdim=True))
    same = same[:, :B].T
    to_image = F.cross_entropy(logits[:, :B].T, same / same.sum(dim=1, keepdim=True))
    return 0.5 * (to_text + to_image)


def _towers(networks: nn.ModuleDict) -> tuple[CLIPTextEncoder, CLIPImageEncoder]:
    """As what they are: a ModuleDict holds plain Modules."""
    return cast(CLIPTextEncoder, networks["text_encoder"]), cast(CLIPImageEncoder, networks["image_encoder"])
