"""Training in several processes: strategies, sharding, and decisions on which all processes must agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from arlon.components import Component
from stages.config import OptimConfig, RunConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def make_strategy(run: RunConfig, optim: OptimConfig) -> str | Strategy:
    """Choose Lightning's strategy for a run.

    `fsdp` means FSDP2: parameters keep their names and shapes, so averages, optimizers and checkpoints need no special
    case. Lightning's own `fsdp` strategy is the older FSDP, which does not run on a CPU.

    Raises:
        ValueError: If the optimizer cannot work on shards.
    """
    if run.strategy != "fsdp":
        return run.strategy
    if optim.name != "adamw":
        raise ValueError(
            f"train.strategy=fsdp needs optim.name=adamw, got {optim.name}: a step of Muon needs whole matrices"
        )
    return ModelParallelStrategy(
        data_parallel_size=run.devices * run.num_nodes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def shard_model(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the parameters of a model over the processes of `mesh`: each block of a ModuleList, then the rest.

    The rest is resharded after each forward pass too. By default it would stay unsharded until a backward pass, and
    after a validation there is none, so the averaged weights would stay in place of the trained ones.
    """
    for layers in model.children():
        if isinstance(layers, nn.ModuleList):
            for block in layers:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def gathered(model: Component) -> Component:
    """Model with unsharded parameters, on the CPU if it was sharded. Collective: every process must call this."""
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return model
    with torch.device("meta"):
        whole = type(model)(model.config)
    whole.stored_form = getattr(model, "stored_form", None)
    whole.load_state_dict({name: whole_tensor(tensor).cpu() for name, tensor in state.items()}, assign=True)
    return whole


def is_first_process() -> bool:
    """Whether this is the first process of all, before and after the trainer has started the others."""
    return getattr(rank_zero_only, "rank", 0) == 0


def whole_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor from all processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Move an unsharded tensor to the device of `like`, and shard it in the same way if `like` is sharded."""
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def from_first_process(trainer: L.Trainer, value: Any) -> Any:
    """Value of the first process, for decisions by the clock: clocks differ, and all processes must act alike."""
    return value if trainer.world_size == 1 else trainer.strategy.broadcast(value)


def on_any_process(trainer: L.Trainer, decision: bool) -> bool:
    """Whether any process decides so, for signals, which may reach only one process."""
    return decision if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(decision, all=False)
