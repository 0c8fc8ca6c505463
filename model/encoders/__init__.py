"""Image and text encoders, their pretrained weights, and low-rank adapters."""

from importlib import import_module

from priorclip.common.late_imports import late_imports

# The modules of this package import these too, and would import torch's compiler with them.
with late_imports():
    import_module("timm")
    import_module("transformers.models.clip.modeling_clip")
