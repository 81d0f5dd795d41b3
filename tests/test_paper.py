"""The paper's equations: where the README says they are, and written out as the paper has them."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gligen.config import GroundingConfig
from gligen.diffusion.guidance import gate_schedule
from gligen.modules.fusers import GatedSelfAttention
from gligen.modules.position_net import BoxTextNet

ROOT = Path(__file__).parents[1]
INDEX = re.search(
    r"equation by equation.*?\n\n(\|.*?)\n\n", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
)
ROWS = [line.strip("| ").split(" | ") for line in (INDEX[1] if INDEX else "").splitlines()[2:]]
LINKS = [
    (source, name, path)
    for source, _, code in ROWS
    for name, path in re.findall(r"\[`([\w.]+)`\]\((gligen/[\w/]+\.py)\)", code)
]


def test_the_readme_has_an_index_of_the_paper():
    assert len(LINKS) > 30


@pytest.mark.parametrize(("source", "name", "path"), LINKS, ids=[name for _, name, _ in LINKS])
def test_every_name_of_the_index_is_where_it_points_and_names_its_equation(source, name, path):
    """In its own docstring, or its class's or file's."""
    node: ast.AST = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    docs = [ast.get_docstring(node) or ""]
    for part in name.split("."):
        found = [each for each in node.body if isinstance(each, (ast.FunctionDef, ast.ClassDef)) and each.name == part]
        assert found, f"{path} has no {name}"
        node = found[0]
        docs.append(ast.get_docstring(node) or "")
    assert docs[-1] or "." in name, f"{name} has no docstring"
    assert source in " ".join(" ".join(docs).split()), f"{name} does not say that it is {source}"


@pytest.mark.parametrize("is_present", [1.0, 0.0])
def test_a_grounding_token_is_the_papers_formula(is_present):
    """h = MLP([f_text(e), Fourier(l)]), number by number; where there is no entity both are learned features."""
    torch.manual_seed(0)
    config = GroundingConfig(mode="box-text", token_dim=5, feature_dim=3, hidden_dim=7, max_entities=1)
    net = BoxTextNet(config).double()
    with torch.no_grad():
        net.null_positive_feature.normal_()
        net.null_position_feature.normal_()
    box, text = [0.1, 0.25, 0.6, 0.9], torch.randn(3, dtype=torch.float64)
    fourier = []
    for k in range(config.num_freqs):
        for wave in (math.sin, math.cos):
            fourier += [wave(100 ** (k / config.num_freqs) * side) for side in box]
    x = torch.cat([text, torch.tensor(fourier, dtype=torch.float64)])
    if not is_present:
        x = torch.cat([net.null_positive_feature, net.null_position_feature])
    for layer in (net.linears[0], net.linears[2]):
        x = layer.weight @ x + layer.bias
        x = x / (1 + torch.exp(-x))  # SiLU
    expected = net.linears[4].weight @ x + net.linears[4].bias
    token = net(torch.tensor([[box]]).double(), torch.tensor([[is_present]]).double(), text[None, None])
    assert torch.allclose(token[0, 0], expected, atol=1e-5)  # frequencies are float32's: 1e-7 of up to 56


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
