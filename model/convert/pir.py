"""The authors' closed-domain PIR (github.com/jaychempan/PIR): Swin, ResNet-50 prior, BERT and two PAEs.

    vision_encoder.*    Swin by Microsoft's names        img_sa, mapping_img, img_ca, head_img    Spatial-PAE
    conv_encoder.*      ResNet by places in a sequence   txt_sa, mapping_txt, txt_ca, head_txt    Temporal-PAE
    text_encoder.*      BERT                             temp, temp2    divide the logits

The number of tokens that belief keeps (``filter_size``, 40 in their configurations) is in the ``config`` that they save
beside the weights. Their text encoder reads padding as text. Ours masks it, so features of padded texts differ: an
attention mask of ones gives their features.
"""

from __future__ import annotations

from priorclip.model.config import BeliefConfig, EncoderConfig, ModelConfig, PAEConfig, TextConfig
from priorclip.model.convert.checkpoint import Checkpoint
from priorclip.model.convert.family import (
    CLIP_MEAN,
    CLIP_STD,
    Converted,
    Request,
    assemble,
    attribution_scale,
    count_blocks,
    read_fact,
    require_tensor,
)
from priorclip.model.convert.rules import Rule, inverse_log, whole
from priorclip.model.encoders.weights import State

FILTER_SIZE = 40
MAX_TOKENS = 47
HEADS = 8
DROPOUT = 0.2
BERT_HEAD_WIDTH = 64
SEQUENCE = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def recognises(state: State) -> bool:
    return all(any(name.startswith(part) for name in state) for part in ("vision_encoder.", "conv_encoder.", "img_sa."))


def convert(checkpoint: Checkpoint, request: Request) -> Converted:
    """Converts to a PriorITR."""
    state = checkpoint.state
    config = request.model or architecture(checkpoint, request)
    config.kind = "prioritr"
    given = attribution_scale(config) if "temp2" not in state else {}
    notes = [f"belief keeps {config.belief.k} tokens"]
    if "filter_size" not in checkpoint.facts and request.model is None:
        notes.append(f"no filter_size beside the weights: {FILTER_SIZE} is used, as in the authors' configurations")
    bert = "text_encoder.bert." if any(name.startswith("text_encoder.bert.") for name in state) else "text_encoder."
    return assemble(checkpoint, config, rules(bert), given, "bert-base-uncased", notes)


def architecture(checkpoint: Checkpoint, request: Request) -> ModelConfig:
    """Returns the configuration by the shapes of the tensors and the saved ``config``."""
    state, facts, source = checkpoint.state, checkpoint.facts, checkpoint.source
    heads = int(read_fact(facts, "head") or HEADS)
    dropout = read_fact(facts, "dropout_r")
    image_size = request.image_size or int(read_fact(facts, "image_res") or 224)
    return ModelConfig(
        kind="prioritr",
        embed_dim=require_tensor(state, "vision_proj.weight", source).shape[0],
        vision=swin(checkpoint, image_size),
        prior=EncoderConfig(
            name="resnet50",
            image_size=image_size,
            trainable=bool(read_fact(facts, "finetune_conv")),
            mean=list(CLIP_MEAN),
            std=list(CLIP_STD),
            kwargs=prior_kwargs(state),
        ),
        text=bert_config(checkpoint, request.context_length or int(read_fact(facts, "max_tokens") or MAX_TOKENS)),
        belief=BeliefConfig(mode="hard", k=int(read_fact(facts, "filter_size") or FILTER_SIZE), compat="released"),
        pae=PAEConfig(
            count_blocks(state, "img_sa."),
            count_blocks(state, "txt_sa."),
            heads,
            DROPOUT if dropout is None else float(dropout),
        ),
    )


def prior_kwargs(state: State) -> dict[str, list[int]]:
    """Returns the blocks of each stage if they are not ResNet-50's."""
    layers = [count_blocks(state, f"conv_encoder.{place}.") for place in range(4, 8)]
    return {} if layers == [3, 4, 6, 3] else {"layers": layers}


def swin(checkpoint: Checkpoint, image_size: int) -> EncoderConfig:
    """Returns the configuration of Swin-T, or of another Swin by its sizes."""
    state, source = checkpoint.state, checkpoint.source
    width = require_tensor(state, "vision_encoder.patch_embed.proj.weight", source).shape[0]
    stages = count_blocks(state, "vision_encoder.layers.")
    depths = [count_blocks(state, f"vision_encoder.layers.{stage}.blocks.") for stage in range(stages)]
    tables = [
        require_tensor(state, f"vision_encoder.layers.{stage}.blocks.0.attn.relative_position_bias_table", source)
        for stage in range(stages)
    ]
    window = (int(tables[0].shape[0] ** 0.5) + 1) // 2
    kwargs = {"embed_dim": width, "depths": depths, "num_heads": [t.shape[1] for t in tables], "window_size": window}
    tiny = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
    return EncoderConfig(
        name="swin_tiny_patch4_window7_224",
        image_size=image_size,
        mean=list(CLIP_MEAN),
        std=list(CLIP_STD),
        kwargs={} if kwargs == tiny else kwargs,
    )


def bert_config(checkpoint: Checkpoint, context_length: int) -> TextConfig:
    """Returns the configuration of a BERT by the shapes of the tensors."""
    state, source = checkpoint.state, checkpoint.source
    prefix = "text_encoder.bert." if "text_encoder.bert.embeddings.word_embeddings.weight" in state else "text_encoder."
    vocabulary, width = require_tensor(state, f"{prefix}embeddings.word_embeddings.weight", source).shape
    config = {
        "model_type": "bert",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": require_tensor(state, f"{prefix}encoder.layer.0.intermediate.dense.weight", source).shape[
            0
        ],
        "num_hidden_layers": count_blocks(state, f"{prefix}encoder.layer."),
        "num_attention_heads": max(1, width // BERT_HEAD_WIDTH),
        "max_position_embeddings": require_tensor(
            state, f"{prefix}embeddings.position_embeddings.weight", source
        ).shape[0],
    }
    return TextConfig(config=config, context_length=context_length, pooling="cls")


def rules(bert: str) -> list[Rule]:
    """Rules for timm's Swin and ResNet, transformers' BERT and our PAEs."""
    swin_rules = [
        # timm downsamples before a stage, Microsoft's Swin after the previous stage
        Rule(rf"vision\.model\.layers\.{stage}\.downsample\.(.*)", rf"vision_encoder.layers.{stage - 1}.downsample.\1")
        for stage in range(1, 8)
    ]
    prior_rules = [
        Rule(rf"prior\.model\.{name}\.(.*)", rf"conv_encoder.{place}.\1") for place, name in enumerate(SEQUENCE)
    ]
    return [
        *swin_rules,
        Rule(r"vision\.model\.(.*)", r"vision_encoder.\1"),
        *prior_rules,
        Rule(r"text\.model\.(.*)", bert + r"\1"),
        *pae_rules("spatial", "img"),
        *pae_rules("temporal", "txt"),
        Rule(r"image_head\.(.*)", r"head_img.\1"),
        Rule(r"text_head\.(.*)", r"head_txt.\1"),
        Rule(r"vision_projection\.(.*)", r"vision_proj.\1"),
        Rule(r"text_projection\.(.*)", r"text_proj.\1"),
        Rule(r"prior_projection\.(.*)", r"conv_proj.\1"),
        Rule(r"logit_scale", "temp", inverse_log),
        Rule(r"attribution_scale", "temp2", inverse_log),
    ]


def pae_rules(ours: str, theirs: str) -> list[Rule]:
    """Rules for one progressive attention encoder."""
    layer = rf"{ours}\.layers\.(\d+)\."
    rules = [Rule(layer + r"signal\.(.*)", rf"mapping_{theirs}.\1.\2", whole)]
    for block, short, attention in (("self_attention", "sa", "mhatt"), ("cross_attention", "ca", "mhatt_cross")):
        name = rf"{theirs}_{short}.\1."
        inside = layer + block + r"\."
        rules += [
            Rule(inside + r"attention\.query\.(.*)", name + rf"{attention}.linear_q.\2"),
            Rule(inside + r"attention\.key\.(.*)", name + rf"{attention}.linear_k.\2"),
            Rule(inside + r"attention\.value\.(.*)", name + rf"{attention}.linear_v.\2"),
            Rule(inside + r"attention\.merge\.(.*)", name + rf"{attention}.linear_merge.\2"),
            Rule(inside + r"(ffn|norm1|norm2)\.(.*)", name + r"\2.\3"),
        ]
    return rules
