"""Our towers give the features of open_clip, of transformers and of the authors' code, to 1e-5 in float32."""

import pytest
import torch
import torch.nn.functional as F
from foreign_models import VOCABULARY, images, normalised, open_clip_model, shaken, texts

from priorclip.model.build import build_model
from priorclip.model.convert import open_clip, pir, priorclip_release, transformers_clip
from priorclip.model.convert.checkpoint import Checkpoint
from priorclip.model.convert.family import Request

pytest.importorskip("open_clip")
CLOSE = {"rtol": 0, "atol": 1e-5}


def ours(family, state, name="open_clip", **options):
    """Our model from their state dict."""
    checkpoint = Checkpoint("the checkpoint", dict(state), options.pop("facts", {}))
    converted = family.convert(checkpoint, Request(name, **options))
    model = build_model(converted.config).eval()
    model.load_state_dict(converted.state)
    return model, converted


@torch.no_grad()
def assert_same_features(theirs, model, side=224):
    pixels = images(side)
    ids, mask = texts()
    expected = theirs.encode_image(normalised(pixels), normalize=True), theirs.encode_text(ids, normalize=True)
    torch.testing.assert_close(model.encode_image(pixels), expected[0], **CLOSE)
    torch.testing.assert_close(model.encode_text(ids, mask), expected[1], **CLOSE)
    torch.testing.assert_close(model(pixels[:1])["logit_scale"], theirs.logit_scale.exp())
    # Features that differ from image to image: a tower that ignored its input would pass otherwise.
    assert (expected[0][0] - expected[0][1]).abs().max() > 1e-3
    assert (expected[1][0] - expected[1][1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "layers", "family"),
    [
        ("ViT-B-32", 4, "open_clip"),
        ("ViT-B-32-quickgelu", 3, "openai"),
        ("ViT-B-16", 3, "remoteclip"),
        ("ViT-L-14", 2, "open_clip"),
        ("ViT-L-14-quickgelu", 1, "georsclip"),
        ("ViT-H-14", 1, "georsclip"),
    ],
)
def test_open_clip_features(name, layers, family):
    """Full widths, heads, patches and lengths; few layers per tower and a small vocabulary."""
    theirs = open_clip_model(name, layers)
    model, converted = ours(open_clip, theirs.state_dict(), family)
    assert converted.unused == []
    assert_same_features(theirs, model)


@pytest.mark.parametrize(
    ("name", "ours_name"),
    [
        ("ViT-B-32", "vit_base_patch32_clip_224"),
        ("ViT-B-16", "vit_base_patch16_clip_224"),
        ("ViT-L-14", "vit_large_patch14_clip_224"),
        ("ViT-L-14-336", "vit_large_patch14_clip_224"),
        ("ViT-H-14", "vit_huge_patch14_clip_224"),
    ],
)
def test_whole_published_sizes_are_recognised(name, ours_name):
    """Uses the meta device: shapes of the whole models, no memory."""
    with torch.device("meta"):
        theirs = open_clip_model(name, vocabulary=49408)
    config = open_clip.architecture(Checkpoint(name, theirs.state_dict()), Request("open_clip"), "gelu")
    assert (config.vision.name, config.vision.kwargs) == (ours_name, {})
    assert config.vision.image_size == (336 if name.endswith("336") else 224)
    with torch.device("meta"):
        model = build_model(config)
    count = {key: sum(p.numel() for p in m.parameters()) for key, m in (("ours", model), ("theirs", theirs))}
    assert count["ours"] == count["theirs"] + 1  # the attribution scale


def test_activation_matters():
    theirs = open_clip_model("ViT-B-32", 2)
    model, _ = ours(open_clip, theirs.state_dict(), activation="quick_gelu")
    with torch.no_grad():
        assert (model.encode_image(images()) - theirs.encode_image(normalised(images()), True)).abs().max() > 1e-4


@pytest.mark.parametrize("side", [192, 288])
def test_positions_interpolate_as_open_clip_does(side):
    import open_clip as library

    theirs = open_clip_model("ViT-B-32", 2)
    resized = open_clip_model("ViT-B-32", 2, image_size=side)
    state = theirs.state_dict()
    library.model.resize_pos_embed(state, resized)
    resized.load_state_dict(state)
    model, converted = ours(open_clip, theirs.state_dict(), image_size=side)
    assert converted.config.vision.image_size == side
    assert_same_features(resized, model, side)


def test_newer_open_clip_layout_with_a_text_module():
    theirs = open_clip_model("ViT-B-32", 2)
    plain = ("visual.", "logit_scale")
    state = {name if name.startswith(plain) else f"text.{name}": value for name, value in theirs.state_dict().items()}
    model, converted = ours(open_clip, state)
    assert converted.unused == []
    assert_same_features(theirs, model)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_transformers_features(activation):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {"vocab_size": VOCABULARY, "num_hidden_layers": 3, "eos_token_id": VOCABULARY - 1, "hidden_act": activation}
    config = CLIPConfig(text_config=text, vision_config={"num_hidden_layers": 3, "hidden_act": activation})
    theirs = shaken(CLIPModel(config)).eval()
    model, converted = ours(transformers_clip, theirs.state_dict(), "transformers", facts=config.to_dict())
    assert [name for name in converted.unused if not name.endswith("position_ids")] == []
    ids, mask = texts()
    with torch.no_grad():
        out = theirs(input_ids=ids, attention_mask=mask, pixel_values=normalised(images()))
        torch.testing.assert_close(model.encode_image(images()), out.image_embeds, **CLOSE)
        torch.testing.assert_close(model.encode_text(ids, mask), out.text_embeds, **CLOSE)


def authors_image_features(clip, prior, instruct, pixels):
    """The released belief by its description: all tokens after the pre-norm, softmax, index weights, norms."""
    visual = clip.visual
    x = visual.conv1(pixels).flatten(2).mT
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1) + visual.positional_embedding
    x = visual.ln_pre(x)
    instruction = instruct(prior(pixels))
    belief = torch.stack([(tokens @ f).softmax(0) for tokens, f in zip(x, instruction, strict=True)])
    index = torch.stack([row.sort(descending=True).indices for row in belief])
    x = x * (belief + (index + 1.0) ** -0.5).unsqueeze(-1)
    x = x / (x**2).sum(1, keepdim=True).sqrt()
    x = visual.transformer(torch.cat([instruction.unsqueeze(1), x], 1))
    return F.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1)


def released_state(clip, prior, instruct):
    state = clip.state_dict() | {f"res_visual.{name}": value for name, value in prior.state_dict().items()}
    return state | {f"vision_proj_res.{name}": value for name, value in instruct.state_dict().items()}


def test_released_priorclip_features():
    from open_clip.modified_resnet import ModifiedResNet

    clip = open_clip_model("ViT-B-32", 3)
    torch.manual_seed(4)
    prior = shaken(ModifiedResNet([3, 4, 6, 3], 512, heads=32, image_size=224, width=64)).eval()
    instruct = torch.nn.Linear(512, 768)
    model, converted = ours(priorclip_release, released_state(clip, prior, instruct), "priorclip")
    assert converted.unused == []
    assert (converted.config.kind, converted.config.belief.compat) == ("priorclip", "released")
    pixels, (ids, mask) = images(), texts()
    with torch.no_grad():
        torch.testing.assert_close(model.prior(pixels), prior(normalised(pixels)), rtol=1e-5, atol=1e-5)
        expected = authors_image_features(clip, prior, instruct, normalised(pixels))
        torch.testing.assert_close(model.encode_image(pixels), expected, **CLOSE)
        torch.testing.assert_close(model.encode_text(ids, mask), clip.encode_text(ids, normalize=True), **CLOSE)


class AuthorsPIR(torch.nn.Module):
    """The closed-domain model by its description, with the names of its checkpoints; d = 64, small towers."""

    WIDTH, HEADS, KEPT = 64, 8, 6

    def __init__(self):
        import timm
        import torchvision
        from transformers import BertConfig, BertModel

        super().__init__()
        torch.manual_seed(5)
        d, nn = self.WIDTH, torch.nn
        self.swin = timm.create_model(
            "swin_tiny_patch4_window7_224", embed_dim=32, depths=(1, 1), num_heads=(1, 2), num_classes=0, img_size=56,
            global_pool="",
        )  # fmt: skip
        resnet = torchvision.models.resnet50(num_classes=30)
        self.conv_encoder = nn.Sequential(*list(resnet.children())[:-1])
        bert = BertConfig(
            vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96
        )
        self.text_encoder = BertModel(bert, add_pooling_layer=False)
        self.vision_proj, self.text_proj = nn.Linear(64, d), nn.Linear(64, d)
        self.conv_proj, self.head_img, self.head_txt = nn.Linear(2048, d), nn.Linear(d, d), nn.Linear(d, d)
        for part, layers in (("img", 2), ("txt", 3)):
            setattr(self, f"mapping_{part}", nn.ModuleList(nn.Linear(d, d) for _ in range(layers)))
            setattr(self, f"{part}_sa", nn.ModuleList(self.block("mhatt") for _ in range(layers)))
            setattr(self, f"{part}_ca", nn.ModuleList(self.block("mhatt_cross") for _ in range(layers)))
        self.temp, self.temp2 = nn.Parameter(torch.tensor(0.05)), nn.Parameter(torch.tensor(0.2))

    def block(self, attention):
        nn, d = torch.nn, self.WIDTH
        linears = nn.ModuleDict({f"linear_{name}": nn.Linear(d, d) for name in ("q", "k", "v", "merge")})
        ffn = nn.Sequential(nn.Linear(d, 2 * d), nn.LayerNorm(2 * d), nn.GELU(), nn.Linear(2 * d, d))
        return nn.ModuleDict({attention: linears, "ffn": ffn, "norm1": nn.LayerNorm(d), "norm2": nn.LayerNorm(d)})

    def run(self, block, query, y):
        a = block["mhatt"] if "mhatt" in block else block["mhatt_cross"]
        read = F.multi_head_attention_forward(
            query.transpose(0, 1), y.transpose(0, 1), y.transpose(0, 1), self.WIDTH, self.HEADS, None,
            torch.cat([a["linear_q"].bias, a["linear_k"].bias, a["linear_v"].bias]), None, None, False, 0.0,
            a["linear_merge"].weight, a["linear_merge"].bias, use_separate_proj_weight=True, need_weights=False,
            q_proj_weight=a["linear_q"].weight, k_proj_weight=a["linear_k"].weight, v_proj_weight=a["linear_v"].weight,
        )[0].transpose(0, 1)  # fmt: skip
        y = block["norm1"](y + read)
        return block["norm2"](y + block["ffn"](y))

    def local(self, part, tokens, signal):
        """``signal`` is the instruction, or None where the tokens drive themselves."""
        for mapping, own, cross in zip(*(getattr(self, n) for n in (f"mapping_{part}", f"{part}_sa", f"{part}_ca"))):
            x0 = tokens if signal is None else signal.expand_as(tokens)
            tokens = self.run(cross, mapping(x0), self.run(own, tokens, tokens))
        return tokens[:, 0]

    def images(self, pixels):
        tokens = self.swin(pixels).flatten(1, 2)
        tokens = self.vision_proj(torch.cat([tokens.mean(1, keepdim=True), tokens], 1))
        instruction = self.conv_proj(self.conv_encoder(pixels).flatten(1)).unsqueeze(1)
        order = (tokens @ instruction.mT)[..., 0].sort(dim=1, descending=True).indices[:, : self.KEPT]
        kept = torch.stack([row[places] for row, places in zip(tokens, order, strict=True)])
        return F.normalize(tokens[:, 0] + self.head_img(self.local("img", kept, instruction)))

    def texts(self, ids):
        tokens = self.text_proj(self.text_encoder(ids).last_hidden_state)
        return F.normalize(tokens[:, 0] + self.head_txt(self.local("txt", tokens, None)))

    def checkpoint(self):
        """The state dict by Microsoft's names for Swin, with what it stores beside the weights."""
        state = {}
        for name, value in self.state_dict().items():
            name = name.replace("swin.layers.1.downsample", "swin.layers.0.downsample")
            state[name.replace("swin.", "vision_encoder.")] = value
        state["vision_encoder.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
        return state | {"text_encoder.pooler.dense.weight": torch.zeros(64, 64)}


def test_closed_domain_pir_features():
    theirs = shaken(AuthorsPIR()).eval()
    facts = {"filter_size": theirs.KEPT, "image_res": 56, "max_tokens": 12, "head": 8}
    model, converted = ours(pir, theirs.checkpoint(), "pir", facts=facts)
    assert converted.unused == [
        "text_encoder.pooler.dense.weight",
        "vision_encoder.layers.0.blocks.0.attn.relative_position_index",
    ]
    assert (converted.config.belief.k, converted.config.pae.temporal_cycles) == (6, 3)
    pixels, (ids, _) = images(56), texts(12)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels), theirs.images(normalised(pixels)), **CLOSE)
        torch.testing.assert_close(model.encode_text(ids), theirs.texts(ids), **CLOSE)
        scales = model(pixels[:1])
    assert scales["logit_scale"].item() == pytest.approx(1 / 0.05 if theirs.temp == 0.05 else 1 / theirs.temp.item())
    assert scales["attribution_scale"].item() == pytest.approx(1 / theirs.temp2.item())
