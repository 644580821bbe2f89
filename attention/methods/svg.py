"""Sparse VideoGen (SVG): every head is spatial or temporal, and shows which on a sample of its rows.

Paper: arXiv 2502.01776 v2 (ICML 2025), sections 3 and 4, algorithm 1. Authors' code: svg-project/Sparse-VideoGen at 5ce7b01.

A spatial head attends to a band of neighbouring tokens in frame-major order (v = frame x tokens_per_frame + patch), a
temporal head to a band in token-major order (u = patch x frames + frame). Both always keep the text and the first
frame. Where paper and code differ this follows the paper:
- Rows are sampled over the whole sequence; the code samples the first 10,000, since it materialises their masks.
- The masks profiled are the masks executed; the code profiles fixed bands, whatever the budget.
- The first frame is kept for both kinds of head; the code pins the first tokens after reordering, which for
  temporal heads is not frame 0. Here frame 0 is a section of its own in the key order, so it is a range of columns.
- The band's width is the one whose blocks come nearest to the asked sparsity, sinks included; the code's formula
  leaves the first frame out of the budget.
- Nothing is moved in memory: an order is a table of rows that the kernel reads.
One choice is ours: rows are drawn one from each of equal strata of the sequence, so that a small sample covers it.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from ... import kernels
from ...kernels import BlockMask, SparsePlan, TokenOrder
from ..budget import BLOCK_K, BLOCK_Q, limit_notes, pairs_allowed, pairs_of_sinks
from ..call import AttentionCall, Dense
from ..config import Automatic, MethodConfig
from ..layout import VideoLayout, in_sections
from ..record import Figures
from ..sampling import sampled_rows
from ..schedule import Schedule
from ..session import Found, LayerState, Session

NAME = "SVG"
LEAST_WARMUP = 0
SPATIAL, TEMPORAL = 0, 1
# What a loaded pattern brings along: nothing, since head types hold at any sparsity.
PATTERN_SETTINGS: tuple[str, ...] = ()


@dataclass(frozen=True)
class SvgConfig(MethodConfig):
    """SVG's knobs. sampled_rows: how many rows a head is judged by; more is surer and slower (the paper: 32 to 64).

    For comparisons, and on no node: head_types "random" draws each head's kind instead of looking at it, as often as it would be
    looked at; without first_frame_sink the first frame is kept where the band holds it alone, for the same budget.
    """

    sparsity: float = 0.7
    dense_layers: str = "0"
    sampled_rows: int = 64
    head_types: str = "online"
    first_frame_sink: bool = True

    def __post_init__(self):
        super().__post_init__()
        self._number("sampled_rows", 1, 4096, whole=True)
        self._choice("head_types", ("online", "random"))
        self._flag("first_frame_sink")


CONFIG = SvgConfig
AUTOMATIC = Automatic(SvgConfig.sparsity, dense_layers=SvgConfig.dense_layers)


def first_step(schedule: Schedule) -> int:
    """The first step that this method has a part in."""
    return schedule.warmup


def plan(call: AttentionCall, config: SvgConfig, state: LayerState) -> SparsePlan | Dense:
    """Classifies the heads where that is due, and gives each the band of its kind (algorithm 1)."""
    run = state.run
    bands = run.shared(
        ("svg", call.q.device, call.layout), lambda: Bands.build(call.layout, config.sparsity, call.q.device, config.first_frame_sink),
    )
    for limit in bands.limits:
        run.note(limit)
    given = run.given(call, state)
    if isinstance(given, Dense):
        return given
    if given is None and (state.found is None or _due(config.cache_refresh, state.found.step, call.step)):
        temporal = _drawn(call, run.seed) if config.head_types == "random" else _classified(call, config, run, bands)
        state.found = run.keep(call, Found(call.step, temporal))
    temporal = state.found.what
    state.figures = Figures(density=bands.densities[temporal.long()], temporal=temporal)
    return bands.plan(temporal)


def _classified(call: AttentionCall, config: SvgConfig, run: Session, bands: Bands) -> Tensor:
    """Which heads are temporal, bool [B, H]: those whose band of that kind is nearer on the sampled rows. A tie is spatial."""
    rows = sampled_rows(run.seed, call.step, call.layer, config.sampled_rows, call.q.shape[2]).to(call.q.device, non_blocking=True)
    errors = kernels.sampled_errors(
        call.q, call.k, call.v, rows, bands.candidates(), scale=call.scale, key_bias=call.key_bias, backend=run.backend,
    )
    return errors[TEMPORAL] < errors[SPATIAL]


def _drawn(call: AttentionCall, seed: int) -> Tensor:
    """Which heads are temporal by lot, bool [B, H], alike for the whole batch: a pure function of seed, step, layer and head."""
    heads = [Random(f"{seed} {call.step} {call.layer} {call.stack} {head}").random() < 0.5 for head in range(call.q.shape[1])]
    return torch.tensor(heads, device=call.q.device).expand(call.q.shape[:2])


def to_pattern(temporal: Tensor) -> dict[str, Tensor]:
    """What was found, for a file: bool [B, H]."""
    return {"temporal": temporal}


def from_pattern(tensors: dict[str, Tensor], call: AttentionCall, config: SvgConfig, run: Session) -> Tensor:
    """The inverse of `to_pattern`, on the call's device. Raises ValueError where it does not fit the call."""
    temporal = tensors["temporal"]
    if tuple(temporal.shape) != tuple(call.q.shape[:2]) or temporal.is_floating_point():
        raise ValueError(f"temporal is {temporal.dtype} {tuple(temporal.shape)}: expected integers {tuple(call.q.shape[:2])}")
    return temporal.to(call.q.device) != 0


def _due(refresh: int, found_at: int, step: int) -> bool:
    if refresh < 0:  # the paper: at every sparse step
        return step != found_at
    return refresh > 0 and step - found_at >= refresh


@dataclass(frozen=True)
class Bands:
    """Both kinds of head on one layout, on one device.

    q_order, k_order: the spatial and the temporal order of queries and of keys, in rows 0 and 1. counts, indices: their
    masks, [2, Q], [2, Q, M].
    densities: float [2]. widths: the bands' half-widths in tokens. limits: what to say where the budget could not be met.
    """

    q_order: TokenOrder
    k_order: TokenOrder
    counts: Tensor
    indices: Tensor
    densities: Tensor
    widths: tuple[int, int]
    limits: tuple[str, ...]

    @classmethod
    def build(cls, layout: VideoLayout, sparsity: float, device: torch.device, first_frame_sink: bool = True) -> Bands:
        """Worked out on the CPU, once a run: the arithmetic is exact there and nothing waits for a GPU."""
        kept_frames = 1 if first_frame_sink else 0
        cpu = torch.device("cpu")
        video = layout.video_rows(cpu)
        sinks = layout.sink_rows(cpu)
        q_rows, k_rows, blocks, widths, least_pairs = [], [], [], [], {}
        for kind, in_kind in (("spatial", video), ("temporal", video.permute(1, 2, 0))):  # frame-major, token-major
            q_rows.append(in_sections([sinks, in_kind], BLOCK_Q))
            later = in_kind.flatten()[in_kind.flatten() >= layout.prefix + kept_frames * layout.tokens_per_frame]
            k_rows.append(in_sections([sinks, video[:kept_frames], later], BLOCK_K))
            kept, width, least_pairs[kind] = _band(layout, sparsity, in_kind.flatten(), later)
            blocks.append(kept)
            widths.append(width)
        q_rows, k_rows = torch.stack(q_rows), torch.stack(k_rows)
        mask = BlockMask.from_blocks(torch.stack(blocks)[None], BLOCK_Q, BLOCK_K, q_rows.shape[1], k_rows.shape[1])
        kinds = torch.tensor([[SPATIAL, TEMPORAL]])
        densities = kernels.density(SparsePlan(mask, TokenOrder(q_rows, kinds), TokenOrder(k_rows, kinds)), layout.seq_len, layout.seq_len)
        counts, indices, densities = (table[0].to(device) for table in (mask.kv_num_blocks, mask.kv_indices, densities.float()))
        # One object each for the whole run: what kernels work out from an order is kept with it.
        q_order, k_order = (TokenOrder(rows.to(device), kinds.to(device)) for rows in (q_rows, k_rows))
        return cls(q_order, k_order, counts, indices, densities, tuple(widths), limit_notes(layout, least_pairs))

    def plan(self, temporal: Tensor) -> SparsePlan:
        """Each head's band by its kind: temporal is bool [B, H]."""
        kind = temporal.long()
        return SparsePlan(self._mask(self.counts[kind], self.indices[kind]), self.q_order.for_heads(kind), self.k_order.for_heads(kind))

    def candidates(self) -> list[SparsePlan]:
        """The plan of each kind, for all heads alike: what profiling compares."""
        return [
            SparsePlan(
                self._mask(self.counts[None, None, kind], self.indices[None, None, kind]),
                *(order.for_heads(order.head_order[:, kind : kind + 1]) for order in (self.q_order, self.k_order)),
            )
            for kind in (SPATIAL, TEMPORAL)
        ]

    def _mask(self, counts: Tensor, indices: Tensor) -> BlockMask:
        return BlockMask(counts, indices, BLOCK_Q, BLOCK_K, self.q_order.length, self.k_order.length)


def _band(layout: VideoLayout, sparsity: float, queries: Tensor, keys: Tensor) -> tuple[Tensor, int, float | None]:
    """The blocks of one kind of head: bool [Q, K], the band's half-width in tokens, and where the budget cannot be met the pairs of its least.

    queries: tensor rows of the video in the kind's order; keys: the same without frame 0 where that is kept, whose place in that
    order counts.
    """
    place = torch.empty(layout.seq_len, dtype=torch.int64)
    place[queries.long()] = torch.arange(layout.video_tokens)
    q_low, q_high, q_size = _extent(torch.arange(layout.video_tokens), BLOCK_Q)
    k_low, k_high, k_size = _extent(place[keys.long()], BLOCK_K)
    # Tokens between the nearest ends of two blocks; 0 where they overlap.
    distance = torch.maximum(k_low[None] - q_high[:, None], q_low[:, None] - k_high[None]).clamp(min=0)
    pairs = (q_size[:, None] * k_size[None]).double()
    cost = torch.bincount(distance.flatten(), weights=pairs.flatten()).cumsum(0)  # of every width
    kept_tokens = layout.video_tokens - len(keys)
    paid = pairs_of_sinks(layout, video_sinks=kept_tokens)
    budget = pairs_allowed(layout, sparsity) - paid
    width = int((cost - budget).abs().argmin())
    least = paid + float(cost[0]) if cost[0] > budget else None

    sink_rows, video_rows = -(-layout.sink_tokens // BLOCK_Q), len(q_low)
    sink_columns = -(-layout.sink_tokens // BLOCK_K) + -(-kept_tokens // BLOCK_K)
    blocks = torch.ones(sink_rows + video_rows, sink_columns + len(k_low), dtype=torch.bool)
    blocks[sink_rows:, sink_columns:] = distance <= width
    return blocks, width, least


def _extent(places: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """First place, last place and size of each block of a rising list of places."""
    starts = torch.arange(0, len(places), block)
    ends = (starts + block).clamp(max=len(places))
    return places[starts], places[ends - 1], ends - starts
