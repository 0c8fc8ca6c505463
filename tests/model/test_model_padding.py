"""Padding that no text of a batch needs is cut, and no feature, gradient or dropout draw changes by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import BERT, CLIP_TEXT, tiny
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from priorclip.model import build_model
from priorclip.model.config import PAEConfig, TextConfig
from priorclip.model.encoders import padding
from priorclip.model.encoders.padding import MASKED, cut_padding, kept_length
from priorclip.model.encoders.text import TextEncoder

LENGTHS = (5, 2, 11)
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 40, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "embedding_size": 32,
    "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 2, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def texts(width: int = 20) -> tuple[Tensor, Tensor]:
    """Token ids and mask (3, width) of texts of 5, 2 and 11 tokens; the last of each is the end of text."""
    draw = torch.Generator().manual_seed(3)
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(3, 60, (length,), generator=draw)
        ids[row, length - 1] = 2
        mask[row, :length] = 1
    return ids, mask


def small(name: str) -> TextConfig:
    known = AutoConfig.for_model(name).to_dict()
    sizes = {key: value for key, value in SIZES.items() if key in known}
    return TextConfig(config={"model_type": name, **sizes}, context_length=20, pooling="mean")


def seen_lengths(model: torch.nn.Module) -> list[int]:
    """A list that gets the number of tokens of each later call of the model's text encoder."""
    found: list[int] = []
    hook = lambda _, args, kwargs: found.append(kwargs["input_ids"].shape[1])  # noqa: E731
    model.text.model.register_forward_pre_hook(hook, with_kwargs=True)
    return found


def test_a_batch_is_cut_after_its_longest_text_to_a_multiple_of_eight() -> None:
    ids, mask = texts()
    assert kept_length(mask) == 16  # the longest has 11
    assert [part.shape for part in cut_padding(ids, mask)] == [(3, 16), (3, 16)]
    assert kept_length(mask[:2]) == 8
    assert kept_length(torch.ones_like(mask)) == 20  # never above what there is
    assert kept_length(torch.zeros_like(mask)) == 8  # padding rows of an evaluation
    assert kept_length(mask.flip(1)) == 20  # padding on the left is kept


@pytest.mark.parametrize("name", MASKED)
def test_no_feature_of_a_named_architecture_reads_padding(name: str) -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(small(name)).eval()
    assert encoder.cuts_padding
    ids, mask = texts()
    cut_ids, cut_mask = cut_padding(ids, mask)
    with torch.no_grad():
        whole = encoder.pool(encoder.states(ids, mask), mask)
        cut = encoder.pool(encoder.states(cut_ids, cut_mask), cut_mask)
    torch.testing.assert_close(cut, whole, rtol=0, atol=2e-6)
    assert (whole[0] - whole[1]).abs().max() > 1e-3  # the texts differ, so equal features say something


def test_other_architectures_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an architecture that is not in the list nobody has checked that it never reads padding."""
    monkeypatch.setattr(padding, "MASKED", tuple(name for name in MASKED if name != "bert"))
    model = build_model(tiny("priorclip")).eval()
    found = seen_lengths(model)
    model(input_ids=texts()[0], attention_mask=texts()[1])
    assert found == [20]


@pytest.mark.parametrize("kind", ["priorclip", "prioritr", "clip"])
@pytest.mark.parametrize(("architecture", "pooling"), [(BERT, "mean"), (BERT, "cls"), (CLIP_TEXT, "eos")])
def test_features_and_gradients_of_a_model_are_those_of_the_padded_batch(
    kind: str, architecture: dict, pooling: str
) -> None:
    torch.manual_seed(0)
    text = TextConfig(config=architecture, context_length=20, pooling=pooling)  # type: ignore[arg-type]
    model = build_model(tiny(kind, text=text)).train()
    ids, mask = texts()
    weights = torch.randn(3, 16)
    found = seen_lengths(model)

    def gradients(features: Tensor) -> list[Tensor]:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.autograd.grad((features * weights).sum(), parameters, allow_unused=True, materialize_grads=True)  # type: ignore[return-value]

    cut, whole = model(input_ids=ids, attention_mask=mask)["text_features"], model.encode_text(ids, mask)
    assert found == [16, 20]
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-6)
    for one, other in zip(gradients(cut), gradients(whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "text", "pae"),
    [
        ("priorclip", {"hidden_dropout_prob": 0.3}, 0.0),
        ("priorclip", {"attention_probs_dropout_prob": 0.3}, 0.0),
        ("prioritr", {}, 0.3),
    ],
)
def test_a_model_that_draws_dropout_draws_the_same_in_training(kind: str, text: dict, pae: float) -> None:
    torch.manual_seed(0)
    settings = tiny(kind, pae=PAEConfig(spatial_layers=1, temporal_cycles=2, heads=2, dropout=pae))
    settings.text.config = {**BERT, **text}
    model = build_model(settings).train()
    ids, mask = texts()
    found = seen_lengths(model)
    torch.manual_seed(7)
    cut = model(input_ids=ids, attention_mask=mask)["text_features"]
    torch.manual_seed(7)
    whole = model.encode_text(ids, mask)
    assert found == [20, 20]
    assert torch.equal(cut, whole)
    model.eval()
    model(input_ids=ids, attention_mask=mask)
    assert found[-1] == 16  # an evaluation draws nothing


def test_a_frozen_encoder_is_cut_in_training_whatever_its_dropout() -> None:
    settings = tiny("priorclip")
    settings.text.config, settings.text.trainable = {**BERT, "hidden_dropout_prob": 0.3}, False
    model = build_model(settings).train()
    found = seen_lengths(model)
    model(input_ids=texts()[0], attention_mask=texts()[1])
    assert found == [16]


def test_remembered_features_are_found_again_whatever_the_batch_was_cut_to(tmp_path: Path) -> None:
    """The name of an entry is a hash of the padded text, so a short text is found beside a long one and alone."""
    torch.manual_seed(0)
    settings = tiny("prioritr")
    settings.text.trainable, settings.text.remember = False, str(tmp_path)
    model = build_model(settings).eval()
    ids, mask = texts()
    found = seen_lengths(model)
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask)["text_features"]
        alone = model(input_ids=ids[1:2], attention_mask=mask[1:2])["text_features"]
        plain = build_model(tiny("prioritr")).eval()
        plain.load_state_dict(model.state_dict())
        expected = plain.encode_text(ids, mask)
    assert found == [16]  # the second call reads the cache
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone, expected[1:2], rtol=0, atol=1e-6)


def test_a_mask_without_values_is_not_cut() -> None:
    """Memory and FLOPs are counted with fake tensors and on the meta device."""
    ids, mask = texts()
    mode = FakeTensorMode()
    assert [part.shape for part in cut_padding(mode.from_tensor(ids), mode.from_tensor(mask))] == [(3, 20), (3, 20)]
    assert [part.shape for part in cut_padding(ids.to("meta"), mask.to("meta"))] == [(3, 20), (3, 20)]
