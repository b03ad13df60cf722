"""Several processes in one training: strategies, sharding, and decisions that all of them must share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from stages.config import OptimConfig, RunConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def make_strategy(run: RunConfig, optim: OptimConfig) -> str | Strategy:
    """Lightning's strategy of a run.

    `fsdp` is FSDP2, whose parameters keep their names and shapes, so that averages, optimizers and checkpoints do not
    know of it; Lightning's strategy of that name is the older one, which does not run on a CPU.

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
    """Shard the parameters of a model over the processes of `mesh`: each block of a list by itself, then the rest.

    The rest is sharded again after each forward too. By default it stays whole until a backward, and after a
    validation there is none: averaged weights would stay in place of the trained ones.
    """
    for layers in model.children():
        if isinstance(layers, nn.ModuleList):
            for block in layers:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def gathered(model: nn.Module) -> nn.Module:
    """A model with whole parameters, on the CPU if they were sharded; all processes take part."""
    state = model.state_dict()
    if not any(isinstance(tensor, DTensor) for tensor in state.values()):
        return model
    with torch.device("meta"):
        whole = type(model)(model.config)
    whole.stored_form = getattr(model, "stored_form", None)
    whole.load_state_dict({name: whole_tensor(tensor).cpu() for name, tensor in state.items()}, assign=True)
    return whole


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of `like`, and sharded if `like` is."""
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def first_says(trainer: L.Trainer, value: Any) -> Any:
    """What the first process says, for decisions by the clock: clocks differ, and all must act alike."""
    return value if trainer.world_size == 1 else trainer.strategy.broadcast(value)


def any_says(trainer: L.Trainer, decision: bool) -> bool:
    """Whether any process says so, for decisions by a signal, which may reach only one."""
    return decision if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(decision, all=False)
