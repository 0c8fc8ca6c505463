"""PriorCLIP in one file: torch, timm and transformers are all that it needs.

`python -m model export --format transformers` puts this file beside the weights, for processes that do not know the
project:

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(FOLDER)
    features = model.get_image_features(**processor(images=pictures, return_tensors="pt"))      # (B, d), length 1

It computes features and does not train: no freezing, no checkpointing, no belief but soft, hard and none. The names of
its parameters are those of the project, so that both read the same weights.

Source: PriorCLIP, arXiv 2405.10160.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PretrainedConfig, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.utils.hub import cached_file

PARTS = (
    "kind",
    "embed_dim",
    "vision",
    "prior",
    "text",
    "belief",
    "fusion",
    "pae",
    "logit_scale_max",
    "logit_bias_init",
)
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token", "subfolder")


class PriorCLIPConfig(PretrainedConfig):
    """The architecture; the names are explained in the project's ``ModelConfig``."""

    model_type = "priorclip"

    def __init__(self, **values: Any) -> None:
        for name in PARTS:
            setattr(self, name, values.pop(name, None))
        super().__init__(**values)


class Encoder(nn.Module):
    """A timm model that normalises pixels by its own mean and deviation."""

    def __init__(self, settings: dict[str, Any], pool: bool) -> None:
        super().__init__()
        name, side = settings["name"], settings["image_size"]
        known = timm.get_pretrained_cfg(name)
        size = {"img_size": side} if known and known.fixed_input_size else {}
        head = {} if pool else {"global_pool": ""}
        options = {**size, **head, **settings["kwargs"]}
        self.model: Any = timm.create_model(
            name, pretrained=False, num_classes=settings.get("projection") or 0, **options
        )
        self.settings, self.pool = settings, pool
        self.width = (
            settings.get("projection") or getattr(self.model, "head_hidden_size", None) or self.model.num_features
        )

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), uint8 or in [0, 1] -> the input of the timm model."""
        weights, side = next(self.parameters()), self.settings["image_size"]
        dtype = torch.promote_types(weights.dtype, torch.float32)
        pixels = images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)
        if self.pool and pixels.shape[-2:] != (side, side):
            pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        if pixels.shape[-2:] != (side, side):
            raise ValueError(f"images are {tuple(pixels.shape[-2:])} pixels, but this model takes {side} x {side}")
        mean, std = (pixels.new_tensor(self.settings[name]).view(3, 1, 1) for name in ("mean", "std"))
        return ((pixels - mean) / std).to(weights.dtype)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(self.normalise(images))

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns tokens (B, L, C) and the pooled feature (B, C)."""
        features = self(images)
        if features.ndim == 3:
            prefix = getattr(self.model, "num_prefix_tokens", 0)
            tokens = features[:, prefix:]
            has_class = prefix > 0 and getattr(self.model, "cls_token", None) is not None
            return tokens, features[:, 0] if has_class else tokens.mean(1)
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            features = features.permute(0, 3, 1, 2)
        tokens = features.flatten(2).transpose(1, 2)
        return tokens, tokens.mean(1)


class Text(nn.Module):
    """A text encoder of transformers without its own pooling layer."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        values = dict(settings["config"])
        architecture = AutoConfig.for_model(values.pop("model_type"), **values)
        auto = AutoModelForTextEncoding if type(architecture) in AutoModelForTextEncoding._model_mapping else AutoModel
        kind: Any = auto._model_mapping[type(architecture)]
        pooler = "add_pooling_layer" in inspect.signature(kind).parameters
        self.model: Any = auto.from_config(architecture, **({"add_pooling_layer": False} if pooler else {}))
        self.pooling = settings["pooling"]
        self.width: int = architecture.hidden_size

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        # No token of CLIP's tower reads the tokens after it, and padding is at the end.
        causal = self.model.config.model_type == "clip_text_model" and self.pooling == "eos"
        return self.model(input_ids=input_ids, attention_mask=None if causal else mask).last_hidden_state

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.pooling == "cls":
            return states[:, 0]
        if self.pooling == "mean":
            real = mask.to(states.dtype).unsqueeze(-1)
            return (states * real).sum(1) / real.sum(1).clamp(min=1)
        last = (mask.long() * torch.arange(states.shape[1], device=states.device)).amax(1)
        return states[torch.arange(len(states), device=states.device), last]


def affinity(tokens: Tensor, instruction: Tensor) -> Tensor:
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    with torch.autocast(tokens.device.type, enabled=False):
        return torch.einsum("bld,bd->bl", tokens.to(dtype), instruction.to(dtype))


def soft_weights(tokens: Tensor, instruction: Tensor, belief: dict[str, Any]) -> Tensor | None:
    """Returns M + 1/sqrt(R), (B, L), for soft belief; None for hard and none."""
    if belief["mode"] != "soft":
        return None
    scores = affinity(tokens, instruction)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    place = torch.empty_like(order).scatter_(-1, order, places) if belief["compat"] == "paper" else order
    return scores.softmax(dim=-1) + (place + 1).to(scores.dtype).rsqrt()


def weigh(tokens: Tensor, weights: Tensor, belief: dict[str, Any]) -> Tensor:
    weighted = tokens * weights.to(tokens.dtype).unsqueeze(-1)
    return F.normalize(weighted, dim=1) if belief["compat"] == "released" else weighted


def keep_top(tokens: Tensor, instruction: Tensor, k: int) -> Tensor:
    order = affinity(tokens, instruction).argsort(dim=-1, descending=True, stable=True)[:, :k]
    return tokens.gather(1, order.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def apply_belief(tokens: Tensor, instruction: Tensor, belief: dict[str, Any]) -> Tensor:
    if belief["mode"] == "hard":
        return keep_top(tokens, instruction, belief["k"])
    weights = soft_weights(tokens, instruction, belief)
    return tokens if weights is None else weigh(tokens, weights, belief)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.merge = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        parts = self.query(query), self.key(memory), self.value(memory)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts)
        read = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None, :].bool())
        return self.merge(read.transpose(1, 2).flatten(2))


class FusionLayer(nn.Module):
    def __init__(self, width: int, fusion: dict[str, Any]) -> None:
        super().__init__()
        hidden = int(width * fusion["mlp_ratio"])
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, fusion["heads"])
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, weights: Tensor | None, belief: dict[str, Any]) -> Tensor:
        normed = memory = self.norm1(x)
        if weights is not None:
            memory = torch.cat([normed[:, :1], weigh(normed[:, 1:], weights, belief)], dim=1)
        x = x + self.attention(normed, memory)
        return x + self.mlp(self.norm2(x))


class InstructedViT(nn.Module):
    """A ViT whose first token is the instruction."""

    def __init__(self, encoder: Any, prior_width: int, belief: dict[str, Any]) -> None:
        super().__init__()
        self.encoder, self.belief = encoder, belief
        self.width = int(encoder.width)
        self.instruction = nn.Linear(prior_width, self.width)

    def forward(self, images: Tensor, prior: Tensor) -> Tensor:
        vit, instruction = self.encoder.model, self.instruction(prior)
        embedded = vit._pos_embed(vit.patch_embed(self.encoder.normalise(images)))
        tokens = vit.norm_pre(vit.patch_drop(embedded))
        prefix = 0 if self.belief["compat"] == "released" else vit.num_prefix_tokens
        weighted = apply_belief(tokens[:, prefix:], instruction, self.belief)
        x = torch.cat([instruction.unsqueeze(1).to(tokens.dtype), tokens[:, :prefix], weighted], dim=1)
        return vit.fc_norm(vit.norm(vit.blocks(x)[:, 0]))


class InstructedBackbone(nn.Module):
    """Another backbone, whose tokens the instruction reads in fusion layers, or joins without any."""

    def __init__(self, encoder: Any, prior_width: int, belief: dict[str, Any], fusion: dict[str, Any]) -> None:
        super().__init__()
        self.encoder, self.belief = encoder, belief
        self.width = int(fusion["width"] or encoder.width)
        self.narrow = nn.Identity() if self.width == encoder.width else nn.Linear(encoder.width, self.width)
        self.instruction = nn.Linear(prior_width, self.width)
        self.layers = nn.ModuleList(FusionLayer(self.width, fusion) for _ in range(fusion["layers"]))
        self.norm = nn.LayerNorm(self.width)

    def forward(self, images: Tensor, prior: Tensor) -> Tensor:
        instruction, tokens = self.instruction(prior), self.narrow(self.encoder.tokens(images)[0])
        weights = soft_weights(tokens, instruction, self.belief)
        kept = keep_top(tokens, instruction, self.belief["k"]) if self.belief["mode"] == "hard" else tokens
        x = torch.cat([instruction.unsqueeze(1), kept], dim=1)
        for layer in self.layers:
            x = layer(x, weights, self.belief)
        if self.layers:
            return self.norm(x[:, 0] + tokens.mean(1))
        if weights is None:
            return self.norm(x[:, 0] + kept.mean(1))
        share = (weights / weights.sum(1, keepdim=True)).to(tokens.dtype)
        return self.norm(x[:, 0] + torch.einsum("bld,bl->bd", kept, share))


class PlainVision(nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = int(encoder.width)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.tokens(images)[1]


class AttentionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(width, heads), nn.LayerNorm(width), nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, query: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        y = self.norm1(y + self.attention(query, y, mask))
        return self.norm2(y + self.ffn(y))


class PAELayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attention, self.signal = AttentionBlock(width, heads), nn.Linear(width, width)
        self.cross_attention = AttentionBlock(width, heads)

    def forward(self, x: Tensor, signal: Tensor, mask: Tensor | None) -> Tensor:
        return self.cross_attention(self.signal(signal), self.self_attention(x, x, mask), mask)


class PAE(nn.Module):
    """Progressive attention encoder."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PAELayer(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, instruction: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, x if instruction is None else instruction.unsqueeze(1), mask)
        return x


def is_plain_vit(model: nn.Module) -> bool:
    return isinstance(model, VisionTransformer) and type(model).forward_features is VisionTransformer.forward_features


def open_towers(model: Any, config: PriorCLIPConfig) -> None:
    """Gives the model the parts of PriorCLIP, or of a plain CLIP."""
    encoder = Encoder(config.vision, pool=False)
    if config.kind == "clip":
        model.visual = PlainVision(encoder)
    else:
        model.prior = Encoder(config.prior, pool=True)
        if is_plain_vit(encoder.model):
            model.visual = InstructedViT(encoder, model.prior.width, config.belief)
        else:
            model.visual = InstructedBackbone(encoder, model.prior.width, config.belief, config.fusion)
    model.text = Text(config.text)
    model.image_projection = nn.Linear(model.visual.width, config.embed_dim, bias=False)
    model.text_projection = nn.Linear(model.text.width, config.embed_dim, bias=False)


def closed_towers(model: Any, config: PriorCLIPConfig) -> None:
    """Gives the model the parts of PriorITR."""
    width, pae = config.embed_dim, config.pae
    model.vision, model.text = Encoder(config.vision, pool=False), Text(config.text)
    model.vision_projection = nn.Linear(model.vision.width, width)
    model.text_projection = nn.Linear(model.text.width, width)
    if pae["spatial_layers"]:
        model.prior = Encoder(config.prior, pool=True)
        model.prior_projection = nn.Linear(model.prior.width, width)
        model.spatial, model.image_head = PAE(width, pae["spatial_layers"], pae["heads"]), nn.Linear(width, width)
    if pae["temporal_cycles"]:
        model.temporal, model.text_head = PAE(width, pae["temporal_cycles"], pae["heads"]), nn.Linear(width, width)


def closed_image(model: Any, images: Tensor) -> Tensor:
    tokens, pooled = (model.vision_projection(x) for x in model.vision.tokens(images))
    if not hasattr(model, "spatial"):
        return pooled
    belief, instruction = model.config.belief, model.prior_projection(model.prior(images))
    if belief["compat"] == "released":
        tokens = torch.cat([pooled.unsqueeze(1), tokens], dim=1)
    if belief["mode"] == "hard":
        read = model.spatial(keep_top(tokens, instruction, belief["k"]), instruction)[:, 0]
    elif belief["mode"] == "none":
        read = model.spatial(tokens, instruction).mean(1)
    else:
        local = model.spatial(apply_belief(tokens, instruction, belief), instruction)
        best = affinity(tokens, instruction).argmax(dim=-1)
        read = local[torch.arange(len(local), device=local.device), best]
    return pooled + model.image_head(read)


def closed_text(model: Any, input_ids: Tensor, mask: Tensor) -> Tensor:
    tokens = model.text_projection(model.text(input_ids, mask))
    pooled = model.text.pool(tokens, mask)
    return pooled + model.text_head(model.temporal(tokens, mask=mask)[:, 0]) if hasattr(model, "temporal") else pooled


class PriorCLIPModel(PreTrainedModel):
    """Images and texts in one space."""

    config_class = PriorCLIPConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True
    visual: Any
    text: Any
    prior: Any
    image_projection: Any
    text_projection: Any

    def __init__(self, config: PriorCLIPConfig) -> None:
        super().__init__(config)
        if config.belief["mode"] not in ("soft", "hard", "none"):
            raise ValueError(f"this file has no belief '{config.belief['mode']}'")
        (closed_towers if config.kind == "prioritr" else open_towers)(self, config)
        self.logit_scale, self.attribution_scale = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        if config.logit_bias_init is not None:
            self.logit_bias = nn.Parameter(torch.zeros(1))

    @classmethod
    def from_pretrained(cls, source: Any, *_: Any, config: Any = None, **options: Any) -> PriorCLIPModel:  # type: ignore[override]
        """Returns the model of a folder or a hub id, in eval mode; ``dtype`` converts its weights.

        timm's models hold constants that are not in the weights. So the model is built with real memory, not on the
        meta device as transformers does.
        """
        hub = {name: options[name] for name in HUB if options.get(name) is not None}
        config = config if isinstance(config, PriorCLIPConfig) else PriorCLIPConfig.from_pretrained(source, **hub)
        model = cls(config)
        weights = cached_file(source, "model.safetensors", **hub)
        if weights is None:
            raise OSError(f"{source} has no model.safetensors")
        model.load_state_dict(load_file(weights))
        dtype = options.get("dtype") or options.get("torch_dtype")
        return model.to(dtype=dtype).eval() if isinstance(dtype, torch.dtype) else model.eval()  # type: ignore[call-arg]

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> Tensor:
        """pixel_values (B, 3, H, W), uint8 or in [0, 1], not normalised -> (B, d) of length 1."""
        if self.config.kind == "prioritr":
            features = closed_image(self, pixel_values)
        elif self.config.kind == "clip":
            features = self.image_projection(self.visual(pixel_values))
        else:
            features = self.image_projection(self.visual(pixel_values, self.prior(pixel_values)))
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        """input_ids (B, T), attention_mask (B, T) -> (B, d) of length 1."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.config.kind == "prioritr":
            features = closed_text(self, input_ids, mask)
        else:
            features = self.text_projection(self.text.pool(self.text(input_ids, mask), mask))
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CLIPOutput:
        """Returns features of length 1, and similarities times the learned scale if there are both."""
        image = None if pixel_values is None else self.get_image_features(pixel_values)
        text = None if input_ids is None else self.get_text_features(input_ids, attention_mask)
        logits = None
        if image is not None and text is not None:
            scale = self.logit_scale.float().clamp(max=math.log(self.config.logit_scale_max)).exp()
            logits = scale * image @ text.T
            if self.config.logit_bias_init is not None:
                logits = logits + self.logit_bias.float()
        per_text = None if logits is None else logits.T
        return CLIPOutput(logits_per_image=logits, logits_per_text=per_text, image_embeds=image, text_embeds=text)
