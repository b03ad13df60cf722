"""Settings that every stage shares: data, optimizer, run. Each stage nests them in a config of its own.

The learning rate follows the progress of a run: the share of `max_steps` that is done, or of `max_minutes` if that is
larger. A run with a time budget therefore ends its decay in time on any machine. But its learning rate depends on the
clock from the first step, so two such runs differ: limit a run that must repeat exactly by steps alone. Warm-up is
counted in steps, so on a slow machine a short budget can end before it does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from arlon.data.buckets import Bucket
from arlon.data.datasets import ShapesTakesConfig
from arlon.data.samples import WindowConfig


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for hidden matrices and kernels, AdamW for all other parameters."""
    lr: float = 1e-4
    """Peak learning rate."""
    muon_lr: float = 1e-3
    """Peak learning rate of the weights that Muon updates; an update is as large as one of AdamW at that rate."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates of the two moments."""
    eps: float = 1e-8
    """AdamW's eps."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices and kernels; vectors are not decayed."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Schedule after the warm-up."""
    min_lr_ratio: float = 0.02
    """Final learning rate of a cosine schedule, as a share of the peak."""
    grad_clip: float = 1.0
    """Gradients are clipped to this norm; 0: no clipping."""

    def __post_init__(self) -> None:
        problems = []
        if not (0 < self.lr < math.inf and 0 < self.muon_lr < math.inf):
            problems.append(f"optim.lr and optim.muon_lr must be positive, got {self.lr} and {self.muon_lr}")
        if not 0 <= self.min_lr_ratio <= 1:
            problems.append(f"optim.min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")
        if self.warmup_steps < 0 or not (self.grad_clip >= 0 and self.weight_decay >= 0):
            problems.append("optim.warmup_steps, optim.grad_clip and optim.weight_decay must not be negative")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Length, randomness and book-keeping of a training run."""

    seed: int = 0
    """Seed of weights, data order and every draw of the training."""
    batch_size: int = 16
    """Samples per step in each process."""
    max_steps: int = 10000
    """Optimizer steps of the whole run."""
    max_minutes: float | None = None
    """Minutes of training of the whole run, without interruptions; the run ends cleanly when they are over."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "32-true"
    """Lightning's name of the precision of forward and backward; `auto` is bf16-mixed if the hardware is fast at it."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several processes share the work: `ddp` repeats the model in each, `fsdp` shards it (needs adamw)."""
    devices: int = 1
    """Processes on each machine, one per device."""
    num_nodes: int = 1
    """Machines."""
    num_threads: int | None = None
    """Threads of PyTorch; None: PyTorch chooses."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints; one is also written at the end, on Ctrl-C and on SIGTERM."""
    checkpoint_steps: int | None = None
    """Steps between checkpoints, in addition to those by time; None: only by time."""
    log_steps: int = 10
    """Steps between logged figures."""
    val_steps: int = 250
    """Steps between validations; 0 does none."""
    val_batches: int = 4
    """Batches of a validation; they are the same every time."""
    sample_steps: int = 500
    """Steps between sample pictures; 0 makes none."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights; the average is exported."""
    init_from: str | None = None
    """Component folder to start from (fine-tuning); its config must be that of the stage, and the export is stored as
    it was. For `dit` also a file with the weights of PixArt-Sigma; see `arlon/models/pixart.py`."""
    previous_part: str | None = None
    """Export of the part before this one, for a stage that is trained in several parts; this part starts from it."""

    def __post_init__(self) -> None:
        problems = []
        if self.batch_size < 1 or self.max_steps < 1 or self.log_steps < 1 or self.val_batches < 1:
            problems.append("train.batch_size, max_steps, log_steps and val_batches must be at least 1")
        if self.max_minutes is not None and not self.max_minutes > 0:
            problems.append(f"train.max_minutes must be positive, got {self.max_minutes}")
        if self.num_threads is not None and self.num_threads < 1:
            problems.append(f"train.num_threads must be at least 1, got {self.num_threads}")
        if self.devices < 1 or self.num_nodes < 1:
            problems.append("train.devices and train.num_nodes must be at least 1")
        elif self.strategy == "auto" and self.devices * self.num_nodes > 1:
            problems.append("several processes need train.strategy=ddp or train.strategy=fsdp")
        if not 0 <= self.ema_decay < 1:
            problems.append(f"train.ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.init_from is not None and self.previous_part is not None:
            problems.append(
                f"train.init_from = {self.init_from!r} would throw away the part before, train.previous_part = "
                f"{self.previous_part!r}: give train.init_from to the first part of the stage only, or set "
                "train.previous_part=null too"
            )
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def start_folder(self) -> str | None:
        """Component that the training starts from: the part before, or what is fine-tuned; None: fresh weights."""
        return self.init_from if self.previous_part is None else self.previous_part


def _validation_takes() -> ShapesTakesConfig:
    return ShapesTakesConfig(num_takes=256, seed=1_000_003)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Source of the takes, and the frozen networks whose outputs are cached."""

    cache_dir: str = "data/cache"
    """Folder of latents, codes and text features; see `arlon/data/latent_cache.py`."""
    shapes: ShapesTakesConfig = field(default_factory=ShapesTakesConfig)
    """Rendered takes of the training, used if there is no manifest."""
    extra_shapes: tuple[ShapesTakesConfig, ...] = ()
    """More rendered takes of the training, of the same size and length as `shapes`; used if there is no manifest."""
    shapes_val: ShapesTakesConfig = field(default_factory=_validation_takes)
    """Rendered takes of the validation; another seed."""
    manifest: str | None = None
    """Manifest of your own clips, which replace all rendered takes; they are brought to the frame size, length
    and frame rate of `shapes`."""
    mix_rendered: bool = False
    """Whether a training on a manifest also uses the rendered takes of `extra_shapes` (and, in the stage `ar`, of
    `extra_takes`)."""
    val_clips: int = 32
    """Clips at the end of the manifest that are used for validation only."""
    buckets: tuple[Bucket, ...] = ()
    """Sizes and lengths at which `dit` trains on the clips of the manifest, instead of the one size of `shapes`."""
    strict_buckets: bool = True
    """Whether a clip must have more frames than its bucket, as in Open-Sora; if false, as many are enough."""
    clip_fps: float | None = None
    """Frame rate to which clips in buckets are resampled; None: each clip keeps its own."""
    keep_latents: bool = True
    """Cache the latents of clips in buckets in `cache_dir` instead of encoding a clip each time it is drawn."""
    vae: str = "runs/vae/export"
    """Component folder of the video VAE."""
    text_encoder: str = "minilm"
    """`minilm`, or the component folder of a text encoder."""
    text_length: int = 48
    """Tokens of a caption, padding included."""
    text_precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the text encoder's weights while captions are encoded; bfloat16 halves the memory of a T5."""
    encode_batch_size: int = 8
    """Takes encoded at a time while the cache is built."""
    encode_precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Precision of the VAE while the cache is built; `auto` is bfloat16 if the hardware is fast at it."""
    shard_size: int = 256
    """Takes per cache shard; an interrupted build loses at most one shard."""

    def __post_init__(self) -> None:
        if self.clip_fps is not None and not 0 < self.clip_fps < math.inf:
            raise ValueError(f"data.clip_fps must be positive, got {self.clip_fps}")
        if self.val_clips < 1:
            raise ValueError(f"data.val_clips must be at least 1, got {self.val_clips}")

    @property
    def uses_extra(self) -> bool:
        """Whether rendered takes besides `shapes` are trained on: a manifest replaces them unless asked otherwise."""
        return self.manifest is None or self.mix_rendered

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of the takes in pixels."""
        return self.shapes.height, self.shapes.width


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Draws and sizes of a flow-matching step; shared by `dit` and `inject`."""

    times: Literal["logit-normal", "uniform"] = "logit-normal"
    """How flow times are drawn before the shift."""
    time_loc: float = 0.0
    """Mean of the normal under the logit-normal."""
    time_scale: float = 1.0
    """Standard deviation of the normal under the logit-normal."""
    shift_scale: float = 1.0
    """Factor of the resolution-aware shift towards noise; see `flow.shift_times`."""
    base_size: int = 64
    """Frame side in pixels at which the spatial part of the shift is 1."""
    windows: WindowConfig = field(default_factory=WindowConfig)
    """Window length and frame masks."""
    sampling_steps: int = 12
    """Solver steps of the sample pictures."""
    guidance_scale: float = 3.0
    """Text guidance of the sample pictures."""
