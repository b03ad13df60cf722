"""Optimizers of the stages: AdamW, or Muon for hidden matrices and kernels beside AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stages.config import OptimConfig
from stages.muon import Muon

SMALLEST_HIDDEN = 16
"""Rows and columns from which a weight counts as a hidden matrix."""
ADAMW_LAYERS = ("conv_in", "embed", "head", "final_layer", "t_block", "modulation", "projection", "text_proj")
"""Layers whose name holds one of these words read or write the network: AdamW takes them."""


class OptimizerPair:
    """Two optimizers over disjoint parameters that step as one."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self._parts = (first, second)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of both; writing to one, such as its `lr`, reaches the optimizer it belongs to."""
        return [group for part in self._parts for group in part.param_groups]

    @property
    def defaults(self) -> dict[str, Any]:
        """Defaults of the first."""
        return self._parts[0].defaults

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """State by parameter, of both."""
        merged: defaultdict[Tensor, Any] = defaultdict(dict)
        for part in self._parts:
            merged.update(part.state)
        return merged

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Compute the gradients once, then update both sets of parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of both."""
        for part in self._parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """State of both, in order."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer | OptimizerPair:
    """Optimizer of the trainable parameters of `model`; each group carries its `peak_lr` for the schedule."""
    hidden = hidden_matrices(model) if config.name == "muon" else []
    taken = {id(parameter) for parameter in hidden}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [{**group, "peak_lr": config.lr} for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
    )
    if not hidden:
        return adamw
    muon = Muon([{"params": hidden, "peak_lr": config.muon_lr}], lr=config.muon_lr, weight_decay=config.weight_decay)
    return OptimizerPair(muon, adamw)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trainable weights of the linear layers and convolutions inside the network, not those at its ends."""
    return [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
        and module.weight.requires_grad
        and min(module.weight.shape[0], module.weight[0].numel()) >= SMALLEST_HIDDEN
        and not any(word in name for word in ADAMW_LAYERS)
    ]
