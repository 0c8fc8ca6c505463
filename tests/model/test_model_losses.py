"""Losses in one process against the N x N float64 reference: values, gradients, chunks, precision, edges."""

import math

import loss_reference as reference
import pytest
import torch
from open_clip.loss import SigLipLoss

from priorclip.model.config import LossConfig, ModelConfig, add_bias
from priorclip.model.losses.attribution import AttributionLoss
from priorclip.model.losses.contrastive import ContrastiveLoss, SymmetricCrossEntropy
from priorclip.model.losses.hard_negatives import HardNegativeCrossEntropy
from priorclip.model.losses.logit_scale import clamped_exp
from priorclip.model.losses.pairs import hash_tokens, pairs_of
from priorclip.model.losses.retrieval_loss import RetrievalLoss
from priorclip.model.losses.sigmoid import SigmoidLoss


def leaves(width: int = 6, size: int = 12):
    data = reference.batch(size, width)
    image, text = data["image"].requires_grad_(), data["text"].requires_grad_()
    return image, text, torch.tensor(7.0, dtype=torch.float64, requires_grad=True), data["ids"], data["labels"]


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("chunk", [1, 5, 12, 4096])
def test_contrastive_equals_the_reference(chunk: int):
    image, text, scale, ids, _ = leaves()
    found, expected = ContrastiveLoss(chunk)(image, text, scale, ids), reference.contrastive(image, text, scale, ids)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(found, image, text, scale), gradients(expected, image, text, scale), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_contrastive_with_distinct_ids_is_clips_cross_entropy():
    image, text, scale, _, _ = leaves()
    logits, target = scale * image @ text.T, torch.arange(12)
    expected = (
        torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
    ) / 2
    torch.testing.assert_close(ContrastiveLoss()(image, text, scale, target), expected)


def test_streaming_gradient_is_the_numerical_one():
    image, text, scale, ids, _ = leaves(width=3)
    pairs = pairs_of(ids, reference.batch()["captions"])

    def losses(rows, columns, s):
        return SymmetricCrossEntropy.apply(rows, columns, s, pairs, 5)

    def weighted(rows, columns, s):
        return HardNegativeCrossEntropy.apply(rows, columns, s, pairs, 5, 0.4)

    assert torch.autograd.gradcheck(losses, (image, text, scale))  # each of the 2 B losses by itself
    assert torch.autograd.gradcheck(weighted, (image, text, scale))


@pytest.mark.parametrize("chunk", [1, 5, 4096])
def test_sigmoid_loss_equals_the_reference_and_open_clips(chunk: int):
    image, text, scale, ids, _ = leaves()
    bias = torch.tensor(-4.0, dtype=torch.float64, requires_grad=True)
    inputs = (image, text, scale, bias)
    for captions in (None, reference.batch()["captions"]):
        found = SigmoidLoss(chunk)(*inputs, ids, captions)
        expected = reference.sigmoid(*inputs, ids, captions)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for mine, theirs in zip(gradients(found, *inputs), gradients(expected, *inputs), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    # open_clip knows one text of an image, and takes equal words for a negative.
    theirs = SigLipLoss()(image, text, scale, bias)
    torch.testing.assert_close(SigmoidLoss(chunk)(*inputs, torch.arange(12)), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beta", [1e-7, 0.3, 2.0])
def test_hard_negatives_equal_the_reference(beta: float):
    image, text, scale, ids, _ = leaves()
    for captions in (None, reference.batch()["captions"]):
        found = ContrastiveLoss(5, beta)(image, text, scale, ids, captions)
        expected = reference.weighted_contrastive(image, text, scale, ids, captions, beta)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        for mine, theirs in zip(gradients(found, image, text, scale), gradients(expected, image, text, scale)):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
    plain = ContrastiveLoss(5)(image, text, scale, ids)
    assert ContrastiveLoss(5, 1e-7)(image, text, scale, ids).item() == pytest.approx(plain.item(), rel=1e-5)
    assert ContrastiveLoss(5, 0.3)(image, text, scale, ids) > plain  # hard negatives are more of the sum


def test_equal_captions_of_other_images_get_no_gradient_from_each_other():
    """Images 0 and 1 have the same caption. Ignored, only the third pair pushes them."""
    image, text, scale, _, _ = leaves(size=3)
    words = torch.tensor([[3, 8, 1, 0], [3, 8, 1, 0], [3, 8, 4, 1]])
    ids, outputs = torch.arange(3), outputs_of(image, text, scale) | {"logit_bias": torch.tensor(-2.0)}
    for kind in ("contrastive", "sigmoid"):
        pushed = {}
        for equal in ("negative", "ignored"):
            loss, _ = RetrievalLoss(kind=kind, equal_captions=equal)(outputs, ids, None, words)
            (pushed[equal],) = gradients(loss, text)
        assert not torch.allclose(pushed["negative"], pushed["ignored"])
        bias, captions = torch.tensor(-2.0), torch.tensor([1, 1, 2])  # the third shares its first two tokens only
        slow = (
            reference.sigmoid(image, text, scale, bias, ids, captions)
            if kind == "sigmoid"
            else reference.weighted_contrastive(image, text, scale, ids, captions, 0.0)
        )
        torch.testing.assert_close(pushed["ignored"], gradients(slow, text)[0], rtol=1e-6, atol=1e-8)
        # Without the third pair, nothing is left to push.
        alone = outputs_of(image[:2], text[:2], scale) | {"logit_bias": torch.tensor(-2.0)}
        loss, _ = RetrievalLoss(kind=kind, equal_captions="ignored")(alone, ids[:2], None, words[:2])
        only_positive = reference.sigmoid(image[:2], text[:2], scale, torch.tensor(-2.0), ids[:2], ids[:2] * 0)
        expected = only_positive.item() if kind == "sigmoid" else 0.0
        assert loss.item() == pytest.approx(expected, abs=1e-12)


def test_a_hash_of_tokens_is_that_of_equal_texts_only():
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(0, 50_000, (20_000, 77), generator=generator)
    texts[:, 5:] = 0  # short texts that differ in few places
    texts[1] = texts[0]
    ids = hash_tokens(texts)
    assert ids[0] == ids[1]
    assert len(ids.unique()) == len(texts.unique(dim=0))
    assert torch.equal(hash_tokens(texts.int()[:10]), ids[:10])


def test_what_a_loss_of_pairs_needs_is_asked_for():
    image, text, scale, ids, _ = leaves()
    with pytest.raises(ValueError, match=r"model\.logit_bias_init"):
        RetrievalLoss(kind="sigmoid")(outputs_of(image, text, scale), ids)
    with pytest.raises(ValueError, match="input_ids"):
        RetrievalLoss(equal_captions="ignored")(outputs_of(image, text, scale), ids)
    with pytest.raises(ValueError, match=r"contrastive loss; loss\.kind is sigmoid"):
        LossConfig(kind="sigmoid", hard_negatives=0.5)
    for wrong in ({"kind": "softmax"}, {"equal_captions": "positive"}, {"hard_negatives": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LossConfig(**wrong)


def test_the_sigmoid_loss_gives_its_model_a_bias():
    with_bias, without = ModelConfig(), ModelConfig(logit_bias_init=-3.0)
    add_bias(with_bias, LossConfig(kind="sigmoid"))
    add_bias(without, LossConfig(kind="sigmoid"))
    assert (with_bias.logit_bias_init, without.logit_bias_init) == (-10.0, -3.0)
    plain = ModelConfig()
    add_bias(plain, LossConfig())
    assert plain.logit_bias_init is None


def test_attribution_equals_the_reference():
    image, text, scale, _, labels = leaves()
    found, expected = AttributionLoss()(image, text, scale, labels), reference.attribution(image, text, scale, labels)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(gradients(found, image, text, scale), gradients(expected, image, text, scale), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_attribution_without_labels_is_zero_with_zero_gradients():
    image, text, scale, _, labels = leaves()
    loss = AttributionLoss()(image, text, scale, torch.full_like(labels, -1))
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(loss, image, text, scale))


def test_ignored_samples_get_no_gradient():
    image, text, scale, _, labels = leaves()
    grad = gradients(AttributionLoss()(image, text, scale, labels), image)[0]
    assert ((grad == 0).all(1) == (labels == -1)).all()


def test_logits_of_at_most_a_chunk_are_in_memory():
    """The largest tensor of the forward and backward passes is (B, chunk) or (N, d), never (N, N)."""
    size, width, chunk = 512, 8, 16
    image = torch.nn.functional.normalize(torch.randn(size, width), dim=-1).requires_grad_()
    text = torch.nn.functional.normalize(torch.randn(size, width), dim=-1).requires_grad_()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    ids, scale, bias = torch.arange(size), torch.tensor(10.0), torch.tensor(-10.0)
    for run in (
        lambda: ContrastiveLoss(chunk)(image, text, scale, ids),
        lambda: ContrastiveLoss(chunk, 0.3)(image, text, scale, ids, ids // 2),
        lambda: SigmoidLoss(chunk)(image, text, scale, bias, ids, ids // 2),
    ):
        largest = 0
        with Watch():
            run().backward()
        assert size * width <= largest <= size * chunk


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_computed_in_float32(dtype: torch.dtype):
    image, text, _, ids, labels = leaves()
    half = [image.detach().to(dtype), text.detach().to(dtype), torch.tensor(100.0, dtype=dtype)]
    exact = [x.double() for x in half]
    for loss, key in ((ContrastiveLoss(), ids), (AttributionLoss(), labels)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(*half, key)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), loss(*exact, key), rtol=1e-5, atol=1e-5)


def outputs_of(image, text, scale):
    return {"image_features": image, "text_features": text, "logit_scale": scale, "attribution_scale": scale + 1}


def test_retrieval_loss_weighs_its_parts():
    image, text, scale, ids, labels = leaves()
    total, parts = RetrievalLoss(contrastive=0.5, lambda_cs=3.0)(outputs_of(image, text, scale), ids, labels)
    expected = 0.5 * reference.contrastive(image, text, scale, ids) + 3 * reference.attribution(
        image, text, scale + 1, labels
    )
    torch.testing.assert_close(total, expected)
    assert set(parts) == {"contrastive", "attribution"}
    assert not any(part.requires_grad for part in parts.values())


def test_every_output_is_in_the_graph_without_attribution():
    image, text, scale, ids, _ = leaves()
    attribution_scale = torch.tensor(3.0, requires_grad=True)
    outputs = outputs_of(image, text, scale) | {"attribution_scale": attribution_scale}
    total, parts = RetrievalLoss(lambda_cs=0.0)(outputs, ids, None)
    assert torch.autograd.grad(total, attribution_scale)[0].item() == 0
    assert parts["attribution"].item() == 0


def test_one_modality_is_refused():
    image, _, scale, ids, _ = leaves()
    with pytest.raises(ValueError, match="call the model with both"):
        RetrievalLoss()(outputs_of(image, None, scale), ids)


def test_scale_is_clamped_and_its_gradient_leads_inside():
    limit = math.log(100)
    for value in (limit, limit + 0.5):
        log_scale = torch.tensor(value, requires_grad=True)
        scale = clamped_exp(log_scale, limit)
        assert scale.item() == pytest.approx(100, rel=1e-6)
        assert torch.autograd.grad(scale, log_scale)[0].item() == pytest.approx(100, rel=1e-6)  # descent lowers: passes
        assert torch.autograd.grad(-clamped_exp(log_scale, limit), log_scale)[0].item() == 0  # descent raises: stopped
    below = torch.tensor(1.0, requires_grad=True)
    for sign in (1, -1):
        grad = torch.autograd.grad(sign * clamped_exp(below, limit), below)[0]
        assert grad.item() == pytest.approx(sign * math.e, rel=1e-6)


def test_scale_over_the_limit_comes_back_by_descent():
    """From above the limit, descent reaches a loss whose minimum is at 20. A plain clamp fails here."""
    log_scale = torch.nn.Parameter(torch.tensor(6.0))
    optimizer = torch.optim.SGD([log_scale], lr=1e-4)
    for _ in range(2000):
        optimizer.zero_grad()
        (clamped_exp(log_scale, math.log(100)) - 20).square().backward()
        optimizer.step()
    assert log_scale.exp().item() == pytest.approx(20, rel=1e-2)
