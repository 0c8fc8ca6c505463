"""Each ablation changes only its own part and is an option of all trainings; errors name bad values."""

from __future__ import annotations

from itertools import cycle
from operator import attrgetter
from typing import Any

import loss_reference as reference
import pytest
import torch
from tiny_models import tiny

from priorclip.common.options import parse, parse_command
from priorclip.finetune.commands import COMMANDS, DEFAULTS
from priorclip.model.build import build_model, parameter_groups
from priorclip.model.config import BeliefConfig, EncoderConfig, FusionConfig, LossConfig, ModelConfig, PAEConfig
from priorclip.model.export.folder import save_pretrained
from priorclip.model.losses import retrieval_loss as losses
from priorclip.model.losses.attribution import AttributionLoss
from priorclip.model.losses.contrastive import ContrastiveLoss
from priorclip.model.losses.retrieval_loss import RetrievalLoss
from priorclip.pretrain.commands import PretrainConfig, model_defaults

REQUIRED = ["--run.dir", "runs/x", "--data.shards", "data/x"]
ABLATIONS: dict[str, Any] = {
    "model.belief.mode": "hard",
    "model.belief.k": 5,
    "model.belief.compat": "released",
    "model.pae.spatial_layers": 3,
    "model.pae.temporal_cycles": 1,
    "model.prior.name": "convnext_tiny",
    "model.learn_logit_scale": False,
    "model.learn_attribution_scale": False,
    "model.shared_scale": True,
    "loss.contrastive": 0.0,
    "loss.lambda_cs": 0.25,
    "loss.shared_captions": False,
    "loss.compat": "released",
}
BAD = {
    "belief.mode": ["--model.belief.mode", "firm"],
    "belief.k": ["--model.belief.mode", "hard", "--model.belief.k", "0"],
    "belief.compat": ["--model.belief.compat", "new"],
    "pae.spatial_layers": ["--model.pae.spatial_layers", "-1"],
    "pae.temporal_cycles": ["--model.pae.temporal_cycles", "-1"],
    "pae.dropout": ["--model.pae.dropout", "1"],
    "fusion.heads": ["--model.fusion.heads", "0"],
    "projection": ["--model.prior.projection", "0"],
    "loss.contrastive": ["--loss.contrastive", "-1"],
    "loss.lambda_cs": ["--loss.lambda_cs", "inf"],
    "loss.contrastive and loss.lambda_cs": ["--loss.contrastive", "0", "--loss.lambda_cs", "0"],
    "loss.chunk": ["--loss.chunk", "0"],
    "loss.compat": ["--loss.compat", "theirs"],
}


def command_line(command: str, options: list[str], export: Any = None) -> Any:
    if command == "pretrain":
        return parse(PretrainConfig, [*REQUIRED, *options], prog="pretrain", defaults=model_defaults)
    start = ["--init_from", str(export)] if command == "instruct" else []
    words = [command, *REQUIRED, *start, *options]
    return parse_command(COMMANDS, words, prog="finetune", defaults=DEFAULTS)[1]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    model = build_model(tiny())
    return save_pretrained(model.state_dict(), model.config, tmp_path_factory.mktemp("export") / "model")


@pytest.mark.parametrize("command", ["pretrain", "instruct", "closed"])
def test_every_ablation_is_an_option_of_every_training(command: str, export):
    words = [word for key, value in ABLATIONS.items() for word in (f"--{key}", str(value).lower())]
    config = command_line(command, words, export)
    for key, wanted in ABLATIONS.items():
        part, _, name = key.rpartition(".")
        assert getattr(attrgetter(part)(config), name) == wanted, (command, key)


@pytest.mark.parametrize(("command", "named"), zip(cycle(["pretrain", "closed"]), BAD, strict=False))
def test_a_bad_value_is_an_error_that_names_the_option(command: str, named: str, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line(command, BAD[named])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


def test_an_unknown_prior_is_an_error_that_names_the_nearest():
    with pytest.raises(ValueError, match=r"no encoder 'resnet51': did you mean .*resnet50"):
        build_model(tiny(prior=EncoderConfig(name="resnet51")))
    with pytest.raises(ValueError, match=r"'resnet10t' has no weights 'mine': it has c3_in1k"):
        build_model(tiny(prior=EncoderConfig(name="resnet10t.mine")))


def images(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def lengths_read(kind: str, belief: BeliefConfig) -> int:
    """Number of tokens after belief, for an image of 4 x 4 patches."""
    model = build_model(tiny(kind, belief=belief)).eval()
    seen: list[int] = []
    layers = model.visual.encoder.model.blocks if kind == "priorclip" else model.spatial.layers
    layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    model.encode_image(images())
    return seen[0]


@pytest.mark.parametrize(("kind", "prefix"), [("priorclip", 2), ("prioritr", 0)])  # instruction and class token
def test_hard_belief_keeps_k_tokens_and_the_others_keep_all(kind: str, prefix: int):
    for mode in ("soft", "none"):
        assert lengths_read(kind, BeliefConfig(mode=mode)) == 16 + prefix
    assert lengths_read(kind, BeliefConfig(mode="hard", k=5)) == 5 + prefix


def test_belief_modes_share_weights_and_differ_in_features():
    torch.manual_seed(0)
    first = build_model(tiny()).state_dict()
    features = []
    for belief in (
        BeliefConfig(),
        BeliefConfig(mode="hard", k=5),
        BeliefConfig(mode="none"),
        BeliefConfig(compat="released"),
    ):
        model = build_model(tiny(belief=belief)).eval()
        model.load_state_dict(first)
        features.append(model.encode_image(images()).detach())
    for a in range(4):
        for b in range(a):
            assert not torch.allclose(features[a], features[b], atol=1e-4), (a, b)


def test_pae_layers_and_cycles_are_counted_apart():
    def size(**changes: int) -> int:
        pae = PAEConfig(**{"spatial_layers": 1, "temporal_cycles": 2, "heads": 2, **changes})
        return sum(parameter.numel() for parameter in build_model(tiny("prioritr", pae=pae)).parameters())

    layer = size(spatial_layers=2) - size()
    assert layer > 0
    assert size(spatial_layers=4) - size() == size(temporal_cycles=5) - size() == 3 * layer
    model = build_model(tiny("prioritr", pae=PAEConfig(spatial_layers=3, temporal_cycles=1, heads=2)))
    assert (len(model.spatial.layers), len(model.temporal.layers)) == (3, 1)


def test_prior_by_name():
    model = build_model(tiny(prior=EncoderConfig(name="test_resnet", image_size=32)))
    assert type(model.prior.model).__name__ == "ResNet"
    assert model.encode_image(images()).shape == (3, 16)


def one_step(config: ModelConfig, loss: LossConfig) -> Any:
    torch.manual_seed(0)
    model = build_model(config)
    optimizer = torch.optim.SGD(parameter_groups(model, 0.0), lr=0.5)
    objective = RetrievalLoss(**vars(loss))
    ids = torch.arange(1, 10).expand(4, -1) + torch.arange(4)[:, None]
    outputs = model(images(4), ids, torch.ones_like(ids))
    objective(outputs, torch.tensor([0, 1, 1, 3]), torch.tensor([0, 0, 1, -1]))[0].backward()
    optimizer.step()
    return model


def test_a_fixed_temperature_has_no_gradient_and_stays():
    both = LossConfig(lambda_cs=1.0)
    learned = one_step(tiny(), both)
    fixed = one_step(tiny(learn_logit_scale=False), both)
    start = torch.tensor([1 / 0.07]).log()
    assert not torch.equal(learned.logit_scale.detach(), start)
    assert fixed.logit_scale.grad is None
    assert torch.equal(fixed.logit_scale.detach(), start)
    assert torch.equal(fixed.attribution_scale, learned.attribution_scale)  # and nothing else changes
    assert torch.equal(fixed.image_projection.weight, learned.image_projection.weight)
    still = one_step(tiny(learn_attribution_scale=False), both)
    assert still.attribution_scale.grad is None
    assert torch.equal(still.logit_scale, learned.logit_scale)


def outputs_and_ids() -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    data = reference.batch()
    scales = {"logit_scale": torch.tensor(9.0), "attribution_scale": torch.tensor(4.0)}
    outputs = {"image_features": data["image"], "text_features": data["text"], **scales}
    return {name: value.double().requires_grad_() for name, value in outputs.items()}, data["ids"], data["labels"]


def test_a_loss_of_weight_zero_is_not_there():
    outputs, ids, labels = outputs_and_ids()
    image, text, scale, attribution_scale = outputs.values()
    contrastive = ContrastiveLoss()(image, text, scale, ids)
    attribution = AttributionLoss()(image, text, attribution_scale, labels)
    for weights, wanted in (
        ((1.0, 0.0), contrastive),
        ((0.0, 2.0), 2 * attribution),
        ((0.5, 2.0), 0.5 * contrastive + 2 * attribution),
    ):
        total, parts = RetrievalLoss(*weights)(outputs, ids, labels)
        torch.testing.assert_close(total, wanted, rtol=1e-12, atol=1e-12)
        assert (parts["contrastive"] == 0) == (weights[0] == 0)
        assert (parts["attribution"] == 0) == (weights[1] == 0)
        mine = torch.autograd.grad(total, list(outputs.values()), retain_graph=True)  # every scale is in the graph
        theirs = torch.autograd.grad(
            wanted, list(outputs.values()), allow_unused=True, materialize_grads=True, retain_graph=True
        )
        for found, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def apart(outputs: dict[str, torch.Tensor], ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return RetrievalLoss(shared_captions=False)(outputs, ids, labels)[0]


def test_without_shared_captions_every_caption_is_for_its_pair_alone():
    outputs, ids, labels = outputs_and_ids()
    image, text, scale, _ = outputs.values()
    wanted = reference.contrastive(image, text, scale, torch.arange(12))
    torch.testing.assert_close(apart(outputs, ids, labels), wanted)
    shared = RetrievalLoss()(outputs, ids, labels)[0]
    torch.testing.assert_close(shared, reference.contrastive(image, text, scale, ids))
    assert abs(float((shared - wanted).detach())) > 1e-3


def test_without_shared_captions_pairs_of_other_ranks_are_others(monkeypatch):
    ids = torch.zeros(6, dtype=torch.long)
    found = []
    for rank in range(3):
        monkeypatch.setattr(losses, "rank", lambda rank=rank: rank)
        found.append(losses.pair_ids(ids))
    assert torch.equal(torch.cat(found), torch.arange(18))


def test_bad_values_in_code_are_named_too():
    with pytest.raises(ValueError, match=r"fusion.dropout must lie in \[0, 1\)"):
        FusionConfig(dropout=-0.1)
    with pytest.raises(ValueError, match=r"fusion\.width must be at least 1"):
        FusionConfig(width=0)
    with pytest.raises(ValueError, match="embed_dim must be at least 1"):
        ModelConfig(embed_dim=0)
