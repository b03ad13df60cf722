"""Code transformer: writes the codes of a film one by one, from text.

Source: ARLON, arXiv:2410.20502, AR model: decoder-only, text features as a prefix of the sequence, codes in
raster order, frame after frame, `EOS` after the last code.

    slot        text_0 ... text_{L-1}   start    code_0   ...   code_{S-1}
    predicts                            code_0   code_1   ...   EOS, where the film ends

Our choices for what the paper leaves open:
- The last prefix slot is a learned start slot, so that texts of any length end in the same place. Padded text
  is masked and changes nothing.
- A query carries the position of the code that it predicts, a key the position of the code that it holds.
  Rows and columns are learned embeddings; time is a rotary embedding (arXiv:2104.09864) over code frames, so
  that it goes on past the training length. Text stands at time 0, code frame f at f + 1.
- Queries and keys are RMS-normalised (arXiv:2010.04245), the MLP is SwiGLU (arXiv:2002.05202).
- Without text (for guidance) the prefix is one learned null slot and the start slot.

Dimension key
    B batch    L text tokens    E text width    S codes, cT * cH * cW    K codebook size; id K is EOS
    D width    A heads    d head width    n slots    cH, cW code grid
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arlon.attention import AttentionLayer
from arlon.components import Component

NORM_EPS = 1e-6
INIT_STD = 0.02
ROPE_BASE = 1000.0
"""Slowest rotation: about one turn in 6000 code frames."""


@dataclass(frozen=True, kw_only=True)
class CodeTransformerConfig:
    """Shape of a code transformer."""

    codebook_size: int = 1024
    """K of the VQ-VAE whose codes are written."""
    text_dim: int = 384
    """E, width of the text features."""
    max_text: int = 64
    """Longest text in tokens."""
    dim: int = 256
    """D."""
    depth: int = 4
    """Number of blocks."""
    num_heads: int = 4
    """A."""
    grid: tuple[int, int] = (4, 4)
    """(cH, cW), codes of one frame."""
    max_code_frames: int = 16
    """Context window in code frames; longer films slide it."""
    window_hop: int | None = None
    """Code frames by which a full window slides; a quarter of the window if None."""
    dropout: float = 0.0
    """Dropout of embeddings and of every block's two outputs, in training."""
    text_drop_prob: float = 0.1
    """Share of training samples that see no text, which is what guidance needs."""

    def __post_init__(self) -> None:
        sizes = ("codebook_size", "text_dim", "max_text", "dim", "depth", "num_heads")
        problems = [
            f"{name} must be at least 1, got {getattr(self, name)}" for name in sizes if getattr(self, name) < 1
        ]
        if self.num_heads > 0 and self.dim % (4 * self.num_heads):
            problems.append(f"dim ({self.dim}) must be a multiple of 4 x num_heads ({4 * self.num_heads})")
        if len(self.grid) != 2 or min(self.grid) < 1:
            problems.append(f"grid must be two positive sizes (cH, cW), got {tuple(self.grid)}")
        if self.max_code_frames < 2 or not 1 <= self.hop < self.max_code_frames:
            problems.append(
                f"max_code_frames ({self.max_code_frames}) must be at least 2 "
                f"and window_hop ({self.window_hop}) at least 1 and less than that"
            )
        if not (0 <= self.dropout < 1 and 0 <= self.text_drop_prob <= 1):
            problems.append(f"dropout ({self.dropout}) and text_drop_prob ({self.text_drop_prob}) are probabilities")
        if problems:
            raise ValueError("CodeTransformerConfig: " + "; ".join(problems))

    @property
    def codes_per_frame(self) -> int:
        """cH * cW."""
        return self.grid[0] * self.grid[1]

    @property
    def hop(self) -> int:
        """Code frames by which a full window slides."""
        return max(1, self.max_code_frames // 4) if self.window_hop is None else self.window_hop


def code_loss(logits: Tensor, codes: Tensor, is_end: Tensor | None = None, loss_mask: Tensor | None = None) -> Tensor:
    """Mean next-code cross-entropy in nats.

    Args:
        logits: (B, S + 1, K + 1), from `CodeTransformer.forward`.
        codes: Its input codes, (B, S) int64.
        is_end: (B,) bool, True where the film ends after the last code: there EOS is learned. None: nowhere.
        loss_mask: (B, S) bool, True = code to learn; False for codes of an earlier prompt. All if None.

    Returns:
        Scalar, the mean over all targets of the batch; 0 if there are none.
    """
    batch = codes.shape[0]
    if loss_mask is None:
        loss_mask = torch.ones_like(codes, dtype=torch.bool)
    if is_end is None:
        is_end = codes.new_zeros(batch, dtype=torch.bool)
    target = torch.cat((codes, codes.new_full((batch, 1), logits.shape[-1] - 1)), dim=1)
    is_learned = torch.cat((loss_mask, is_end[:, None]), dim=1)
    loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
    return (loss * is_learned.flatten()).sum() / is_learned.sum().clamp(min=1)


@dataclass(eq=False)
class KVCache:
    """Keys and values of all slots so far, preallocated, and the tables that every step reads."""

    keys: Tensor
    """(depth, B, A, n_max, d)."""
    values: Tensor
    """(depth, B, A, n_max, d)."""
    bias: Tensor | None
    """(B, 1, 1, n_max): 0, or minus infinity for padded text; None if there is none."""
    rope: tuple[Tensor, Tensor]
    """cos, sin (n_max, 2, 1, d)."""
    cells: Tensor
    """Position embeddings of the slots of one frame, (cH * cW, D)."""
    num_prefix: int
    """Text slots and the start slot."""
    length: int
    """Slots filled."""


class Attention(AttentionLayer):
    """Multi-head self-attention with normalised, rotated queries and keys."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.qk_scale = nn.Parameter(torch.ones(2, 1, dim // num_heads))
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cached: tuple[Tensor, Tensor, int] | None = None,
    ) -> Tensor:
        """Attend from the slots of x.

        Args:
            x: (B, n, D).
            rope: cos, sin (n, 2, 1, d), for queries and keys.
            mask: Broadcastable to (B, A, n, keys): bool (True = may see) or additive. None: sees all keys.
            cached: Keys and values of this layer (B, A, n_max, d) and how many are filled; x is appended.

        Returns:
            (B, n, D).
        """
        q_k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).split((2, 1), dim=2)  # (B, n, 2 | 1, A, d)
        q_k = _rotate(F.rms_norm(q_k, q_k.shape[-1:], eps=NORM_EPS) * self.qk_scale, rope).to(v.dtype)
        q, k, v = (part.transpose(1, 2) for part in (*q_k.unbind(2), v.squeeze(2)))  # (B, A, n, d)
        if cached is not None:
            keys, values, start = cached
            stop = start + x.shape[1]
            keys[:, :, start:stop] = k
            values[:, :, start:stop] = v
            k, v = keys[:, :, :stop], values[:, :, :stop]
        y = self.kernel(q, k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)), as many parameters as a plain MLP of ratio 4."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = -(-8 * dim // (3 * 32)) * 32
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, n, D)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: CodeTransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.attention = Attention(config.dim, config.num_heads)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.mlp = SwiGLU(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cached: tuple[Tensor, Tensor, int] | None = None,
    ) -> Tensor:
        """Transform (B, n, D); see `Attention`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, mask, cached))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class CodeTransformer(Component):
    """Decoder-only transformer over text and codes; id K is EOS."""

    config_class = CodeTransformerConfig

    def __init__(self, config: CodeTransformerConfig) -> None:
        super().__init__()
        self.config = config
        height, width = config.grid
        self.text_proj = nn.Linear(config.text_dim, config.dim)
        self.text_position = nn.Parameter(torch.empty(config.max_text, config.dim))
        self.null_text = nn.Parameter(torch.empty(config.dim))
        self.start = nn.Parameter(torch.empty(config.dim))
        self.code_embed = nn.Embedding(config.codebook_size, config.dim)
        self.held_row = nn.Parameter(torch.empty(height, 1, config.dim))
        self.held_column = nn.Parameter(torch.empty(1, width, config.dim))
        self.predicted_row = nn.Parameter(torch.empty(height, 1, config.dim))
        self.predicted_column = nn.Parameter(torch.empty(1, width, config.dim))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=NORM_EPS)
        self.head = nn.Linear(config.dim, config.codebook_size + 1, bias=False)
        self._init_weights()

    def _init_weights(self) -> None:
        """Normal 0.02; the last map of every residual branch smaller with depth (GPT-2); scales stay one."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(parameter, std=INIT_STD / (2 * self.config.depth) ** 0.5)
            elif not name.endswith(("norm.weight", "qk_scale")):
                nn.init.normal_(parameter, std=INIT_STD)

    def forward(
        self,
        codes: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        *,
        drop_text: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Predict every next code (teacher forcing).

        Args:
            codes: Codes in t, h, w order from the start of a frame, (B, S) int64 in [0, K). S may be 0.
            text: Text features, (B, L, E), L at most `max_text`.
            text_mask: (B, L) bool, True = real token. All real if None.
            drop_text: (B,) bool, True = this sample sees the null text. If None: drawn with `text_drop_prob`
                in training mode, False for all in eval mode.
            generator: CPU generator for that draw; the global one if None.

        Returns:
            Logits (B, S + 1, K + 1): at i those of code i, given the codes before it; at S of what follows.

        Raises:
            ValueError: If shapes do not fit the configuration or a code is out of range.
        """
        self._check(codes, text, text_mask)
        if drop_text is None and self.training and self.config.text_drop_prob > 0:
            draw = torch.rand(codes.shape[0], generator=generator)
            drop_text = (draw < self.config.text_drop_prob).to(codes.device)
        prefix, is_real = self._embed_prefix(text, text_mask, drop_text)
        x = self.dropout(torch.cat((prefix, self._embed_codes(codes)), dim=1))
        mask = _causal_mask(is_real, x.shape[1])
        rope = self._rope(prefix.shape[1], codes.shape[1], x.device)
        for block in self.blocks:
            x = block(x, rope, mask)
        return self.head(self.norm(x[:, prefix.shape[1] - 1 :]))

    def prefill(
        self,
        codes: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        *,
        max_codes: int,
        drop_text: Tensor | None = None,
    ) -> tuple[Tensor, KVCache]:
        """Read text and existing codes into a new cache with room for `max_codes` codes.

        Args:
            codes: (B, S) int64, S may be 0.
            text: (B, L, E).
            text_mask: (B, L) bool; all real if None.
            max_codes: Codes that the cache can hold, those given included.
            drop_text: (B,) bool, True = null text. None: no sample is dropped.

        Returns:
            Logits of the next code, (B, K + 1), and the cache for `step`.

        Raises:
            ValueError: As `forward`, or if `max_codes` is less than S.
        """
        self._check(codes, text, text_mask)
        if codes.shape[1] > max_codes:
            raise ValueError(f"a cache of max_codes={max_codes} cannot hold the {codes.shape[1]} codes given")
        prefix, is_real = self._embed_prefix(text, text_mask, drop_text)
        x = torch.cat((prefix, self._embed_codes(codes)), dim=1)
        cache = self._new_cache(is_real, prefix.shape[1], max_codes, x)
        mask = _causal_mask(is_real, x.shape[1])
        return self._run_cached(x, mask, cache), cache

    def step(self, codes: Tensor, cache: KVCache) -> Tensor:
        """Append one code a sample, (B,) int64, and give the logits of the next, (B, K + 1).

        Raises:
            ValueError: If the cache is full.
        """
        if cache.length >= cache.keys.shape[3]:
            raise ValueError(f"the cache is full ({cache.length} slots); prefill a new one with a later window")
        cell = (cache.length - cache.num_prefix) % self.config.codes_per_frame
        x = (F.embedding(codes, self.code_embed.weight) + cache.cells[cell])[:, None]
        bias = None if cache.bias is None else cache.bias[..., : cache.length + 1]
        return self._run_cached(x, bias, cache)

    def store_column_major(self) -> CodeTransformer:
        """Store weight matrices column-major so that decoding one code on a CPU (`step`) reads memory sequentially.

        Values, names and shapes stay. In place; returns the model.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.t().contiguous().t()
        return self

    def _run_cached(self, x: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """Append the slots x (B, n, D) to the cache; logits after the last of them, (B, K + 1)."""
        start, stop = cache.length, cache.length + x.shape[1]
        rope = (cache.rope[0][start:stop], cache.rope[1][start:stop])
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, (cache.keys[layer], cache.values[layer], start))
        cache.length = stop
        return self.head(self.norm(x[:, -1]))

    def _new_cache(self, is_real: Tensor, num_prefix: int, max_codes: int, like: Tensor) -> KVCache:
        """An empty cache for `num_prefix` prefix slots, of which `is_real` (B, L + 1) tells the real ones."""
        num_slots = num_prefix + max_codes
        config = self.config
        shape = (config.depth, like.shape[0], config.num_heads, num_slots, config.dim // config.num_heads)
        bias = None
        if is_real.is_meta or not is_real.all():
            bias = like.new_zeros(like.shape[0], 1, 1, num_slots)
            bias[..., :num_prefix].masked_fill_(~is_real[:, None, None], float("-inf"))
        return KVCache(
            keys=like.new_zeros(shape),
            values=like.new_zeros(shape),
            bias=bias,
            rope=self._rope(num_prefix, max_codes, like.device),
            cells=self._cell_positions(),
            num_prefix=num_prefix,
            length=0,
        )

    def _embed_prefix(self, text: Tensor, text_mask: Tensor | None, drop_text: Tensor | None) -> tuple[Tensor, Tensor]:
        """Prefix slots (B, L + 1, D), the start slot last, and which of them are real, (B, L + 1) bool."""
        batch, length = text.shape[:2]
        x = self.text_proj(text.to(self.text_proj.weight.dtype))
        is_real = text.new_ones(batch, length, dtype=torch.bool) if text_mask is None else text_mask
        if drop_text is not None:
            is_first = torch.arange(length, device=text.device) == 0
            x = torch.where(drop_text[:, None, None], self.null_text.to(x.dtype), x)
            is_real = torch.where(drop_text[:, None], is_first, is_real)
        x = x + self.text_position[:length]
        start = self.start + self._predicted_positions()[0]
        x = torch.cat((x, start.to(x.dtype).expand(batch, 1, -1)), dim=1)
        return x, F.pad(is_real, (0, 1), value=True)

    def _embed_codes(self, codes: Tensor) -> Tensor:
        """Code slots (B, S, D) of codes (B, S) that begin at the start of a frame."""
        cell = torch.arange(codes.shape[1], device=codes.device) % self.config.codes_per_frame
        return self.code_embed(codes) + self._cell_positions()[cell]

    def _cell_positions(self) -> Tensor:
        """Embedding of every cell: where its code is and where the next one goes, (cH * cW, D)."""
        held = (self.held_row + self.held_column).flatten(0, 1)
        return held + self._predicted_positions().roll(-1, dims=0)

    def _predicted_positions(self) -> Tensor:
        """Embedding of every cell as a place to predict, (cH * cW, D)."""
        return (self.predicted_row + self.predicted_column).flatten(0, 1)

    def _rope(self, num_prefix: int, num_codes: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos, sin (n, 2, 1, d) of all slots: queries at the time they predict, keys at the time they hold.

        Half of the channel pairs do not turn: they are free to carry content.
        """
        count = self.config.dim // self.config.num_heads // 4
        speed = ROPE_BASE ** (-torch.arange(count, device=device, dtype=torch.float32) / count)
        slots = torch.arange(-1, num_codes + 1, device=device)  # the start slot, the codes, one code more
        time = 1 + slots.div(self.config.codes_per_frame, rounding_mode="floor")
        times = F.pad(torch.stack((time[1:], time[:-1])), (num_prefix - 1, 0))  # (2, n), text at 0
        angle = F.pad(times.float().T[:, :, None, None] * speed, (0, count))
        return angle.cos().repeat(1, 1, 1, 2), torch.cat((-angle.sin(), angle.sin()), dim=-1)

    def _check(self, codes: Tensor, text: Tensor, text_mask: Tensor | None) -> None:
        """Refuse inputs that do not fit the configuration."""
        config = self.config
        if codes.ndim != 2 or codes.dtype != torch.int64:
            raise ValueError(f"expected codes (B, S) int64, got {tuple(codes.shape)} {codes.dtype}")
        if text.ndim != 3 or text.shape[0] != codes.shape[0] or text.shape[2] != config.text_dim:
            raise ValueError(
                f"expected text features (B, L, E) = ({codes.shape[0]}, L, {config.text_dim}), got {tuple(text.shape)}"
            )
        if not 1 <= text.shape[1] <= config.max_text:
            raise ValueError(f"text has {text.shape[1]} tokens, expected 1 to max_text={config.max_text}; shorten it")
        if text_mask is not None and (text_mask.shape != text.shape[:2] or text_mask.dtype != torch.bool):
            raise ValueError(
                f"expected text_mask (B, L) = {tuple(text.shape[:2])} bool, "
                f"got {tuple(text_mask.shape)} {text_mask.dtype}"
            )
        check_range(codes, config.codebook_size)


def check_range(codes: Tensor, codebook_size: int) -> None:
    """Refuse codes outside [0, codebook_size); values are not read on the meta device."""
    if codes.numel() == 0 or codes.is_meta:
        return
    low, high = codes.aminmax()
    if low < 0 or high >= codebook_size:
        raise ValueError(f"codes must lie in [0, {codebook_size}), got {int(low)}..{int(high)}")


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel pairs (i, i + d/2) of x (..., d) by the angles whose cos and signed sin are given."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def _causal_mask(is_real: Tensor, num_slots: int) -> Tensor:
    """(B, 1, n, n) bool: who sees whom. A slot sees itself and real slots before it.

    Padded slots see themselves, so that no row of the softmax is empty.
    """
    visible = F.pad(is_real, (0, num_slots - is_real.shape[1]), value=True)[:, None, None]
    causal = torch.ones(num_slots, num_slots, dtype=torch.bool, device=is_real.device).tril()
    return (causal & visible) | torch.eye(num_slots, dtype=torch.bool, device=is_real.device)
