"""Schedule and average against closed forms."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stages.callbacks import WeightAverage
from stages.config import OptimConfig, RunConfig
from stages.optim import lr_factor


def test_learning_rate_follows_its_closed_form() -> None:
    optim = OptimConfig(warmup_steps=3, min_lr_ratio=0.1)
    assert [lr_factor(optim, step=s, progress=0.0) for s in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    for progress in (0.0, 0.25, 0.5, 1.0):
        expected = 0.1 + 0.9 * math.cos(math.pi * progress / 2) ** 2
        assert lr_factor(optim, step=99, progress=progress) == pytest.approx(expected)
    constant = OptimConfig(warmup_steps=0, schedule="constant")
    assert lr_factor(constant, step=0, progress=0.9) == 1


def test_average_equals_the_sum_it_stands_for() -> None:
    module = SimpleNamespace(model=nn.Linear(2, 1, bias=False))
    weight, average, values = module.model.weight, WeightAverage(0.9), [1.0, -2.0, 5.0, 0.5]
    with torch.no_grad():
        weight.fill_(3.0)
        average.on_train_start(None, module)
        expected = 3.0
        for step, value in enumerate(values, start=1):
            weight.fill_(value)
            average.on_train_batch_end(SimpleNamespace(global_step=step), module, None, None, 0)
            decay = min(0.9, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * value
    with average.applied(module.model):
        torch.testing.assert_close(weight.detach(), torch.full((1, 2), expected))
        assert not module.model.training
    assert weight.tolist() == [[0.5, 0.5]]
    assert module.model.training


def test_settings_out_of_range_are_listed_together() -> None:
    with pytest.raises(ValueError, match=r"batch_size.*\ntrain\.ema_decay"):
        RunConfig(batch_size=0, ema_decay=1.5)
