"""Models of other libraries, small or with few layers, random weights, no downloads."""

from __future__ import annotations

import torch

VOCABULARY = 600
END = VOCABULARY - 1


def open_clip_model(name: str, layers: int | None = None, vocabulary: int = VOCABULARY, **vision):
    """Returns open_clip's model of that name with ``layers`` layers per tower, in eval mode."""
    import open_clip

    torch.manual_seed(0)
    config = open_clip.get_model_config(name)
    config["vision_cfg"] |= vision
    config["text_cfg"]["vocab_size"] = vocabulary
    if layers is not None:
        config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = layers
    config.pop("custom_text", None)
    return shaken(open_clip.model.CLIP(**config)).eval()


def tiny_open_clip(**changes):
    """open_clip's CLIP of 64 to 128 channels, for files and commands."""
    import open_clip

    torch.manual_seed(0)
    vision = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16}
    text = {"context_length": 24, "vocab_size": VOCABULARY, "width": 64, "heads": 1, "layers": 2}
    for part in (vision, text):
        part |= {name: changes[name] for name in part.keys() & changes.keys()}
    return shaken(open_clip.model.CLIP(32, vision, text)).eval()


def shaken(model):
    """The model with biases, norms and statistics unlike their start values, so that a missing tensor is detected."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif "class_embedding" in name or "positional" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.3 * torch.rand(buffer.shape, generator=generator))
    return model


def texts(length: int = 77, count: int = 3):
    """Returns token ids (count, length) with the end token at different places and zeros after it, and their mask."""
    ids = torch.randint(1, END - 1, (count, length), generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(count, length, dtype=torch.long)
    for row in range(count):
        last = length - 1 if row == 0 else 3 + 2 * row
        ids[row, 0], ids[row, last], ids[row, last + 1 :], mask[row, : last + 1] = END - 1, END, 0, 1
    return ids, mask


def images(side: int = 224, count: int = 2):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def normalised(pixels):
    """Pixels as from open_clip's transform: float32, normalised by CLIP's mean and standard deviation."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    mean, std = torch.tensor(OPENAI_DATASET_MEAN), torch.tensor(OPENAI_DATASET_STD)
    return (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
