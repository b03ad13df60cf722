# %% [markdown]
# # Look inside a film
#
# What the models hand to each other, drawn as pictures: the codes that plan a film, the coarse frames they stand for,
# what changes if the codes are taken away, and what the diffusion transformer attends to. Run it as a script
# (`python examples/look_inside.py`, under a minute on one CPU core) or cell by cell. Everything it writes is in
# `outputs/look_inside/`.

# %%
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from arlon import ArlonPipeline, LatentVQVAE, SemanticInjection, STDiT3, VideoVAE
from arlon.attention import attention_maps
from arlon.backbones import STDiT3Backbone
from arlon.checkpoint import ModelFolder, resolve_model
from arlon.diffusion import flow
from arlon.diffusion.samplers import draw_noise
from arlon.protocols import VideoSize
from arlon.text.encoders import MiniLMEncoder
from pipelines.deliver.sheet import SheetRow, frames_to_sheet, write_sheet

OUTPUT = Path("outputs/look_inside")
OUTPUT.mkdir(parents=True, exist_ok=True)
PROMPTS = [f"a large {colour} circle moves left on a black background" for colour in ("red", "green")]
COLUMNS = 12
"""Pictures in a row."""


def row(title: str, frames: np.ndarray) -> SheetRow:
    """Evenly spaced frames (T, H, W, 3) as a row of a sheet."""
    return SheetRow(title=title, frames=frames[np.linspace(0, len(frames) - 1, COLUMNS).astype(int)])


def labelled(picture: np.ndarray, text: str) -> np.ndarray:
    """Picture with two lines of text below."""
    high, wide = picture.shape[:2]
    canvas = Image.new("RGB", (wide, high + 28), "white")
    canvas.paste(Image.fromarray(picture))
    ImageDraw.Draw(canvas).multiline_text((2, high + 1), text, "black")
    return np.asarray(canvas)


def enlarged(picture: np.ndarray, side: int = 64) -> np.ndarray:
    """Picture (h, w, 3) with sharp pixels, `side` pixels wide and high."""
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST))


def heat(values: torch.Tensor) -> np.ndarray:
    """Map (h, w) as a picture from black (its least value) over red to yellow (its largest)."""
    share = ((values - values.min()) / (values.max() - values.min()).clamp_min(1e-9)).numpy()
    channels = (np.clip(2 * share, 0, 1), np.clip(2 * share - 1, 0, 1), np.zeros_like(share))
    return enlarged((np.stack(channels, axis=-1) * 255).astype(np.uint8))


# %% [markdown]
# ## Codes: the plan of a film
#
# The AR model writes a grid of codes for every few latent frames. A code is the index of a vector in the codebook; in
# the picture each index has a colour of its own, drawn at random. Similar colours mean nothing, only equal ones do. A
# plain black background, too, is written with many different codes.

# %%
pipe = ArlonPipeline.from_pretrained("shapes", num_threads=1)
film = pipe(PROMPTS, seconds=5, seed=2, progress=False)
codes = film.codes[0]
folder = ModelFolder.open(resolve_model("shapes"))
vqvae = LatentVQVAE.from_pretrained(folder.component("vqvae"))
colours = np.random.default_rng(0).integers(40, 256, (vqvae.config.codebook_size, 3), dtype=np.uint8)
code_pictures = np.stack([enlarged(colours[grid]) for grid in codes[0].numpy()])
print(f"codes {tuple(codes.shape)}, {codes.unique().numel()} different ones of {vqvae.config.codebook_size}")

# %% [markdown]
# ## Coarse latent against final frames
#
# The VQ-VAE decodes codes to a coarse latent of the size of the real one. Through the video VAE it can be seen: places
# and colours are right, outlines are not. That is what steers the diffusion transformer.
#
# ## Injection off
#
# The same prompts and seed with `use_codes=False`: the diffusion transformer alone, segment after segment.

# %%
latent = film.latents[0]
vae = VideoVAE.from_pretrained(folder.component("vae"))
with torch.inference_mode():
    coarse = vqvae.decode(codes, latent.shape[2])
    video = vae.decode(coarse, len(film.frames), blend_frames=film.settings.vae_blend_frames)[0]
coarse_frames = ((video.permute(1, 2, 3, 0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
without = pipe(PROMPTS, seconds=5, seed=2, use_codes=False, progress=False)
difference = (coarse - latent).square().mean().sqrt() / latent.square().mean().sqrt()
print(f"coarse latent is off by {difference:.2f} of the latent's size (root mean square)")

rows = [
    row("codes, a colour for each index", code_pictures),
    row("codes through the two decoders alone", coarse_frames),
    row("film: the diffusion transformer, steered by the codes", film.frames),
    row("the diffusion transformer without codes, same prompts and seed", without.frames),
]
write_sheet(frames_to_sheet(rows), OUTPUT / "codes.png")

# %% [markdown]
# ## Attention
#
# One pass of the diffusion transformer on a segment with half noise, its cross-attention recorded. Each picture is one
# word of the prompt: the brighter a place, the more it attends to that word, averaged over heads and frames, from the
# least (black) to the most (yellow) for that word. A frame has only 4 x 4 tokens. Most of the attention goes to words
# that say nothing, a known habit of transformers; "circle" and "left" light up where the object is.

# %%
LAYER = "spatial_blocks.2.cross_attn"
backbone = STDiT3Backbone(STDiT3.from_pretrained(folder.component("dit")))
injection = SemanticInjection.from_pretrained(folder.component("injection"))
encoder = MiniLMEncoder()
features = encoder.encode([PROMPTS[0]])
words = encoder.tokenizer.convert_ids_to_tokens(encoder.tokenizer(PROMPTS[0])["input_ids"])

clean = latent[:, :, : pipe.geometry.grid.segment]
t = torch.tensor([0.5])
noisy = flow.add_noise(clean, draw_noise(clean.shape, 0, "look inside"), t)
size = VideoSize(height=film.frames.shape[1], width=film.frames.shape[2], fps=film.fps)
with torch.inference_mode():
    text = backbone.prepare_text(features.tokens, features.mask)
    inject = injection.condition(coarse[:, :, : clean.shape[2]])
    with attention_maps(backbone.dit, layers="spatial_blocks.2.*") as maps:
        backbone.velocity(noisy, t, text, size=size, inject=inject)

weights = maps[LAYER][0].mean(dim=(0, 1))  # (tokens, words), averaged over heads
_, rows_high, columns_wide = (n // p for n, p in zip(clean.shape[2:], backbone.spec.patch_size, strict=True))
per_word = weights.view(-1, rows_high, columns_wide, len(words)).mean(dim=0)  # over frames
word_pictures = np.stack(
    [labelled(heat(per_word[..., i]), f"{word}\n{per_word[..., i].mean():.0%} of it") for i, word in enumerate(words)]
)
write_sheet(
    frames_to_sheet([SheetRow(title=f"cross-attention: {PROMPTS[0]}", frames=word_pictures)]), OUTPUT / "words.png"
)

# %% [markdown]
# Self-attention in space: what the token in the middle of the frame attends to, one picture for each head, in the
# middle of the segment.

# %%
spatial = maps["spatial_blocks.2.attn"][0]  # (frames, heads, tokens, tokens)
centre = (rows_high // 2) * columns_wide + columns_wide // 2
of_heads = spatial[spatial.shape[0] // 2, :, centre]  # (heads, tokens)
heads = np.stack([heat(head.view(rows_high, columns_wide)) for head in of_heads])
write_sheet(frames_to_sheet([SheetRow(title="self-attention, a picture a head", frames=heads)]), OUTPUT / "heads.png")
print(f"look at {OUTPUT}/codes.png, words.png and heads.png")
