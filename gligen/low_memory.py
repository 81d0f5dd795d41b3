"""Low memory: networks are offloaded to the host and come to the device one at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from gligen.pipeline import Pipeline


class Offload:
    """Networks of which one at a time is on the device; the others' weights wait in the host's memory."""

    def __init__(self, networks: Iterable[nn.Module], device: torch.device) -> None:
        """networks: as loaded on the CPU. Their waiting weights are pinned where that makes copies faster."""
        self.device = device
        self.homes: dict[nn.Module | None, list[tuple[Tensor, Tensor]]] = {None: []}  # each tensor with its waiting one
        for network in networks:
            self.homes[network] = [
                (tensor, tensor.detach().pin_memory() if device.type == "cuda" else tensor.detach())
                for tensor in (*network.parameters(), *network.buffers())
            ]
        self.on_device: nn.Module | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def bring(self, network: nn.Module) -> None:
        """This network to the device, after the one that was there has left it."""
        if network is self.on_device:
            return
        for tensor, home in self.homes[self.on_device]:
            tensor.data = home  # frozen: what is on the device is a copy
        for tensor, home in self.homes[network]:
            tensor.data = home.to(self.device, non_blocking=True)
        self.on_device = network


def offload(pipe: Pipeline, device: torch.device) -> None:
    """Offloads the networks of a pipeline loaded on the CPU: each is on the device only while it is needed.

    The most that is there at once is the UNet and a step's activations. Costs a copy of the weights a batch.
    """
    networks = [pipe.text_encoder, pipe.unet, pipe.vae, *([pipe.image_encoder] if pipe.image_encoder else [])]
    pipe.offload = Offload(networks, device)
