"""The model card of an export folder, README.md: what the model is, how to load it, its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from priorclip.model.config import ModelConfig, SceneConfig

INSTALL = "Needs the Python package `priorclip-pretraining`: `pip install .` in its source folder."
LOAD = """\
from priorclip.model import from_pretrained

model = from_pretrained(FOLDER)"""
RANK = """\
from priorclip.retrieval import Encoder

encoder = Encoder.load(FOLDER)
images, texts = encoder.embed_images(FILES), encoder.embed_texts(["storage tanks beside a river"])
best_first = (texts @ images.T).argsort(descending=True)"""
TRANSFORMERS = """\
`AutoModel` of transformers knows the model after the first import below. Without it, transformers asks for a newer
version of itself, which does not help. `trust_remote_code` is not needed. The model normalises pixels itself, so the
image processor of this folder does not."""
AUTO = """\
import priorclip.model.export.transformers_auto
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model = AutoModel.from_pretrained(FOLDER)
images = AutoImageProcessor.from_pretrained(FOLDER)(PICTURES, return_tensors="pt")
texts = AutoTokenizer.from_pretrained(FOLDER)(CAPTIONS, padding=True, truncation=True, return_tensors="pt")
similarity = model(**images, **texts).logits_per_image"""


def model_card(config: ModelConfig | SceneConfig, state_dict: Mapping[str, Tensor], extra: Mapping[str, Any]) -> str:
    """Returns the text of the card; ``extra`` holds figures and facts, name -> value or nested names."""
    size = sum(value.numel() for value in state_dict.values()) / 1e6
    if isinstance(config, SceneConfig):
        title, facts = "Scene classifier", {"backbone": config.backbone.name, "classes": len(config.classes)}
        facts |= {"tags": len(config.tags)} if config.tags else {}
        if config.learned != "scenes":
            title, facts = "Image encoder", {"backbone": config.backbone.name, "learned": config.learned}
    else:
        title = {"priorclip": "PriorCLIP", "prioritr": "PriorITR", "clip": "CLIP"}[config.kind]
        text = config.text.name or (config.text.config or {}).get("model_type")
        facts = {
            "vision": config.vision.name,
            "prior": config.prior.name,
            "text": text,
            "width": config.embed_dim,
        }
    encoder = config.backbone if isinstance(config, SceneConfig) else config.vision
    facts |= {"bands": ", ".join(encoder.bands)} if encoder.bands else {}
    lines = [
        "---",
        "library_name: pytorch",
        "tags: [remote-sensing, image-text-retrieval]",
        "---",
        f"# {title}",
        "",
    ]
    lines += [f"{size:.1f} M values. Method: PriorCLIP, arXiv 2405.10160.", ""]
    lines += ["| part | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    load = LOAD if isinstance(config, SceneConfig) else RANK
    lines += [INSTALL, "", "```python", load, "```", ""]
    if not isinstance(config, SceneConfig):
        lines += [TRANSFORMERS, "", "```python", AUTO, "```", ""]
    if extra:
        rows = [f"| {name} | {rounded(value)} |" for name, value in flatten(extra)]
        lines += ["## Figures", "", "| | |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Joins nested names by dots."""
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        rows += flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return rows


def rounded(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
