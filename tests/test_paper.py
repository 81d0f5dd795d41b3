"""The paper's equations: where the README says they are, and written out as the paper has them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gligen.diffusion.guidance import gate_schedule
from gligen.modules.fusers import GatedSelfAttention

ROOT = Path(__file__).parents[1]
INDEX = re.search(
    r"equation by equation.*?\n\n(\|.*?)\n\n", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
)
LINKS = re.findall(r"\[`([\w.]+)`\]\((gligen/[\w/]+\.py)\)", INDEX[1] if INDEX else "")


def test_the_readme_has_an_index_of_the_paper():
    assert len(LINKS) > 20


@pytest.mark.parametrize(("name", "path"), LINKS, ids=[name for name, _ in LINKS])
def test_every_name_of_the_index_is_where_it_points(name, path):
    body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == part]
        assert found, f"{path} has no {name}"
        assert ast.get_docstring(found[0]) or "." in name, f"{name} has no docstring"
        body = found[0].body


def gated_self_attention(layer: GatedSelfAttention, v: Tensor, h: Tensor, beta: float) -> Tensor:
    """v ← v + β·tanh(α)·TS(SelfAttn([v, h])), then its dense half: every token asks, and TS keeps the visual ones."""
    count, heads = v.shape[1], layer.attn.num_heads
    x = layer.norm1(torch.cat([v, layer.linear(h)], dim=1))  # [v, h]
    q, k, w = (
        project(x).unflatten(2, (heads, -1)).transpose(1, 2)
        for project in (layer.attn.to_q, layer.attn.to_k, layer.attn.to_v)
    )
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)  # of all tokens over all tokens
    attended = layer.attn.to_out((weights @ w).transpose(1, 2).flatten(2))
    v = v + beta * torch.tanh(layer.alpha_attn) * attended[:, :count]  # TS
    value, gate = layer.ff.net[0].proj(layer.norm2(v)).chunk(2, dim=-1)
    return v + beta * torch.tanh(layer.alpha_dense) * layer.ff.net[2](value * F.gelu(gate))


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_the_fuser_is_the_papers_formula(beta):
    torch.manual_seed(0)
    layer = GatedSelfAttention(dim=24, token_dim=10, num_heads=3).double()
    with torch.no_grad():
        layer.alpha_attn.fill_(0.7)
        layer.alpha_dense.fill_(-0.3)
    v, h = torch.randn(2, 9, 24, dtype=torch.float64), torch.randn(2, 5, 10, dtype=torch.float64)
    with torch.no_grad():
        found = layer(v, layer.project(h), beta)
        assert torch.allclose(found, gated_self_attention(layer, v, h, beta), atol=1e-12)
        if beta == 0:
            assert torch.equal(found, v)


@pytest.mark.parametrize("steps", [10, 50, 7])
@pytest.mark.parametrize("tau", [0.0, 0.2, 0.3, 1.0])
def test_scheduled_sampling_is_the_papers(steps, tau):
    """β = 1 in the first τ of the steps and 0 after them: the first stage grounds, the second is the base itself."""
    expected = [1.0 if step < int(tau * steps + 1e-6) else 0.0 for step in range(steps)]
    assert gate_schedule((tau, 0.0, 1.0 - tau), steps) == expected
