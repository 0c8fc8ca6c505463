"""Configurations small enough for tests, random weights, no downloads."""

import copy

from priorclip.model.config import BeliefConfig, EncoderConfig, FusionConfig, ModelConfig, PAEConfig, TextConfig

BERT = {
    "model_type": "bert",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
CLIP_TEXT = {
    "model_type": "clip_text_model",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "eos_token_id": 63,
    "bos_token_id": 62,
}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "drop_path_rate": 0.0}
VISION = {
    "vit": EncoderConfig(name="test_vit", image_size=64),
    "registers": EncoderConfig(name="test_vit4", image_size=64),
    "swin": EncoderConfig(name="swin_tiny_patch4_window7_224", image_size=64, kwargs=SWIN),
    "resnet": EncoderConfig(name="test_resnet", image_size=64),
    "convnext": EncoderConfig(name="test_convnext", image_size=64),
    "eva": EncoderConfig(
        name="eva02_tiny_patch14_224", image_size=56, kwargs={"depth": 2, "embed_dim": 48, "num_heads": 2}
    ),
}


def tiny(kind: str = "priorclip", vision: str | EncoderConfig = "vit", **changes) -> ModelConfig:
    """A model of a few hundred thousand parameters without batch normalisation in its prior, without dropout."""
    values = {
        "kind": kind,
        "embed_dim": 16,
        "vision": VISION[vision] if isinstance(vision, str) else vision,
        "prior": EncoderConfig(name="test_convnext", image_size=32, trainable=False),
        "text": TextConfig(config=BERT, context_length=20, pooling="mean"),
        "belief": BeliefConfig(),
        "fusion": FusionConfig(width=24, layers=1, heads=2),
        "pae": PAEConfig(spatial_layers=1, temporal_cycles=2, heads=2, dropout=0.0),
    }
    return copy.deepcopy(ModelConfig(**(values | changes)))
