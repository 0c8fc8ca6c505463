"""Real gloo process groups: ranks with a share of the batch give the loss and gradients of one rank with all of it.

The batches are an ordinary one and the ones that tend to break losses. The scale comes out of a clamp at its limit,
whose gradient depends on a sign: a rank that knew its own part of the gradient alone would clamp by another sign.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import loss_reference as reference
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from priorclip.model.losses import gather
from priorclip.model.losses.attribution import AttributionLoss
from priorclip.model.losses.contrastive import ContrastiveLoss
from priorclip.model.losses.logit_scale import clamped_exp
from priorclip.model.losses.sigmoid import SigmoidLoss

WIDTH = 6
WORLDS = (4, 2, 1)


@dataclass
class Case:
    """A global batch for a loss; ``bound``: largest relative error of its value and gradients."""

    loss: torch.nn.Module
    image: Tensor
    text: Tensor
    key: Tensor
    scale: float = 9.0
    bound: float = 1e-10


def cases(world: int) -> dict[str, Case]:
    data = reference.batch()
    image, text, ids, labels = data["image"], data["text"], data["ids"], data["labels"]
    contrastive, attribution = ContrastiveLoss(chunk=5), AttributionLoss()
    released, crowd = AttributionLoss(compat="released"), reference.crowd([40, 12, 8, 4])
    key, pair = torch.stack([ids, data["captions"]], 1), reference.PairLoss
    same, nothing = image[:1].expand(12, WIDTH), torch.zeros(12, WIDTH, dtype=torch.float64)
    made = {
        "contrastive": Case(contrastive, image, text, ids),
        "distinct": Case(ContrastiveLoss(), image, text, torch.arange(12)),
        "well trained": Case(contrastive, image, 0.1 * text + image, ids, scale=30.0),
        "attribution": Case(attribution, image, text, labels),  # of 4 ranks the last has no valid label
        "some rows at a time": Case(AttributionLoss(chunk=2), image, text, labels),
        "released": Case(released, image, text, labels),
        "released, unbalanced": Case(released, crowd["image"], crowd["text"], crowd["labels"]),
        "released, some rows at a time": Case(AttributionLoss(3, "released"), *crowd.values()),
        "released, a class of one rank": Case(released, image, text, torch.tensor([7] * 3 + [1, 2, 1] + [2] * 6)),
        "released, no labels": Case(released, image, text, torch.full_like(labels, -1)),
        "one class": Case(attribution, image, text, torch.where(labels >= 0, 4, -1)),
        "no labels": Case(attribution, image, text, torch.full_like(labels, -1)),
        "a class of one rank": Case(attribution, image, text, torch.tensor([7] * 3 + [1, 2, 1, 2, 1, 2, 1, 2, 1])),
        "a class of one sample": Case(attribution, image, text, torch.tensor([7] + [1] * 11)),
        "one image": Case(contrastive, image, text, torch.full_like(ids, 3)),
        "one sample a rank": Case(contrastive, image[:world], text[:world], torch.arange(world)),
        "one labelled sample a rank": Case(attribution, image[:world], text[:world], torch.arange(world) // 2),
        "one sample of one image a rank": Case(contrastive, image[:world], text[:world], torch.zeros(world).long()),
    }
    for equal in ("negative", "ignored"):
        for name, loss in (("sigmoid", SigmoidLoss(5)), ("plain", contrastive), ("hard", ContrastiveLoss(5, 0.3))):
            made[f"{name}, equal captions {equal}"] = Case(pair(loss, equal), image, text, key)
            made[f"{name}, one image, equal captions {equal}"] = Case(pair(loss, equal), image, text, 0 * key)
        one = torch.stack([torch.arange(12), torch.full((12,), 5)], 1)  # without negatives if they are ignored
        made[f"hard, equal captions only, {equal}"] = Case(pair(ContrastiveLoss(5, 0.3), equal), image, text, one)
        unsure = reference.DistributionLoss(SigmoidLoss(5), equal)
        made[f"distributions, equal captions {equal}"] = Case(unsure, image, text, key)
    half = {"scale": 100.0, "bound": 2e-3}
    for name, loss in (("sigmoid", SigmoidLoss()), ("hard", ContrastiveLoss(hard_negatives=0.3))):
        made[f"{name}, overflow"] = Case(pair(loss, "ignored"), (30 * image).half(), (30 * text).half(), key, **half)
    for name, loss, key in (("contrastive", contrastive, ids), ("attribution", attribution, labels)):
        made[f"{name}, identical features"] = Case(loss, same, same, key)
        made[f"{name}, zero features"] = Case(loss, nothing, nothing, key)
        made[f"{name}, one zero row"] = Case(loss, torch.cat([nothing[:1], image[1:]]), text, key)
        # logits of 100 * 30 * 30 = 90,000 are over float16's 65,504, and take all of bfloat16's digits
        for half, digits in ((torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)):
            bound = {"scale": 100.0, "bound": digits}
            made[f"{name}, {half}"] = Case(loss, image.to(half), text.to(half), key, **bound)
            made[f"{name}, {half}, overflow"] = Case(loss, (30 * image).to(half), (30 * text).to(half), key, **bound)
    static = {f"{name}, all classes": with_all_classes(case) for name, case in made.items()}
    return made | {name: case for name, case in static.items() if case is not None}


def with_all_classes(case: Case) -> Case | None:
    """The case with tensors that have all 12 classes, as on a GPU; None for another loss."""
    if not isinstance(case.loss, AttributionLoss):
        return None
    return replace(case, loss=AttributionLoss(case.loss.chunk, case.loss.compat, classes=12))


def outcome(case: Case, mine: slice, exact: bool = False) -> list[Tensor]:
    """The loss of some rows, and its gradients in image, text, scale, and the scale before its clamp."""
    kind = torch.float64 if exact else case.image.dtype
    image, text = (x[mine].to(kind, copy=True).requires_grad_() for x in (case.image, case.text))
    log_scale = torch.tensor(math.log(case.scale), dtype=torch.float64, requires_grad=True)
    scale = clamped_exp(log_scale, math.log(case.scale)) + 0
    scale.retain_grad()
    if exact:
        value = reference.of(case.loss, image, text, scale, case.key[mine])
    else:
        given = scale if kind == torch.float64 else scale.to(kind)
        value = case.loss(image, text, given, case.key[mine])
    if value.requires_grad:
        value.backward()
    wanted = (image, text, scale, log_scale)
    return [value.detach(), *(x.grad if x.grad is not None else torch.zeros_like(x).detach() for x in wanted)]


def not_a_number(mine: slice) -> list[bool]:
    """Tells whether a NaN in one image or one text of rank 0 reaches the losses of this rank."""
    data, seen = reference.batch(), []
    for modality in ("image", "text"):
        broken = {name: value.clone() for name, value in data.items()}
        broken[modality][2, 1] = torch.nan
        broken["key"] = torch.stack([broken["ids"], broken["captions"]], 1)
        pairs = [(reference.PairLoss(loss, "ignored"), "key") for loss in (SigmoidLoss(5), ContrastiveLoss(5, 0.3))]
        attribution = [(AttributionLoss(classes=classes), "labels") for classes in (None, 12)]
        for loss, key in ((ContrastiveLoss(chunk=5), "ids"), *attribution, *pairs):
            value = loss(broken["image"][mine], broken["text"][mine], torch.tensor(9.0), broken[key][mine])
            seen.append(bool(value.isnan()))
    return seen


def traffic(loss: torch.nn.Module, key: Tensor, mine: slice) -> dict[str, int]:
    """Counts the floating point numbers that forward and backward pass of the loss send by each collective."""
    data, sent = reference.batch(), {}
    names = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 0}
    places = {name: dist if name == "all_reduce" else gather for name in names}
    originals = {name: getattr(places[name], name) for name in names}

    def watch(name):
        def call(*arguments, **options):
            tensor = arguments[names[name]]
            if tensor.is_floating_point():
                sent[name] = sent.get(name, 0) + tensor.numel()
            return originals[name](*arguments, **options)

        return call

    for name in names:
        setattr(places[name], name, watch(name))
    image, text = data["image"][mine].requires_grad_(), data["text"][mine].requires_grad_()
    loss(image, text, torch.tensor(9.0, requires_grad=True), key[mine]).backward()
    for name in names:
        setattr(places[name], name, originals[name])
    return sent


def work(rank: int, folder: str) -> None:
    """One of four processes: the first is in all three worlds in turn, the last two only in the world of 4."""
    torch.set_num_threads(1)
    for world in (world for world in WORLDS if rank < world):
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world)
        found, data = {}, reference.batch()
        for name, case in cases(world).items():
            size = len(case.key)
            found[name] = outcome(case, slice(rank * size // world, (rank + 1) * size // world))
        mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
        found["not a number"] = not_a_number(mine)
        losses = (ContrastiveLoss(), data["ids"]), (AttributionLoss(), data["labels"])
        found["traffic"] = [traffic(loss, key, mine) for loss, key in losses]
        torch.save(found, f"{folder}/{world}-{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of each rank of each world. The ranks are forks of a process that has imported only torch."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.set_forkserver_preload(["torch"])
    mp.start_processes(work, (str(folder),), nprocs=max(WORLDS), start_method="forkserver")
    return folder


@pytest.fixture(params=WORLDS)
def found(request: pytest.FixtureRequest, worlds: Path) -> list[dict]:
    """The results of each rank of a world."""
    world = request.param
    return [torch.load(worlds / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


def test_ranks_together_equal_one_process(found: list[dict]):
    world = len(found)
    for name, case in cases(world).items():
        value, image, text, scale, log_scale = outcome(case, slice(None), exact=True)
        ranks = [rank[name] for rank in found]
        # A rank's gradient of its features is that of the sum over ranks: averaging divides by the world size.
        together = [torch.cat([rank[part] for rank in ranks]).double() / world for part in (1, 2)]
        pairs = [("loss", torch.stack([rank[0] for rank in ranks]).double().mean(), value),
                 ("image", together[0], image), ("text", together[1], text)]  # fmt: skip
        pairs += [("scale", rank[3], scale) for rank in ranks] + [("log scale", rank[4], log_scale) for rank in ranks]
        for part, mine, wanted in pairs:
            error = (mine - wanted).abs().max().item()
            assert error <= case.bound * max(1.0, wanted.abs().max().item()), f"{name}, {part}: wrong by {error}"


def test_no_rank_hides_a_nan(found: list[dict]):
    assert all(all(rank["not a number"]) for rank in found)


def test_what_travels(found: list[dict]):
    world, classes, size = len(found), 3, 12
    for rank in found:
        contrastive, attribution = rank["traffic"]
        if world == 1:
            assert contrastive == attribution == {}
            continue
        # Texts to all ranks, their gradients back, and a few numbers a text; the images stay where they are.
        assert contrastive == {
            "all_gather": size * WIDTH // world + size // world,
            "reduce_scatter": size * WIDTH,
            "all_reduce": 3 * size + 1,
        }
        # Sums of the classes of two modalities, there and back, and the gradient of the scale.
        assert attribution == {"all_reduce": 2 * 2 * classes * WIDTH + 1}
