"""One UNet evaluation on this machine: ours against the same networks with attention written out.

    python benchmarks/unet.py [--size 64 64] [--full] [--repeats 5]

Prints one JSON row per variant: milliseconds per evaluation (the fastest of the repeats) and the process's peak memory.
Both variants run in turn in the same process on the same weights; memory is measured in a process of each one's own.
The written-out variant is what the original computes: einsum attention over a materialised (L, S) matrix, grounding
tokens concatenated in front of every fuser's LayerNorm and their queries computed too, and conditioning redone at
every evaluation.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from gligen.config import GroundingConfig, UNetConfig
from gligen.modules import attention as attention_module
from gligen.modules import fusers
from gligen.modules.fusers import GatedSelfAttention, GateScale, Projected
from gligen.modules.unet import UNetModel

SMALL = UNetConfig(model_channels=96, channel_mult=(1, 2, 4), num_res_blocks=1, grounding=GroundingConfig())
FULL = UNetConfig(grounding=GroundingConfig())


def written_out_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """softmax(q kᵀ / √d) v, with the whole matrix of weights in memory."""
    (B, L, C), S, d = q.shape, k.shape[1], q.shape[2] // num_heads
    q, k, v = (x.view(B, n, num_heads, d) for x, n in ((q, L), (k, S), (v, S)))
    weights = (torch.einsum("blhd,bshd->bhls", q, k) * d**-0.5).softmax(dim=-1)
    return torch.einsum("bhls,bshd->blhd", weights, v).reshape(B, L, C)


def keep_tokens(self: GatedSelfAttention, tokens: Tensor) -> Projected:
    """Nothing made ahead: the tokens themselves."""
    return (self.linear(tokens),)


def attend_over_all(self: GatedSelfAttention, v: Tensor, projected: Projected) -> Tensor:
    """The paper's formula as it stands: every token asks, then TS drops the grounding tokens' answers."""
    x = self.norm1(torch.cat([v, projected[0]], dim=1))
    return self.attn(x, *self.attn.keys_values(x))[:, : v.shape[1]]


def build(config: UNetConfig, height: int, width: int) -> tuple[UNetModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    unet = UNetModel(config).eval().requires_grad_(False)
    for transformer in unet.transformers:
        transformer.block.fuser.alpha_attn.fill_(0.5)
        transformer.block.fuser.alpha_dense.fill_(0.5)
    batch = 2  # a guided image
    inputs = {
        "x": torch.randn(batch, config.in_channels, height, width),
        "timesteps": torch.full((batch,), 500),
        "context": torch.randn(batch, 77, config.context_dim),
    }
    return unet, inputs


def variants(unet: UNetModel, inputs: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    grounding = unet.position_net.null_inputs(len(inputs["x"]))
    cond = unet.condition(inputs["context"], grounding)

    def ours(gate_scale: GateScale = 1.0) -> Tensor:
        return unet.denoise(inputs["x"], inputs["timesteps"], cond, gate_scale)

    def written_out() -> Tensor:
        with (
            mock.patch.object(attention_module, "attention", written_out_attention),
            mock.patch.object(fusers.GatedSelfAttention, "project", keep_tokens),
            mock.patch.object(fusers.GatedSelfAttention, "attend", attend_over_all),
        ):
            return unet(inputs["x"], inputs["timesteps"], inputs["context"], grounding)

    return {"written out": written_out, "ours": ours, "ours, gates shut (β = 0)": lambda: ours(0.0)}


def fastest(run: Callable[[], Tensor], repeats: int) -> float:
    """Milliseconds of the fastest of `repeats` runs after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def own_peak_memory() -> float:
    """Peak resident MiB of this process; Linux's ru_maxrss would count the parent's before exec too."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_memory(name: str, args: argparse.Namespace) -> float:
    """Peak resident memory in MiB of a process that evaluates one variant once."""
    command = [sys.executable, __file__, "--only", name, "--size", *map(str, args.size)] + ["--full"] * args.full
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", nargs=2, type=int, default=(64, 64), metavar=("H", "W"), help="of the latent")
    parser.add_argument("--full", action="store_true", help="Stable Diffusion's size (4.3 GB) instead of a small one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = FULL if args.full else SMALL
    unet, inputs = build(config, *args.size)
    runs = variants(unet, inputs)
    if args.only:
        runs[args.only]()
        print(own_peak_memory())
        return
    reference = runs["written out"]()
    baseline = None
    for name, run in runs.items():
        ms = fastest(run, args.repeats)
        baseline = baseline or ms
        row = {
            "variant": name,
            "ms": round(ms, 1),
            "speedup": round(baseline / ms, 2),
            "peak_mib": round(peak_memory(name, args)),
            "max_difference": float((run() - reference).abs().max() / reference.abs().max())
            if "β" not in name
            else None,
            "latent": list(args.size),
            "batch": len(inputs["x"]),
            "parameters": sum(p.numel() for p in unet.parameters()),
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        print(json.dumps(row, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
