"""What a film needs, imported once: the server of `tests.pipelines.processes` forks its processes from here."""

import importlib

import torch

MODULES = (
    *("PIL.ImageFilter", "av.subtitles.stream", "transformers.models.t5.modeling_t5"),
    *("diffusers.models.autoencoders.autoencoder_kl", "transformers.tokenization_utils_fast"),
    *("arlon.checkpoint", "arlon.film.workers", "arlon.models.ar", "arlon.models.injection", "arlon.models.stdit"),
    *("arlon.models.video_vae", "arlon.models.vqvae", "arlon.text.encoders", "pipelines.cli"),
    *("pipelines.executors.local", "pipelines.executors.write", "pipelines.runs.generate", "tests.pipelines.films"),
)
for name in MODULES:
    importlib.import_module(name)
torch.set_num_threads(1)
