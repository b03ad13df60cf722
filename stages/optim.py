"""Optimizer and learning rate of the stages: AdamW, or Muon for hidden matrices and kernels and AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stages.config import OptimConfig
from stages.muon import MuonWithAdamW

SMALLEST_HIDDEN = 16
"""Rows and columns from which a weight counts as a hidden matrix."""


def make_optimizer(model: nn.Module, config: OptimConfig, adamw_layers: Sequence[str] = ()) -> torch.optim.Optimizer:
    """Optimizer of the trainable parameters of `model`, each group with its peak learning rate.

    Args:
        model: What is trained.
        config: Settings; `name` says whether Muon takes the hidden matrices.
        adamw_layers: Modules that read or write the network; see `hidden_matrices`.

    Raises:
        ValueError: If a name in `adamw_layers` is no module of the model.
    """
    hidden = hidden_matrices(model, adamw_layers) if config.name == "muon" else []
    taken = {id(parameter) for parameter in hidden}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    matrices, vectors = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if parameters
    ]
    if not hidden:
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    muon = {"params": hidden, "lr": config.muon_lr, "weight_decay": config.weight_decay}
    return MuonWithAdamW(
        [muon, *({**group, "use_muon": False} for group in groups)], lr=config.lr, betas=config.betas, eps=config.eps
    )


def hidden_matrices(model: nn.Module, adamw_layers: Sequence[str] = ()) -> list[Tensor]:
    """Trainable weights of the linear layers and convolutions inside a network, which Muon takes.

    Muon is for maps from features to features. Layers that read an input, embed a condition or write the output are
    left to AdamW, and so are weights of fewer than `SMALLEST_HIDDEN` rows or columns.

    Args:
        model: The network.
        adamw_layers: Dotted names of the modules at its ends; everything inside them counts.

    Raises:
        ValueError: If a name is no module of the model: its weights would go to Muon without a word.
    """
    modules = dict(model.named_modules())
    if unknown := [name for name in adamw_layers if name not in modules]:
        raise ValueError(f"adamw_layers: {type(model).__name__} has no module {', '.join(map(repr, unknown))}")
    return [
        module.weight
        for name, module in modules.items()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
        and module.weight.requires_grad
        and min(module.weight.shape[0], module.weight[0].numel()) >= SMALLEST_HIDDEN
        and not any(name == layer or name.startswith(f"{layer}.") for layer in adamw_layers)
    ]


def lr_factor(config: OptimConfig, *, step: int, progress: float) -> float:
    """Learning rate of a step over its peak: linear warm-up, then constant or half a cosine.

    Args:
        config: Settings of the schedule.
        step: The step, counted from 0.
        progress: Share of the run that is done, in [0, 1].
    """
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if config.schedule == "constant":
        return warmup
    low = config.min_lr_ratio
    return warmup * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
