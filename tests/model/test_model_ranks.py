"""Real gloo process groups: ranks with a share of the batch each give the loss and gradients of one with all of it."""

from pathlib import Path

import loss_reference as reference
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model.losses import AttributionLoss, ContrastiveLoss

SCALE = 9.0


def cases() -> dict[str, tuple[torch.nn.Module, torch.Tensor]]:
    data = reference.batch()
    labels = data["labels"]
    return {
        "contrastive": (ContrastiveLoss(chunk=5), data["ids"]),
        "distinct": (ContrastiveLoss(), torch.arange(12)),
        "attribution": (AttributionLoss(), labels),  # of 4 ranks the last has no valid label
        "one class": (AttributionLoss(), torch.where(labels >= 0, 4, -1)),
        "no labels": (AttributionLoss(), torch.full_like(labels, -1)),
    }


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    data, found = reference.batch(), {}
    mine = slice(rank * 12 // world, (rank + 1) * 12 // world)
    for name, (loss, key) in cases().items():
        image, text = data["image"][mine].requires_grad_(), data["text"][mine].requires_grad_()
        scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
        value = loss(image, text, scale, key[mine])
        value.backward()
        found[name] = [value.detach(), image.grad, text.grad, scale.grad]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_equal_one_process(world: int, tmp_path: Path):
    mp.spawn(work, (world, str(tmp_path)), nprocs=world)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    data = reference.batch()
    for name, (loss, key) in cases().items():
        image, text = data["image"].requires_grad_(), data["text"].requires_grad_()
        scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
        function = reference.contrastive if isinstance(loss, ContrastiveLoss) else reference.attribution
        expected = function(image, text, scale, key)
        wanted = (
            torch.autograd.grad(expected, (image, text, scale), allow_unused=True, materialize_grads=True)
            if (expected.requires_grad)
            else [torch.zeros_like(x) for x in (image, text, scale)]
        )
        parts = [torch.stack([rank[name][i] for rank in found]) for i in (0, 3)]
        exact = {"rtol": 0, "atol": 1e-10}
        torch.testing.assert_close(parts[0].mean(), expected.detach(), **exact, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(parts[1].mean(), wanted[2], **exact)
        for modality in (1, 2):  # a rank's gradient is that of the sum over ranks; averaging divides by the world
            together = torch.cat([rank[name][modality] for rank in found]) / world
            torch.testing.assert_close(together, wanted[modality - 1], **exact, msg=lambda m, n=name: f"{n}: {m}")
