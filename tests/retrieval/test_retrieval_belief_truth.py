"""`retrieval belief-truth`: from drawn shards with masks and a tiny model to report, table and picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_calls import export
from PIL import Image
from sklearn.metrics import average_precision_score
from small_galleries import TestSet

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main as data_shards
from priorclip.data_shards.images.transforms import eval_transform
from priorclip.data_shards.synthetic.truth import draw_truth
from priorclip.model import BeliefConfig, from_pretrained
from priorclip.model.networks.rivals import GivenBelief
from priorclip.retrieval.__main__ import main
from priorclip.retrieval.encoder import Encoder
from priorclip.retrieval.localization import interventions
from priorclip.retrieval.localization.interventions import believing

COUNT, SIDE = 16, 64


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "shards"
    words = ["pack", "--source", "synthetic", "--count", str(COUNT), "--size", str(SIDE), "--masks", "true"]
    assert data_shards([*words, "--workers", "1", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def model(test_set: TestSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(test_set, tmp_path_factory.mktemp("truth") / "export", 5)


def run(model: Path, scenes: Path, output: Path, *more: str) -> dict[str, Any]:
    words = ["--model", str(model), "--data", str(scenes), "--output", str(output), "--device", "cpu"]
    assert main(["belief-truth", *words, *more]) == 0
    return json.loads((output / "belief-truth.json").read_text())


@pytest.fixture(scope="module")
def measured(model: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    output = tmp_path_factory.mktemp("measured")
    return run(model, scenes, output, "--bootstrap", "50", "--count", "3"), output


def pixels_of(scenes: Path) -> torch.Tensor:
    shards = ShardSet(str(scenes))
    return torch.stack([torch.from_numpy(eval_transform(shards.read(n).image, 128)) for n in range(COUNT)])


def test_maps_are_measured_against_the_pixels(measured: tuple[dict[str, Any], Path], model: Path, scenes: Path) -> None:
    """The reference draws the truth again and measures pixel by pixel, each weighed by its share of the thing."""
    report, _ = measured
    belief = from_pretrained(model).eval().double().belief_map(pixels_of(scenes)).detach().numpy()
    assert report["grid"] == [4, 4]
    wanted = {"pointing": [], "average_precision": [], "energy": []}
    areas = []
    for number in range(COUNT):
        mask = np.round(draw_truth(0, number, SIDE).mask * 255).ravel() / 255
        wide = np.kron(belief[number], np.ones((16, 16))).ravel()
        wanted["pointing"].append(mask[wide == wide.max()].mean())
        wanted["energy"].append((wide * mask).sum() / wide.sum())
        weight = np.concatenate([mask, 1 - mask])
        truth = np.repeat([1, 0], mask.size)
        wanted["average_precision"].append(average_precision_score(truth, np.tile(wide, 2), sample_weight=weight))
        areas.append(mask.mean())
    assert report["images"] == COUNT
    assert report["without_truth"] == []
    for measure, values in wanted.items():
        assert report["maps"]["belief"][measure]["mean"] == pytest.approx(100 * np.mean(values), abs=1e-6)
        assert report["maps"]["chance"][measure]["mean"] == pytest.approx(100 * np.mean(areas), abs=1e-6)
        low, high = report["maps"]["belief"][measure]["interval"]
        assert low < report["maps"]["belief"][measure]["mean"] < high
    same_order = ("pointing", "average_precision")
    assert all(report["maps"]["belief"][each] == report["maps"]["ranks"][each] for each in same_order)
    assert set(report["maps"]) == {"chance", "centre", "belief", "ranks", "soft", "attention", "gradient"}


def test_the_models_own_recall_is_that_of_evaluate(
    measured: tuple[dict[str, Any], Path], model: Path, scenes: Path, tmp_path: Path
) -> None:
    report, _ = measured
    words = ["--model", str(model), "--data", str(scenes), "--output", str(tmp_path / "report.json")]
    assert main(["evaluate", *words, "--bootstrap", "50", "--device", "cpu"]) == 0
    wanted = json.loads((tmp_path / "report.json").read_text())
    own = report["recalls"]["own"]
    assert own["mean_recall"]["mean"] == pytest.approx(wanted["mean_recall"])
    assert own["mean_recall"]["interval"] == pytest.approx(wanted["intervals"]["mean_recall"])
    assert {name: own[name] for name in ("i2t_r1", "t2i_r10")} == pytest.approx(
        {name: wanted[name] for name in ("i2t_r1", "t2i_r10")}
    )
    for name in ("mask", "complement", "noise"):
        row = report["recalls"][name]
        assert row["less_own"]["mean"] == pytest.approx(row["mean_recall"]["mean"] - own["mean_recall"]["mean"])
        assert row["less_own"]["interval"][0] <= row["less_own"]["mean"] <= row["less_own"]["interval"][1]


def test_what_takes_the_place_of_belief(
    model: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The true mask as drawn, what it leaves, and noise that is neither."""
    given: list[torch.Tensor | None] = []
    measure = interventions.hits_of

    def note(encoder: Any, batches: Any, texts: torch.Tensor, shares: torch.Tensor | None) -> Any:
        given.append(shares)
        return measure(encoder, batches, texts, shares)

    monkeypatch.setattr(interventions, "hits_of", note)
    run(model, scenes, tmp_path / "out", "--bootstrap", "0")
    own, mask, complement, noise = given
    assert own is None
    assert mask is not None
    drawn = [np.round(draw_truth(0, number, SIDE).mask * 255).astype(np.float64) / 255 for number in range(COUNT)]
    cells = [each.reshape(4, 16, 4, 16).mean((1, 3)).ravel() for each in drawn]
    assert mask.numpy() == pytest.approx(np.stack(cells), abs=1e-9)
    assert torch.equal(complement, 1 - mask)
    assert not torch.allclose(noise, mask, atol=0.1)
    assert len(noise.unique()) == noise.numel()


def test_belief_is_replaced_for_as_long_as_asked(model: Path, scenes: Path) -> None:
    """Given the model's own factors, the features stay; given others, they change; afterwards its own are back."""
    encoder = Encoder.load(model, "cpu")
    pixels = pixels_of(scenes)[:4]
    own = encoder(images=pixels)["image_features"]

    class Own(torch.nn.Module):
        def forward(self, tokens: torch.Tensor, instruction: torch.Tensor) -> torch.Tensor:
            scores = torch.einsum("bld,bd->bl", tokens.float(), instruction.float())
            ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1
            return scores.softmax(1) + ranks**-0.5

    with believing(encoder.model, Own()):  # type: ignore[arg-type]
        torch.testing.assert_close(encoder(images=pixels)["image_features"], own)
    given = GivenBelief()
    given.shares = torch.rand(4, 16, generator=torch.Generator().manual_seed(0))
    with believing(encoder.model, given):
        assert not torch.allclose(encoder(images=pixels)["image_features"], own, atol=1e-4)
    assert torch.equal(encoder(images=pixels)["image_features"], own)


def test_table_and_picture(measured: tuple[dict[str, Any], Path]) -> None:
    report, output = measured
    text = (output / "belief-truth.md").read_text()
    chance = report["maps"]["chance"]["energy"]
    assert f"| chance | {chance['mean']:.1f} [{chance['interval'][0]:.1f}" in text
    assert f"| the true mask | {report['recalls']['mask']['mean_recall']['mean']:.1f}" in text
    page = Image.open(output / "belief-truth.png")
    assert page.size == (14 + 7 * 190, 30 + 14 + 3 * (176 + 45 + 14))
    columns = [np.asarray(page)[44 : 44 + 176, 14 + column * 190 : 190 + column * 190] for column in range(7)]
    first = int(np.random.default_rng(0).permutation(COUNT)[:3].min())
    mask = np.asarray(Image.fromarray(draw_truth(0, first, SIDE).mask > 0.5).resize((176, 176)))
    assert columns[1][~mask].max() <= 255 * 0.3 + 1  # dark where the mask is not
    assert np.array_equal(columns[1][mask], columns[0][mask])


@pytest.mark.parametrize("kind", ["clip", "hard"])
def test_other_models(kind: str, test_set: TestSet, scenes: Path, tmp_path: Path) -> None:
    """A plain CLIP has a gradient only, and no belief to replace. Hard belief is given the k highest places."""
    changes: dict[str, Any] = {"kind": "clip"} if kind == "clip" else {"belief": BeliefConfig(mode="hard", k=4)}
    made = export(test_set, tmp_path / "export", 6, **changes)
    report = run(made, scenes, tmp_path / "out", "--limit", "8", "--bootstrap", "0", "--replace", "mask,noise")
    if kind == "clip":
        assert set(report["maps"]) == {"chance", "centre", "gradient"}
        assert "recalls" not in report
    else:
        assert set(report["recalls"]) == {"own", "mask", "noise"}
        assert "interval" not in report["recalls"]["own"]["mean_recall"]
        assert report["belief"] == "hard"


def test_data_without_masks_is_refused(
    model: Path, test_set: TestSet, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = ["belief-truth", "--model", str(model), "--output", str(tmp_path / "out")]
    for data in (["--data", str(test_set.shards)], ["--data", str(test_set.json), "--images", str(test_set.images)]):
        assert main([*base, *data]) == 2
        assert "pack --source synthetic --masks true" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as ended:
        main([*base, "--data", str(test_set.shards), "--replace", "truth"])
    assert ended.value.code == 2
    assert "'truth' is no belief; the beliefs are mask, complement, noise" in capsys.readouterr().err
