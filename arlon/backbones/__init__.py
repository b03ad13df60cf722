"""Video diffusion models as backbones: what makes a film's latents.

Each family is a module that offers a `Backbone` (`arlon.protocols`) and registers how it is recognised and loaded.
`docs/extending.md` shows how to add one.
"""

from arlon.backbones.base import FAMILIES, BackboneFamily, open_backbone, read_backbone_spec
from arlon.backbones.stdit3 import STDiT3Backbone

__all__ = ["FAMILIES", "BackboneFamily", "STDiT3Backbone", "open_backbone", "read_backbone_spec"]
