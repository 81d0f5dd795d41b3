"""Queries, keys and values of the same tokens in one matrix product, as a private matter of a running model.

A module changed by `fuse_qkv` saves and loads under the names of the plain one: `to_q`, `to_k`, `to_v`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gligen.modules.attention import Attention


class FusedAttention(Attention):
    """`Attention` with its projections' weights in one: of all three where queries and keys are of one width, of keys
    and values where they are not. What needs only some of them takes its rows of the weight, which costs nothing.
    """

    def __init__(self, plain: Attention) -> None:
        nn.Module.__init__(self)  # Attention's own would make the three layers
        self.num_heads = plain.num_heads
        self.dim = plain.to_q.out_features
        self.names: tuple[str, ...] = ("to_q", "to_k", "to_v")
        if plain.to_q.in_features != plain.to_k.in_features:
            self.to_q = plain.to_q
            self.names = ("to_k", "to_v")
        weights = [getattr(plain, name).weight for name in self.names]
        if any(weight.requires_grad for weight in weights):
            raise ValueError("fused projections are for sampling: these weights are being trained")
        self.weight = nn.Parameter(torch.cat(weights), requires_grad=False)  # (3·C or 2·C, context_dim)
        self.to_out = plain.to_out
        self.register_state_dict_post_hook(_split)
        self.register_load_state_dict_pre_hook(_join)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        k, v = F.linear(context, self.weight[-2 * self.dim :]).chunk(2, dim=-1)  # (B, S, C) each
        return k, v

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if len(self.names) == 2:
            return super().queries_keys_values(x)
        q, k, v = F.linear(x, self.weight).chunk(3, dim=-1)  # (B, L, C) each
        return q, k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = self.to_q(x) if len(self.names) == 2 else F.linear(x, self.weight[: self.dim])  # (B, L, C)
        return self.attend(q, k, v)


def fuse_qkv(model: nn.Module) -> int:
    """Changes every attention of the model in place; returns how many. Raises ValueError if its weights are trained."""
    found = [(m, name) for m in model.modules() for name, part in m.named_children() if type(part) is Attention]
    for module, name in found:
        setattr(module, name, FusedAttention(getattr(module, name)))
    return len(found)


def _split(module: nn.Module, state: dict[str, Any], prefix: str, _: dict[str, Any]) -> None:
    assert isinstance(module, FusedAttention)
    weight = state.pop(f"{prefix}weight")
    for name, part in zip(module.names, weight.split(module.dim), strict=True):
        state[f"{prefix}{name}.weight"] = part


def _join(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(module, FusedAttention)
    names = [f"{prefix}{name}.weight" for name in module.names]
    if all(name in state for name in names):  # else what is missing is reported as usual
        state[f"{prefix}weight"] = torch.cat([state.pop(name) for name in names])
