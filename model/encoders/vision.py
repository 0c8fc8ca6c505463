"""Image encoders: any timm backbone as a source of visual tokens or of one pooled feature.

    images uint8 (B, 3, H, W) -> [0, 1] -> this encoder's mean and std -> timm -> tokens (B, L, C) and global (B, C)

Layouts of timm: (B, L, C) with prefix tokens before the patches (ViT), NCHW (convolutional nets), NHWC (Swin). Each
encoder normalises on the device by its own mean and standard deviation. So vision and prior encoders with different
pretraining share one batch of uint8 pixels.

    images float32 (B, n, H, W), measured values -> the encoder's bands -> their mean and std -> timm with n channels
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from priorclip.common.hub import using_hub
from priorclip.model.config import EncoderConfig
from priorclip.model.encoders.bands import band_numbers, widen
from priorclip.model.encoders.batch_norm import keep_statistics
from priorclip.model.encoders.feature_cache import FeatureCache
from priorclip.model.encoders.layers import keep_locked, lock
from priorclip.model.encoders.weights import load_exactly, read_image_weights, scene_backbone


class VisualTokens(NamedTuple):
    """Features of images: tokens (B, L, C) in row-major order, global feature (B, C), grid (h, w) with h*w = L."""

    tokens: Tensor
    pooled: Tensor
    grid: tuple[int, int]


class ImageEncoder(nn.Module):
    """A timm model without classifier, with normalisation, freezing and weights by its configuration.

    Args:
        config: the configuration
        pool: true: forward returns the pooled feature (B, C); false: timm's unpooled features
        given: bands of a batch, if it has more than those of the configuration
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig, pool: bool, given: Sequence[str] | None = None):
        super().__init__()
        self.config, self.pool = config, pool
        self.given = None if config.bands is None else list(given or config.bands)
        self.places = None if config.bands is None else band_numbers(config.bands, self.given or (), config.name)
        backbone: Any
        backbone, self.clip_projection = create_backbone(config, pool)
        keep_statistics(backbone)
        self.model = backbone
        self.width: int = config.projection or getattr(backbone, "head_hidden_size", None) or backbone.num_features
        mean, std = normalisation(config)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)
        facts = cache_facts(config, pool, self.given)
        self.feature_cache = FeatureCache(config.remember, self.model, facts) if config.remember else None
        if not config.trainable:
            self.requires_grad_(False)
        elif config.unlocked is not None:
            lock(self.model, config.unlocked, config.name)
        self.train()

    def train(self, mode: bool = True) -> ImageEncoder:
        """Sets training mode, except for the modules that the configuration freezes."""
        super().train(mode and self.config.trainable)
        if self.config.unlocked is not None:
            keep_locked(self.model)
        if self.config.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def normalise(self, images: Tensor) -> Tensor:
        """Normalises (B, 3, H, W), uint8 or float in [0, 1] -> the dtype of the weights; or (B, n, H, W) of bands.

        Raises ValueError if an encoder that does not pool gets another image size, or for other bands.
        """
        weights = next(self.parameters()).dtype
        dtype = torch.promote_types(weights, torch.float32)
        if self.places is None:
            pixels = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
        else:
            pixels = self.choose_bands(images).to(dtype)
        size = (self.config.image_size, self.config.image_size)
        if self.pool and pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
        if pixels.shape[-2:] != size:
            got = "x".join(map(str, pixels.shape[-2:]))
            raise ValueError(f"images are {got} pixels, but image_size of '{self.config.name}' is {size[0]}")
        # Channels last makes convolutions a third faster, on CPUs and on tensor cores; other layers are not slower.
        mean, std = self.mean.to(dtype), self.std.to(dtype)
        if self.places is not None and self.mean.dtype not in (torch.float32, torch.float64):
            # A half-precision buffer has rounded the measured values: take them from the configuration.
            mean, std = (mean.new_tensor(values).view(-1, 1, 1) for values in normalisation(self.config))
        normalised = ((pixels - mean) / std).to(weights)
        return normalised.contiguous(memory_format=torch.channels_last)

    def choose_bands(self, images: Tensor) -> Tensor:
        """Returns this encoder's bands (B, n, H, W) of a batch. Raises ValueError for a batch of other bands."""
        assert self.given is not None
        assert self.places is not None
        if images.dtype == torch.uint8 or images.shape[1] != len(self.given):
            what = f"{images.dtype} with {images.shape[1]} channels"
            raise ValueError(f"'{self.config.name}' reads measured values of {', '.join(self.given)}, not {what}")
        return images if self.places == list(range(len(self.given))) else images[:, self.places]

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, n, H, W) -> pooled feature (B, C) or timm's unpooled features."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.trainable):
            if self.feature_cache is not None:
                return self.feature_cache(lambda new: self.model(self.normalise(new)), images)
            return self.model(self.normalise(images))

    def tokens(self, images: Tensor) -> VisualTokens:
        """Returns unpooled features of any layout as tokens. The global feature is the class token or the mean."""
        features = self(images)
        if features.ndim == 3:
            prefix = getattr(self.model, "num_prefix_tokens", 0)
            tokens = features[:, prefix:]
            has_class = prefix > 0 and getattr(self.model, "cls_token", None) is not None
            pooled = features[:, 0] if has_class else tokens.mean(1)
            return VisualTokens(tokens, pooled, grid_of(tokens.shape[1]))
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            features = features.permute(0, 3, 1, 2)
        tokens = features.flatten(2).transpose(1, 2)
        return VisualTokens(tokens, tokens.mean(1), (features.shape[2], features.shape[3]))


def create_backbone(config: EncoderConfig, pool: bool) -> tuple[nn.Module, Tensor | None]:
    """Returns the timm model with its weights, without classifier, and CLIP's projection if the weights hold one.

    Raises ValueError with timm's reason if the model cannot be built, and NotFetched if the hub does not answer.
    """
    if config.projection is not None and not pool:
        raise ValueError(
            f"projection {config.projection} of '{config.name}': only a prior can have one, vision needs tokens"
        )
    hub = config.weights in ("hub", "timm")
    known = known_config(config.name)
    refuse_other_scene_backbone(config)
    # timm keeps CLIP's projection in the place of the classifier.
    is_clip = "_clip_" in config.name
    classes = known.num_classes if hub and known and is_clip and config.projection is None else 0
    size = {"img_size": config.image_size} if known and known.fixed_input_size else {}
    head = {} if pool else {"global_pool": ""}
    arguments: dict[str, Any] = {**size, **head, **config.kwargs, "num_classes": config.projection or classes}
    try:
        with using_hub(config.name) if hub else nullcontext():
            model: Any = timm.create_model(config.name, pretrained=hub, **arguments, **channels(config, hub))
        if hub and config.bands is not None:
            state = widen(model.state_dict(), model, config)
            model = timm.create_model(config.name, **arguments, **channels(config, False))
            load_exactly(model, state, config.name)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"timm cannot build the encoder '{config.name}' ({config.kwargs}): {error}") from error
    projection = model.get_classifier().weight.detach() if classes else None
    if classes:
        model.reset_classifier(0)
    if config.weights is not None and not hub:
        state, classifier = read_image_weights(config.weights, model)
        if config.bands is not None and not has_bands(config):
            state = widen(state, model, config)
        load_exactly(model, state, config.weights)
        projection = classifier if is_clip else None
    return model, projection


def channels(config: EncoderConfig, coloured: bool) -> dict[str, Any]:
    """Returns timm's argument for the number of channels; none for pictures, which is timm's default."""
    return {} if config.bands is None or coloured else {"in_chans": len(config.bands)}


def has_bands(config: EncoderConfig) -> bool:
    """Tells whether the weights are those of a scene classifier of the same bands.

    Raises ValueError if it reads other bands.
    """
    trained = scene_backbone(config.weights)
    if trained is None or trained.bands is None:
        return False
    if trained.bands != config.bands:
        theirs, ours = ", ".join(trained.bands), ", ".join(config.bands or ())
        raise ValueError(f"the weights of {config.weights} read the bands {theirs}, but this encoder reads {ours}")
    return True


def cache_facts(config: EncoderConfig, pool: bool, given: Sequence[str] | None, *more: str) -> tuple[object, ...]:
    """Returns what the outputs of an encoder depend on, beside its weights and the images."""
    bands = () if config.bands is None else (tuple(config.bands), tuple(given or ()))
    return config.name, config.image_size, *normalisation(config), pool, *bands, *more


def known_config(name: str) -> Any:
    """Returns timm's facts about the model's weights and input. Raises ValueError that names the nearest model."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        nearest = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise ValueError(
            f"timm has no encoder '{architecture}'" + (f": did you mean {', '.join(nearest)}?" if nearest else "")
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ValueError(f"timm's '{architecture}' has no weights '{tag}': it has {', '.join(tags) or 'none'}")
    return timm.get_pretrained_cfg(name)


def refuse_other_scene_backbone(config: EncoderConfig) -> None:
    """Raises ValueError if the weights are those of a scene classifier with another backbone."""
    trained = scene_backbone(config.weights)
    if trained and trained.name.partition(".")[0] != config.name.partition(".")[0]:
        trained_name = f"'{trained.name}'" + (f" with kwargs {trained.kwargs}" if trained.kwargs else "")
        raise ValueError(
            f"the weights of {config.weights} are those of {trained_name}, but this encoder is '{config.name}': "
            f"set prior.name (or vision.name) of the model to that name, or train a prior with this encoder"
        )


def normalisation(config: EncoderConfig) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation of the input by channel: configured, of the exported prior, or timm's.

    Raises ValueError for bands whose mean and deviation nothing says.
    """
    known, trained = known_config(config.name), scene_backbone(config.weights)
    if config.bands is not None:
        same = trained if trained is not None and trained.bands == config.bands else config
        means, deviations = config.mean or same.mean, config.std or same.std
        if means is None or deviations is None:
            raise ValueError(
                f"the bands {', '.join(config.bands)} of '{config.name}' need their mean and deviation: "
                "--data.statistics stats.json of `data_shards stats`, or mean and std of the encoder"
            )
        return list(means), list(deviations)
    mean, std = (known.mean, known.std) if known else (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    if trained:
        mean, std = trained.mean or mean, trained.std or std
    return list(config.mean or mean), list(config.std or std)


def grid_of(length: int) -> tuple[int, int]:
    """Returns the square grid (h, w) of ``length`` tokens. Raises ValueError if there is none."""
    side = math.isqrt(length)
    if side * side != length:
        raise ValueError(f"{length} visual tokens make no square grid; the encoders take square images")
    return side, side


def is_plain_vit(model: nn.Module) -> bool:
    """Tells whether the instruction can enter before the blocks: timm's VisionTransformer with its own forward."""
    return isinstance(model, VisionTransformer) and type(model).forward_features is VisionTransformer.forward_features
