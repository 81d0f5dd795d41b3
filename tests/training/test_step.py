"""A step of the optimiser (gligen/training/engine/step.py): its arithmetic, and what recording asks of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from gligen.training.engine.optim import ParameterGroup, build_optimizer, set_learning_rate
from gligen.training.engine.step import MOST, WARM_UP, OptimizerStep, map_tensors
from gligen.training.kept import KeptEncodings, Rounds

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pair:
    x: Tensor
    y: Tensor
    more: Tensor | None = None


class FakeGraphs:
    """Records by keeping the function, which then reads the tensors that it was recorded with: as a graph does."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.warmed, self.recorded = fails, 0, 0

    def warm_up(self, run: Callable[[], Tensor]) -> Tensor:
        self.warmed += 1
        return run()

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self.fails:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        self.recorded += 1
        return run


def model_and_step(recorder: FakeGraphs | None = None, **options: float) -> tuple[nn.Linear, OptimizerStep]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    named = dict(model.named_parameters())
    optimizer = build_optimizer(named, [ParameterGroup(list(named), 1.0, 0.1)], 0.1)

    def loss(batch: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        error = (model(batch.x) - batch.y).square().mean()
        return 3 * error, {"error": error}

    return model, OptimizerStep(loss, model.parameters(), optimizer, recorder=recorder, **options)


def batches(count: int, size: int = 4) -> list[Pair]:
    generator = torch.Generator().manual_seed(1)
    return [
        Pair(torch.randn(size, 3, generator=generator), torch.randn(size, 2, generator=generator)) for _ in range(count)
    ]


def test_a_step_is_adamw_on_the_clipped_mean_gradient() -> None:
    """Against AdamW written out in float64 (Loshchilov & Hutter, 2019, alg. 2)."""
    model, step = model_and_step(clip_norm=0.5)
    weights = {name: p.detach().double().clone().requires_grad_(True) for name, p in model.named_parameters()}
    m, v = ({name: torch.zeros_like(p) for name, p in weights.items()} for _ in range(2))
    data = batches(6)
    for n in range(3):
        set_learning_rate(step.optimizer, 0.1 / (n + 1))
        found = step(data[2 * n], data[2 * n + 1]).read()
        errors = [
            (b.x.double() @ weights["weight"].T + weights["bias"] - b.y).square().mean()
            for b in data[2 * n : 2 * n + 2]
        ]
        error = sum(errors) / 2
        grads = dict(zip(weights, torch.autograd.grad(3 * error, list(weights.values())), strict=True))
        norm = torch.cat([g.flatten() for g in grads.values()]).norm()
        assert found["error"] == pytest.approx(error.item(), rel=1e-5)
        assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        for name, w in weights.items():
            g = grads[name] * min(1.0, 0.5 / norm.item())
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g**2
            ahead = m[name] / (1 - 0.9 ** (n + 1)) / ((v[name] / (1 - 0.999 ** (n + 1))).sqrt() + 1e-8)
            lr = 0.1 / (n + 1)
            weights[name] = (w * (1 - lr * 0.1) - lr * ahead).detach().requires_grad_(True)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), weights[name].detach(), rtol=1e-4, atol=1e-5)


def test_recorded_steps_read_each_batch_anew_and_equal_plain_ones() -> None:
    (plain, one), (other, two) = model_and_step(), model_and_step(FakeGraphs())
    for batch in batches(WARM_UP + 4):
        assert one(batch).read() == two(batch).read()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    assert (two.recorder.warmed, two.recorder.recorded) == (WARM_UP, 1)


def test_each_shape_is_recorded_for_itself_and_not_endlessly_many() -> None:
    _, step = model_and_step(FakeGraphs())
    for size in range(1, MOST + 3):
        for batch in batches(WARM_UP + 2, size):
            step(batch)
    assert step.recorder.recorded == MOST
    plain, one = model_and_step()
    other, two = model_and_step(FakeGraphs())
    mixed = [batch for pair in zip(batches(6, 2), batches(6, 5), strict=True) for batch in pair]
    for batch in mixed:
        assert one(batch).read() == two(batch).read()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


def test_what_cannot_be_recorded_is_told_once_and_runs_on(caplog: pytest.LogCaptureFixture) -> None:
    (plain, one), (other, two) = model_and_step(), model_and_step(FakeGraphs(fails=True))
    for batch in batches(WARM_UP + 4):
        assert one(batch).read() == two(batch).read()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True))
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.endswith("run on without: operation not permitted when stream is capturing")


@pytest.mark.parametrize("is_fused", [True, False])
def test_a_batch_that_is_no_number_changes_nothing(is_fused: bool) -> None:
    model, step = model_and_step(clip_norm=1.0)
    step.optimizer.param_groups[0]["fused"] = is_fused
    good = batches(2)
    step(good[0])
    kept = [t.clone() for t in (*model.parameters(), *(s for p in model.parameters() for s in moments(step, p)))]
    assert math.isnan(step(dataclasses.replace(good[1], y=good[1].y * float("nan"))).read()["error"])
    now = [*model.parameters(), *(s for p in model.parameters() for s in moments(step, p))]
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    step(good[1])
    assert not torch.equal(kept[0], model.weight)


def moments(step: OptimizerStep, parameter: nn.Parameter) -> list[Tensor]:
    return list(step.optimizer.state[parameter].values())


def test_a_loss_computed_with_rounded_copies_moves_the_parameters() -> None:
    """Gradients at the rounded weights, in bfloat16; steps smaller than its rounding are not lost."""
    torch.manual_seed(0)
    model, low = nn.Linear(3, 2), nn.Linear(3, 2).bfloat16()
    named = dict(model.named_parameters())
    optimizer = build_optimizer(named, [ParameterGroup(list(named), 1.0, 0.0)], 1e-5)

    def loss(batch: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        error = (low(batch.x.bfloat16()).float() - batch.y).square().mean()
        return error, {"error": error}

    step = OptimizerStep(loss, model.parameters(), optimizer, copies=low.parameters(), recorder=FakeGraphs())
    (batch,), before = batches(1), model.weight.detach().clone()
    for _ in range(WARM_UP + 2):
        kept = model.weight.detach().clone()
        step(batch)
    assert torch.equal(low.weight, kept.bfloat16())
    rounded = low.weight.detach().double().requires_grad_(True)
    error = (batch.x.double() @ rounded.T + low.bias.detach().double() - batch.y).square().mean()
    (gradient,) = torch.autograd.grad(error, rounded)
    torch.testing.assert_close(model.weight.grad.double(), gradient, rtol=0.05, atol=0.02)
    moved = model.weight.detach() - before
    assert torch.allclose(moved, -1e-5 * (WARM_UP + 2) * gradient.sign().float(), rtol=0.05)


def test_tensors_are_changed_wherever_they_lie() -> None:
    one = torch.ones(2)
    made = map_tensors((Pair(one, one), {"a": (one, None)}), lambda tensor: tensor + 1)
    assert isinstance(made[0], Pair)
    assert [t.tolist() for t in (made[0].x, made[0].y, made[1]["a"][0])] == [[2.0, 2.0]] * 3
    assert (made[0].more, made[1]["a"][1]) == (None, None)


# -- scenes that come again (gligen/training/kept.py) ------------------------------------------------------------------


def test_scenes_come_in_rounds_and_earlier_ones_between_new_ones() -> None:
    plain, mixed = Rounds(size=5), Rounds(size=50, reuse=3)
    assert [plain.example(n) for n in range(12)] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert [plain.is_new(n, 3) for n in range(3, 12)] == [True] * 5 + [False] * 4
    shown = [mixed.example(n) for n in range(250)]
    assert shown[:200:4] == list(range(50))
    assert all(shown[n] <= n // 4 for n in range(200))
    assert shown[200:] == list(range(50))
    assert [mixed.is_new(n, 0) for n in range(250)] == [n % 4 == 0 and n < 200 for n in range(250)]
    late = Rounds(size=1000, reuse=3)
    again = [late.example(n) for n in range(3600, 4000) if n % 4]
    assert 0.4 < sum(n < 475 for n in again) / len(again) < 0.6  # evenly among the 900 to 1000 there are


def test_kept_scenes_are_encoded_once_and_drawn_if_nobody_brought_them() -> None:
    encoded: list[int] = []

    def encode(images: Tensor, ids: Tensor) -> list[Tensor]:
        encoded.extend(images[:, 0].tolist())
        return [10.0 * images, ids.float()]

    def draw(numbers: list[int]) -> tuple[Tensor, Tensor]:
        return torch.tensor([[n] for n in numbers]), torch.tensor([[-n] for n in numbers])

    kept = KeptEncodings(9, CPU, encode, draw)
    scenes = torch.tensor([4, 2, 7, 2])
    images, ids = draw([4, 7])
    for _ in range(2):
        first, second = kept.take(scenes, torch.tensor([0, 2]), images, ids)
        assert first[:, 0].tolist() == [40, 20, 70, 20]
        assert second[:, 0].tolist() == [-4, -2, -7, -2]
    assert kept.take(torch.tensor([7]))[0].item() == 70
    assert sorted(encoded) == [2, 4, 7]
