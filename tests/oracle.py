"""Ground truth: attention in float64 under a mask built from what each token is, never from the project's own blocks."""

import torch


def attention(q, k, v, visible=None, scale=None, key_bias=None):
    """out and lse in float64 under visible, bool broadcastable to [B, H, S_q, S_k]; rows without a key give 0 and -inf."""
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if key_bias is not None:
        scores = scores + key_bias.double()[:, None, None]
    if visible is not None:
        scores = torch.where(visible, scores, torch.tensor(-torch.inf, dtype=torch.float64))
    peak = scores.amax(-1, keepdim=True)
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhqk,bhkd->bhqd", weights, v) / torch.where(total == 0, 1.0, total)
    return out, (total.log() + peak)[..., 0]


def relative_error(actual, expected):
    """L2 norm of the difference over that of what was expected."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))
