"""A random model folder, small enough to make a film in a second: 32 x 48 pixels (height x width), 4 channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from arlon.checkpoint import write_model_index
from arlon.models.ar import CodeTransformer, CodeTransformerConfig
from arlon.models.injection import InjectionConfig, SemanticInjection
from arlon.models.stdit import STDiT3, STDiT3Config
from arlon.models.video_vae import SpatialVAEConfig, TemporalVAEConfig, VideoVAE, VideoVAEConfig
from arlon.models.vqvae import LatentVQVAE, LatentVQVAEConfig
from arlon.text.encoders import TextEncoderConfig, save_text_encoder

HEIGHT, WIDTH, FPS = 32, 48, 8.0
CHANNELS, TEXT_DIM, TEXT_LENGTH, CODEBOOK_SIZE = 4, 12, 10, 32
WORDS = ("a", "red", "green", "blue", "circle", "square", "moves", "left", "right", "blurry")


def make_tiny_model(folder: Path) -> Path:
    """Write the model folder and return it."""
    torch.manual_seed(0)
    for name, module in _components().items():
        _randomise(module)
        module.save_pretrained(folder / name)
    _write_text_encoder(folder / "text_encoder")
    defaults = {
        "height": HEIGHT,
        "width": WIDTH,
        "fps": FPS,
        "segment": 15,
        "overlap": 5,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
        "shift_base_size": 64,
    }
    write_model_index(folder, defaults)
    return folder


def _components() -> dict[str, Any]:
    patch = (1, 2, 2)
    return {
        "vae": VideoVAE(
            VideoVAEConfig(
                spatial=SpatialVAEConfig(
                    latent_channels=CHANNELS,
                    layers_per_block=1,
                    block_out_channels=(4, 4, 4, 4),
                    norm_num_groups=2,
                    mid_block_add_attention=False,
                ),
                temporal=TemporalVAEConfig(
                    in_out_channels=CHANNELS,
                    latent_embed_dim=CHANNELS,
                    embed_dim=CHANNELS,
                    filters=4,
                    num_res_blocks=1,
                    channel_multipliers=(1, 1, 1),
                    temporal_downsample=(True, True),
                    num_groups=2,
                ),
            )
        ),
        "vqvae": LatentVQVAE(
            LatentVQVAEConfig(
                latent_channels=CHANNELS,
                ratio=(2, 2, 2),
                hidden_dim=8,
                num_res_blocks=1,
                codebook_size=CODEBOOK_SIZE,
                code_dim=4,
                kmeans_init=False,
            )
        ),
        "ar": CodeTransformer(
            CodeTransformerConfig(
                codebook_size=CODEBOOK_SIZE,
                text_dim=TEXT_DIM,
                max_text=TEXT_LENGTH,
                dim=16,
                depth=2,
                num_heads=2,
                grid=(2, 3),
                max_code_frames=6,
            )
        ),
        "dit": STDiT3(
            STDiT3Config(
                input_sq_size=64,
                in_channels=CHANNELS,
                patch_size=patch,
                hidden_size=16,
                depth=2,
                num_heads=2,
                caption_channels=TEXT_DIM,
                model_max_length=TEXT_LENGTH,
            )
        ),
        "injection": SemanticInjection(InjectionConfig(in_channels=CHANNELS, patch_size=patch, dim=16, num_blocks=1)),
    }


def _randomise(module: nn.Module) -> None:
    """Give weights that start at zero a value, so that every input has an effect."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


def _write_text_encoder(folder: Path) -> None:
    """A random T5 whose tokenizer splits at spaces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = ["<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    network = T5Config(vocab_size=len(words), d_model=TEXT_DIM, d_kv=4, d_ff=16, num_layers=1, num_heads=3)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "t5")
    T5EncoderModel(network).save_pretrained(folder / "t5")
    config = TextEncoderConfig(kind="t5", source="t5", max_length=TEXT_LENGTH, dim=TEXT_DIM)
    save_text_encoder(folder, config)
