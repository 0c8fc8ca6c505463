"""Compares the PAE layer with torch.nn.MultiheadAttention and a float64 version of the formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from priorclip.model.networks.pae import PAE, AttentionBlock, MultiHeadAttention, PAELayer


def slow_attention(mha: MultiHeadAttention, query, memory, mask=None):
    """Head by head, sample by sample, position by position."""
    d = query.shape[-1]
    size = d // mha.heads
    q, k, v = mha.query(query), mha.key(memory), mha.value(memory)
    out = torch.zeros_like(q)
    for b in range(len(q)):
        real = [place for place in range(k.shape[1]) if mask is None or mask[b, place]]
        for h in range(mha.heads):
            part = slice(h * size, (h + 1) * size)
            for i in range(q.shape[1]):
                scores = torch.stack([q[b, i, part] @ k[b, j, part] / math.sqrt(size) for j in real])
                weights = scores.exp() / scores.exp().sum()
                out[b, i, part] = sum(w * v[b, j, part] for w, j in zip(weights, real, strict=True))
    return mha.merge(out)


def slow_block(block: AttentionBlock, query, y, mask=None):
    y = F.layer_norm(
        y + slow_attention(block.attention, query, y, mask), (y.shape[-1],), block.norm1.weight, block.norm1.bias
    )
    first, norm, _, second = block.ffn
    hidden = F.layer_norm(first(y), norm.normalized_shape, norm.weight, norm.bias)
    fed = second(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))))
    return F.layer_norm(y + fed, (y.shape[-1],), block.norm2.weight, block.norm2.bias)


def slow_layer(layer: PAELayer, x, signal, mask=None):
    return slow_block(layer.cross_attention, layer.signal(signal), slow_block(layer.self_attention, x, x, mask), mask)


def random_module(module: nn.Module) -> nn.Module:
    """Float64, eval mode, and no weight is 0 or 1, which would hide a swapped norm or bias."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.double().eval()


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    return torch.randn(2, 5, 8, dtype=torch.float64)


MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def test_attention_equals_torchs_own(tokens):
    mha = random_module(MultiHeadAttention(8, 2, 0.2))
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([mha.query.weight, mha.key.weight, mha.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([mha.query.bias, mha.key.bias, mha.value.bias]))
        theirs.out_proj.weight.copy_(mha.merge.weight)
        theirs.out_proj.bias.copy_(mha.merge.bias)
    query = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = theirs(query, tokens, tokens, key_padding_mask=MASK == 0)[0]
    torch.testing.assert_close(mha(query, tokens, MASK), expected)
    torch.testing.assert_close(slow_attention(mha, query, tokens, MASK), expected)


@pytest.mark.parametrize("mask", [None, MASK])
def test_layer_is_the_papers_formula(tokens, mask):
    layer = random_module(PAELayer(8, 2, 0.2))
    signal = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(tokens, signal, mask), slow_layer(layer, tokens, signal, mask))


def test_spatial_equals_the_instruction_replicated_over_positions(tokens):
    pae = random_module(PAE(8, 2, 2, 0.2))
    instruction = torch.randn(2, 8, dtype=torch.float64)
    x, replicated = tokens, instruction[:, None].expand_as(tokens)
    for layer in pae.layers:
        x = slow_layer(layer, x, replicated)
    torch.testing.assert_close(pae(tokens, instruction), x)


def test_temporal_signal_is_the_previous_cycle(tokens):
    pae = random_module(PAE(8, 3, 2, 0.2))
    x = tokens
    for layer in pae.layers:
        x = slow_layer(layer, x, x, MASK)
    torch.testing.assert_close(pae(tokens, mask=MASK), x)


def test_padding_changes_nothing(tokens):
    pae = random_module(PAE(8, 3, 2, 0.2))
    short = pae(tokens[:, :3], mask=torch.ones(2, 3))
    noise = torch.cat([tokens[:, :3], 100 * torch.randn(2, 2, 8, dtype=torch.float64)], dim=1)
    padded = pae(noise, mask=torch.tensor([[1, 1, 1, 0, 0]] * 2))
    torch.testing.assert_close(padded[:, :3], short)


def test_dropout_acts_in_training_only(tokens):
    pae = random_module(PAE(8, 1, 2, 0.5))
    assert torch.equal(pae(tokens), pae(tokens))
    pae.train()
    assert not torch.equal(pae(tokens), pae(tokens))


def test_checkpointing_gives_the_same_gradients(tokens):
    pae = random_module(PAE(8, 2, 2, 0.0)).train()
    grads = []
    for enable in (False, True):
        pae.grad_checkpointing = enable
        pae.zero_grad()
        pae(tokens, tokens[:, 0]).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in pae.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_width_must_divide_among_heads():
    with pytest.raises(ValueError, match="width 10 cannot be divided among 4"):
        PAE(10, 1, 4, 0.0)
