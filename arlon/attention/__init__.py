"""Attention as a choice per layer: kernels by name, and ways to look at or change what a layer attends with.

Every attention layer of a model is an `AttentionLayer`: it computes queries, keys and values and hands them to its
`kernel`. So a faster kernel, a sparse one, a probe that records attention maps or one that replaces values (as RF-Edit
does) is set from outside, and the model's code stays as it is.

    set_kernel(dit, "written_out", layers="temporal_blocks.*")
    with attention_maps(dit, layers="spatial_blocks.3.cross_attn") as maps:
        dit(...)
    maps["spatial_blocks.3.cross_attn"][0]                        # (rows, heads, queries, keys)
"""

from arlon.attention.kernels import KERNELS, Kernel, automatic, written_out
from arlon.attention.layer import AttentionLayer, attention_layers, attention_maps, set_kernel, wrapped_kernels

__all__ = [
    "KERNELS",
    "AttentionLayer",
    "Kernel",
    "attention_layers",
    "attention_maps",
    "automatic",
    "set_kernel",
    "wrapped_kernels",
    "written_out",
]
