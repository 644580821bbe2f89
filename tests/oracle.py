"""Ground truth: attention in float64 under a mask built from what each token is, never from the project's own blocks."""

import pytest
import torch


def attention(q, k, v, visible=None, scale=None, key_bias=None, blocks=None):
    """out and lse in float64 under visible, bool broadcastable to [B, H, S_q, S_k]; rows without a key give 0 and -inf.

    blocks: which rows of k lie together, lists of rows. A block that a query is shown nothing of then counts as one key for it.
    """
    columns = one_key_each(k, v, blocks, key_bias) if blocks is not None else None
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    if key_bias is not None:
        scores = scores + key_bias.double()[:, None, None]
    if visible is not None:
        scores = torch.where(visible, scores, torch.tensor(-torch.inf, dtype=torch.float64))
    if columns is not None and visible is not None:
        shown = torch.stack([visible[..., block].any(-1) for block in blocks], -1)
        as_one = torch.einsum("bhqd,bhkd->bhqk", q, columns[0]) * scale + columns[2][:, :, None]
        scores = torch.cat([scores, torch.where(shown, torch.tensor(-torch.inf, dtype=torch.float64), as_one)], 3)
        v = torch.cat([v, columns[1]], 2)
    peak = scores.amax(-1, keepdim=True)
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhqk,bhkd->bhqd", weights, v) / torch.where(total == 0, 1.0, total)
    return out, (total.log() + peak)[..., 0]


def one_key_each(k, v, blocks, key_bias=None):
    """Mean key and mean value [B, H, blocks, D], rounded to their dtype once, and the log of how many keys that is [B, H, blocks]; all float64.

    A key weighs exp(its bias), so that one with minus infinity, or at or below half of the lowest number of the bias's dtype, is left out.
    """
    batch, heads, seq, _ = k.shape
    weight = torch.ones(1, seq, dtype=torch.float64)
    if key_bias is not None:
        weight = torch.where(key_bias <= torch.finfo(key_bias.dtype).min / 2, 0.0, key_bias.double().exp())
    weight = weight.expand(batch, -1)
    keys, values, sizes = [], [], []
    for block in blocks:
        of_block = weight[:, block]
        size = of_block.sum(-1)
        share = (of_block / torch.where(size == 0, 1.0, size)[:, None])[:, None, :, None]
        counted = share > 0  # what is masked may be anything, NaN too
        keys.append(torch.where(counted, share * k[:, :, block].double(), 0.0).sum(2).to(k.dtype).double())
        values.append(torch.where(counted, share * v[:, :, block].double(), 0.0).sum(2).to(v.dtype).double())
        sizes.append(size.log()[:, None].expand(-1, heads))
    return torch.stack(keys, 2), torch.stack(values, 2), torch.stack(sizes, 2)


def relative_error(actual, expected):
    """L2 norm of the difference over that of what was expected."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_same_figures(one, other):
    """Plain data is the same but for the last of the digits that figures are rounded to: sums differ a little by how much is taken at once."""
    if isinstance(one, (dict, list)) and type(one) is type(other) and len(one) == len(other):
        for key in one if isinstance(one, dict) else range(len(one)):
            assert_same_figures(one[key], other[key])
    else:
        assert one == (pytest.approx(other, abs=3e-6) if isinstance(one, float) else other)
