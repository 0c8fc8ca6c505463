"""The options of a model and of its losses, as dataclasses. Their docstrings are the help texts of the commands.

    config = ModelConfig(embed_dim=256, text=TextConfig(name="bert-base-uncased"))
    model = build_model(config)

model/presets/ has named configurations. No torch in this module: `--help` does not wait for it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from priorclip.model.belief_config import BeliefConfig

T = TypeVar("T")
MAX_BANDS = 1024  # of an encoder


@dataclass
class EncoderConfig:
    """An image encoder: a timm model without its classifier.

    Args:
        name: timm model name, with or without a tag (``vit_base_patch32_clip_quickgelu_224.openai``)
        weights: null: random. ``hub``: timm's pretrained weights. Path of a .safetensors or .pth file. Export folder of
            ``finetune prior``. ``package:NAME``: the weight file inside the installed package NAME
        image_size: side of the square input, pixels
        trainable: false freezes the encoder: no gradient, always in eval mode
        unlocked: train only this many of its last layers, the others are frozen; null: train all
        remember: folder that caches the outputs of a frozen encoder, so that no image is encoded again. It helps if the
            same pixels come back: without random crops (data.scale 1). null: no cache
        freeze_batch_norm: batch normalisation uses its stored statistics in training too
        bands: names of the bands that it reads, as they stand in the images (`data_shards pack --image-format tiff`).
            Those of vision are the channels of a batch; the prior reads the same or some of them. Values are measured
            ones, as in the file. null: 8-bit pictures of red, green and blue
        band_start: how the first layer starts from weights of red, green and blue. meaning: these bands take their own
            kernels, others the mean. repeat: the three kernels in turn, times 3 / n, as timm's in_chans does
        mean: input mean by channel: in [0, 1], or in measured values with bands; null: that of the timm model; with
            bands that of data.statistics
        std: input standard deviation by channel; null: as mean
        projection: width of the model's own last projection, which is kept (only for a prior). CLIP's ResNets pool by
            attention and project. For an export of ``finetune prior``, the number of scenes: their scores are then the
            prior's feature. null: the pooled feature before any projection
        kwargs: further arguments of ``timm.create_model``
    """

    name: str = "resnet50"
    weights: str | None = None
    image_size: int = 224
    trainable: bool = True
    unlocked: int | None = None
    remember: str | None = None
    freeze_batch_norm: bool = False
    bands: list[str] | None = None
    band_start: Literal["meaning", "repeat"] = "meaning"
    mean: list[float] | None = None
    std: list[float] | None = None
    projection: int | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be at least 1, not {self.image_size} (encoder '{self.name}')")
        if self.bands is not None:
            self.bands = [str(band) for band in self.bands]
            check_bands(f"encoder '{self.name}'", self.bands, self.kwargs)
        if self.band_start not in ("meaning", "repeat"):
            raise ValueError(f"band_start must be meaning or repeat, not '{self.band_start}' (encoder '{self.name}')")
        count = 3 if self.bands is None else len(self.bands)
        for name in ("mean", "std"):
            if getattr(self, name) is not None and len(getattr(self, name)) != count:
                how = "" if self.bands is None else ", or null for those of data.statistics"
                raise ValueError(f"{name} must have {count} numbers, one a channel{how} (encoder '{self.name}')")
        if self.bands is not None and not all(value > 0 for value in self.std or ()):
            raise ValueError(f"std must be above 0 for each band, not {self.std} (encoder '{self.name}')")
        check_unlocked(f"encoder '{self.name}'", self.unlocked)
        check_remember(f"encoder '{self.name}'", self.remember, self.trainable)
        if self.projection is not None and self.projection < 1:
            raise ValueError(f"projection must be at least 1, not {self.projection} (encoder '{self.name}')")

    def take_statistics(self, found: Mapping[str, tuple[float, float]], source: str) -> None:
        """Sets mean and std of the bands from measured ones, where they are null.

        An encoder with bands whose weights are an export keeps the export's. Raises ValueError for a missing band.
        """
        if self.bands is None or self.mean is not None or (self.weights and Path(self.weights).expanduser().is_dir()):
            return
        if missing := [band for band in self.bands if band not in found]:
            known = ", ".join(found) or "none"
            raise ValueError(f"{source} has no statistics of the band {', '.join(missing)}; it has: {known}")
        self.mean = [found[band][0] for band in self.bands]
        self.std = [found[band][1] for band in self.bands]
        self.__post_init__()


@dataclass
class TextConfig:
    """A text encoder: any transformers model that encodes text.

    Args:
        name: transformers hub id, local folder or ``package:NAME`` that gives tokenizer and architecture
        config: the architecture (``model_type`` and sizes); null: read from ``name``
        weights: null: random. ``hub``: those of ``name``. A local folder with model.safetensors. ``package:NAME``
        context_length: longest text in tokens
        pooling: the token states that represent the text: the first (``cls``), the mean of all, or the last (``eos``)
        trainable: false freezes the encoder
        unlocked: train only this many of its last layers, the others are frozen; null: train all
        remember: folder that caches the outputs of a frozen encoder; null: no cache
    """

    name: str | None = None
    config: dict[str, Any] | None = None
    weights: str | None = None
    context_length: int = 77
    pooling: Literal["cls", "mean", "eos"] = "cls"
    trainable: bool = True
    unlocked: int | None = None
    remember: str | None = None

    def __post_init__(self) -> None:
        if self.pooling not in ("cls", "mean", "eos"):
            raise ValueError(f"text.pooling must be cls, mean or eos, not '{self.pooling}'")
        if self.context_length < 1:
            raise ValueError(f"text.context_length must be at least 1, not {self.context_length}")
        check_unlocked("text", self.unlocked)
        check_remember("text", self.remember, self.trainable)


@dataclass
class FusionConfig:
    """Transformer layers in which the instruction token reads the tokens of a backbone that is not a plain ViT.

    Args:
        width: width of these layers; null: the backbone's
        layers: number of layers; 0: the instruction is added to the mean of the tokens, which belief weights
        heads: attention heads
        mlp_ratio: width of the feed-forward layers divided by ``width``
        dropout: dropout after attention and feed-forward
    """

    width: int | None = None
    layers: int = 2
    heads: int = 8
    mlp_ratio: float = 2.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        at_least_one(self, "heads")
        if self.layers < 0:
            raise ValueError(f"fusion.layers must be at least 0, not {self.layers}")
        if self.width is not None:
            at_least_one(self, "width")
        if self.mlp_ratio <= 0:
            raise ValueError(f"fusion.mlp_ratio must be above 0, not {self.mlp_ratio}")
        check_dropout("fusion", self.dropout)


@dataclass
class PAEConfig:
    """Progressive attention encoders of the closed domain model.

    Args:
        spatial_layers: layers of the Spatial-PAE; 0: no prior, and the global feature represents an image
        temporal_cycles: layers (cycles) of the Temporal-PAE; 0: the pooled feature represents a text
        heads: attention heads
        dropout: dropout on attention weights and after each sub-layer
    """

    spatial_layers: int = 2
    temporal_cycles: int = 3
    heads: int = 8
    dropout: float = 0.2

    def __post_init__(self) -> None:
        at_least_one(self, "heads")
        for name in ("spatial_layers", "temporal_cycles"):
            if getattr(self, name) < 0:
                raise ValueError(f"pae.{name} must not be negative, but is {getattr(self, name)}")
        check_dropout("pae", self.dropout)


@dataclass
class ModelConfig:
    """A PriorCLIP (open domain) or PriorITR (closed domain) model, or a plain CLIP.

    Args:
        kind: priorclip, prioritr, or clip (PriorCLIP's towers without a prior: prior, belief, fusion are not used)
        embed_dim: width d of the shared embedding space
        vision: the visual encoder
        prior: the scene recognition encoder; its pooled feature is the instruction
        text: the text encoder
        belief: how the instruction weights the visual tokens
        fusion: layers over the tokens of a backbone that is not a plain ViT (only for priorclip)
        pae: the progressive attention encoders (only for prioritr)
        logit_scale_init: starting scale (1 / temperature) of the contrastive loss
        attribution_scale_init: starting scale of the attribution loss
        logit_scale_max: upper limit of both scales
        learn_logit_scale: false: the scale of the contrastive loss stays constant
        learn_attribution_scale: false: the scale of the attribution loss stays constant
        logit_bias_init: starting bias of the sigmoid loss; null: -10 with loss.kind sigmoid, else the model has none
        uncertainty: each image and text also has variances, by a linear head; loss.kind probabilistic turns it on
        shared_scale: the attribution loss uses the scale of the contrastive loss, as in the authors' open domain code;
            attribution_scale_init and learn_attribution_scale then have no effect
    """

    kind: Literal["priorclip", "prioritr", "clip"] = "priorclip"
    embed_dim: int = 512
    vision: EncoderConfig = field(default_factory=lambda: EncoderConfig(name="vit_base_patch32_clip_224"))
    prior: EncoderConfig = field(default_factory=lambda: EncoderConfig(name="resnet50", trainable=False))
    text: TextConfig = field(default_factory=TextConfig)
    belief: BeliefConfig = field(default_factory=BeliefConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    pae: PAEConfig = field(default_factory=PAEConfig)
    logit_scale_init: float = 1 / 0.07
    attribution_scale_init: float = 1 / 0.07
    logit_scale_max: float = 100.0
    learn_logit_scale: bool = True
    learn_attribution_scale: bool = True
    logit_bias_init: float | None = None
    shared_scale: bool = False
    uncertainty: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("priorclip", "prioritr", "clip"):
            raise ValueError(f"kind must be priorclip, prioritr or clip, not '{self.kind}'")
        at_least_one(self, "embed_dim")
        for name in ("logit_scale_init", "attribution_scale_init"):
            if not 0 < getattr(self, name) <= self.logit_scale_max:
                raise ValueError(f"{name} must lie in (0, logit_scale_max={self.logit_scale_max}]")
        if self.logit_bias_init is not None and not math.isfinite(self.logit_bias_init):
            raise ValueError(f"logit_bias_init must be a finite number, not {self.logit_bias_init}")
        if self.reads_prior:
            check_prior_bands(self.vision.bands, self.prior.bands)

    @property
    def reads_prior(self) -> bool:
        """Whether the model has a prior at all."""
        return self.kind == "priorclip" or (self.kind == "prioritr" and self.pae.spatial_layers > 0)

    @property
    def normalised_encoders(self) -> list[EncoderConfig]:
        """The encoders whose mean and deviation are known: not a prior of bands that the model does not read."""
        return [self.vision, self.prior] if self.reads_prior or self.prior.bands is None else [self.vision]


@dataclass
class SceneConfig:
    """A scene classifier, which becomes the prior of a model.

    Args:
        backbone: the image encoder
        classes: scene names, in the order of the logits
        tags: names of objects, whose logits follow those of the scenes; an image can have several
        kind: always ``scene``
        learned: what the backbone has learned. scenes: the classes and tags. boxes, masks, self: something else, so
            that the classifier has no classes and gives the pooled feature
    """

    backbone: EncoderConfig = field(default_factory=EncoderConfig)
    classes: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    kind: Literal["scene"] = "scene"
    learned: Literal["scenes", "boxes", "masks", "self"] = "scenes"


def at_least_one(config: Any, *names: str) -> None:
    """Raises ValueError that names the option (``pae.heads``) if it is below 1."""
    group = {"FusionConfig": "fusion.", "PAEConfig": "pae.", "LossConfig": "loss."}.get(type(config).__name__, "")
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{group}{name} must be at least 1, not {getattr(config, name)}")


def check_bands(group: str, bands: list[str], kwargs: Mapping[str, Any]) -> None:
    if not bands or not all(band.strip() for band in bands) or len(set(bands)) < len(bands):
        raise ValueError(f"{group}: bands must be different names, such as [red, green, blue, nir], not {bands}")
    if len(bands) > MAX_BANDS:
        raise ValueError(f"{group}: {len(bands)} bands, limit {MAX_BANDS}")
    if "in_chans" in kwargs:
        raise ValueError(f"{group}: kwargs.in_chans contradicts bands, which give the number of channels: remove it")


def check_prior_bands(vision: list[str] | None, prior: list[str] | None) -> None:
    """Raises ValueError unless vision and prior both read pictures, or the prior reads bands of the vision encoder."""
    if vision is None and prior is None:
        return
    if vision is None or prior is None:
        one, other = ("prior", "vision") if prior is None else ("vision", "prior")
        raise ValueError(f"model.{other}.bands are given and model.{one}.bands are null: both read the same batch")
    if missing := [band for band in prior if band not in vision]:
        raise ValueError(f"model.prior.bands: {', '.join(missing)} is not in model.vision.bands ({', '.join(vision)})")


def check_unlocked(group: str, unlocked: int | None) -> None:
    if unlocked is not None and unlocked < 1:
        raise ValueError(f"{group}: unlocked must be at least 1, not {unlocked}; trainable false freezes all layers")


def check_remember(group: str, remember: str | None, trainable: bool) -> None:
    if remember is not None and trainable:
        raise ValueError(f"{group}: remember caches the outputs of a frozen encoder, so it needs trainable false")


def check_dropout(group: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{group}.dropout must lie in [0, 1), not {value}")


def to_dict(config: ModelConfig | SceneConfig) -> dict[str, Any]:
    """Returns the configuration as plain values for YAML and JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """Returns an instance of the dataclass from plain nested values. Raises ValueError that names an unknown key."""
    types = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in types:
            near = difflib.get_close_matches(key, list(types), n=1, cutoff=0)
            raise ValueError(f"unknown key '{where}{key}': did you mean '{where}{near[0]}'?")
        nested = dataclasses.is_dataclass(types[key]) and isinstance(value, dict)
        arguments[key] = from_dict(types[key], value, f"{where}{key}.") if nested else value
    return cls(**arguments)


PairLoss = Literal["contrastive", "sigmoid", "probabilistic"]


@dataclass
class LossConfig:
    """The training loss: contrastive + lambda_cs * attribution, both over the global batch.

    Args:
        kind: the loss of image-text pairs. contrastive: symmetric cross-entropy, as in CLIP. sigmoid: SigLIP's pairwise
            sigmoid loss, which learns a bias too; model.logit_scale_init 10 is SigLIP's start. probabilistic: PCME++'s
            loss of distributions, which learns variances and a bias too; model.logit_scale_init 5 is PCME++'s start
        contrastive: weight of the loss of pairs
        lambda_cs: weight of the cluster-based symmetric Attribution loss, which needs scene labels; 0 turns it off
        chunk: rows and columns of the similarity matrix in memory at a time; null: 4096 on a CPU, 8192 on a GPU
        shared_captions: all captions of an image are its positives; false: only the caption of the same pair is, and
            the image's other captions are negatives
        equal_captions: what a pair with the same words, but another image, is to an image and a caption: negative, or
            ignored. Words are the same if all their tokens are
        hard_negatives: 0: all negatives of the contrastive loss weigh the same. Above 0: a negative weighs
            exp(hard_negatives * its logit), as a share of the mean of these
        compat: the Attribution loss. paper: each class of the batch counts once. released: as in the authors' code, a
            class of n samples counts n times
    """

    contrastive: float = 1.0
    lambda_cs: float = 0.0
    chunk: int | None = None
    shared_captions: bool = True
    compat: Literal["paper", "released"] = "paper"
    kind: PairLoss = "contrastive"
    equal_captions: Literal["negative", "ignored"] = "negative"
    hard_negatives: float = 0.0

    def __post_init__(self) -> None:
        if self.compat not in ("paper", "released"):
            raise ValueError(f"loss.compat must be paper or released, not '{self.compat}'")
        if self.kind not in ("contrastive", "sigmoid", "probabilistic"):
            raise ValueError(f"loss.kind must be contrastive, sigmoid or probabilistic, not '{self.kind}'")
        if self.equal_captions not in ("negative", "ignored"):
            raise ValueError(f"loss.equal_captions must be negative or ignored, not '{self.equal_captions}'")
        if self.kind != "contrastive" and self.hard_negatives:
            raise ValueError(f"loss.hard_negatives weighs negatives of the contrastive loss; loss.kind is {self.kind}")
        for name in ("contrastive", "lambda_cs", "hard_negatives"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"loss.{name} must be a finite number and not negative, but it is {value}")
        if self.contrastive == self.lambda_cs == 0:
            raise ValueError("loss.contrastive and loss.lambda_cs are both 0: set one of them above 0")
        if self.chunk is not None:
            at_least_one(self, "chunk")


SIGLIP_BIAS = -10.0  # arXiv 2303.15343, section 3.2: a start at which most pairs are rightly taken for wrong ones


PCME_BIAS = 5.0  # arXiv 2305.18171, appendix: with a scale of 5, a distance of 1 is neither right nor wrong


def add_bias(model: ModelConfig, loss: LossConfig) -> None:
    """Gives the model what its loss learns beside the scale, if it has none: a bias, and variances."""
    if loss.kind != "contrastive" and model.logit_bias_init is None:
        model.logit_bias_init = SIGLIP_BIAS if loss.kind == "sigmoid" else PCME_BIAS
    if loss.kind == "probabilistic":
        model.uncertainty = True


@dataclass
class LoraConfig:
    """Low-rank adapters in the encoders instead of training their weights (peft); exports contain merged weights.

    Args:
        rank: of the adapters; 0: no adapters
        alpha: their output is multiplied by alpha / rank
        dropout: on their input
        targets: last parts of the names of the adapted layers, such as [qkv, query, value]; null: every linear layer
            and pointwise convolution
    """

    rank: int = 0
    alpha: int = 16
    dropout: float = 0.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank must not be negative, but is {self.rank}")
        check_dropout("lora", self.dropout)
