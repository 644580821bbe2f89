"""What is compared: a table, one entry a variant. A new one is one entry; one whose settings do not exist here is left out by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

from pack.attention.config import MOST_SPARSITY, MethodConfig
from pack.attention.methods import adaspa, auto, svg

from .methods import RANDOM_BLOCKS, of_fifty, one_kind, searches_at, with_bands

NODES = {"SVG": "SparseAttentionPatchSVG", "AdaSpa": "SparseAttentionPatchAdaSpa", "Auto": "SparseAttentionPatchAuto"}
GROUPS = ("plot", "paper", "better", "few-steps")
# Short videos are what is measured; the pack's default would leave them dense.
_ALWAYS = {"min_tokens": 0}


@dataclass(frozen=True)
class OfFifty:
    """A setting that is a number of steps of the papers' 50."""

    count: int


@dataclass(frozen=True)
class Variant:
    """One way to run sparse.

    method: a module of attention.methods, or what is like one. settings: of its config, what is not the node's default; an
    OfFifty is scaled to the run. budgets: sparsities that it runs at, of those asked for or else all of them; None: any asked for.
    steps: of its runs, whatever was asked; None: those asked for.
    base: the variant that it is compared with. fidelities: what is set instead of each sparsity, about as much being skipped.
    equal_work: the sparsity of a call is raised until the run skips as much as it would at the budget with one step of warm-up
    and no dense last step.
    """

    name: str
    title: str
    about: str
    method: Any
    settings: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    budgets: tuple[float, ...] | None = None
    steps: int | None = None
    base: str | None = None
    fidelities: Mapping[float, float] | None = None
    equal_work: bool = False

    def why_not(self) -> str | None:
        """Why it cannot run at all with the methods as they are; None where it can."""
        unknown = sorted(set(self.settings) - {known.name for known in fields(self.method.CONFIG)})
        if unknown:
            return f"{self.method.NAME} has no setting {', '.join(unknown)}"
        try:
            self.method.CONFIG(**self._settings(50))
        except ValueError as error:
            return f"{self.method.NAME} does not take {error}"
        return None

    def config(self, budget: float, steps: int) -> MethodConfig | None:
        """Its settings at a sparsity; None where a sparsity so high is impossible."""
        settings = self._settings(steps)
        sparsity = budget
        if self.equal_work:
            sparse = steps - max(settings["warmup_steps"], self.method.LEAST_WARMUP) - settings.get("end_steps", 0)
            if sparse <= 0 or budget * (steps - 1) / sparse > MOST_SPARSITY:
                return None
            sparsity = round(budget * (steps - 1) / sparse, 6)
        if self.fidelities is not None:
            return self.method.CONFIG(**settings, fidelity=self.fidelities[budget]) if budget in self.fidelities else None
        return self.method.CONFIG(**settings, sparsity=sparsity)

    def node_settings(self, budget: float, steps: int) -> dict[str, Any]:
        """The inputs of the node that differ from its defaults."""
        config = self.config(budget, steps)
        return {name: getattr(config, name) for name in ("sparsity" if self.fidelities is None else "fidelity", *self._settings(steps))}

    @property
    def node(self) -> str | None:
        """The patch node's id in ComfyUI; None where no node does this."""
        return None if hasattr(self.method, "IDENTITY") else NODES.get(self.method.NAME)

    def _settings(self, steps: int) -> dict[str, Any]:
        given = {name: of_fifty(value.count, steps) if isinstance(value, OfFifty) else value for name, value in self.settings.items()}
        return {**_ALWAYS, **given}


# ---- the lines of the plot ----

# AdaSpa as its paper describes it (section 4); all else is the node's default, which is the paper's.
AS_IN_PAPER = {
    "block_q": 64, "token_order": "raster", "skipped_blocks": "drop", "head_adaptive": True, "always_adapt": True, "lse_cache": True,
}
_PLOT = (
    Variant("svg", "SVG", "the node's defaults: bands, heads classified at every step, layer 0 dense", svg, groups=("plot",)),
    Variant("adaspa", "AdaSpa", "the node's defaults", adaspa, groups=("plot", "better")),
    Variant(
        "adaspa-paper", "AdaSpa as in the paper", "64 by 64 blocks of raster lines, what is skipped is dropped, searches at 10 and 30 of 50",
        adaspa, AS_IN_PAPER, ("plot", "paper", "better"), base="adaspa",
    ),
    Variant("auto", "Auto", "the node's defaults, at a sparsity instead of a fidelity", auto, groups=("plot", "better"), base="adaspa"),
    Variant("random", "Random blocks", "blocks by lot, as many as AdaSpa keeps", RANDOM_BLOCKS, {"skipped_blocks": "drop"}, ("plot",)),
)

# ---- the papers' findings ----

# No dense layers: the two papers are compared at equal sparsity.
_ALL_LAYERS = {"dense_layers": ""}


def _svg_of_paper(name: str, title: str, about: str, method: Any = svg, **settings: Any) -> Variant:
    return Variant(name, title, about, method, {**_ALL_LAYERS, **settings}, ("paper",), (0.7, 0.8))


def _adaspa_of_paper(name: str, title: str, about: str, method: Any = adaspa, **settings: Any) -> Variant:
    return Variant(name, title, about, method, {**AS_IN_PAPER, **settings}, ("paper",), (0.8,))


WARMUPS = (0, 2, 5, 10)
_PAPER = (
    _svg_of_paper("svg-online", "SVG, online", "heads classified at every sparse step; no dense layer"),
    _svg_of_paper("svg-fixed", "SVG, types fixed", "heads classified at the first sparse step alone", cache_refresh=0),
    _svg_of_paper("svg-random", "SVG, random types", "each head's kind by lot at every sparse step", head_types="random"),
    _svg_of_paper("svg-temporal", "SVG, temporal alone", "every head is a temporal one", one_kind(temporal=True)),
    _svg_of_paper("svg-spatial", "SVG, spatial alone", "every head is a spatial one", one_kind(temporal=False)),
    _svg_of_paper("svg-no-sink", "SVG, no first-frame sink", "the first frame is kept where the band holds it alone", first_frame_sink=False),
    _adaspa_of_paper("adaspa-paper-equal-heads", "AdaSpa, equal heads", "every head keeps as many blocks", head_adaptive=False),
    _adaspa_of_paper("adaspa-paper-own-lse", "AdaSpa, no LSE cache", "a later search computes its own log-sum-exp", lse_cache=False),
    _adaspa_of_paper("adaspa-paper-10", "AdaSpa, searches {10}", "one search, at step 10 of 50", cache_refresh=0),
    _adaspa_of_paper("adaspa-paper-10-20-30", "AdaSpa, searches {10,20,30}", "three searches", searches_at(10, 20, 30)),
    _adaspa_of_paper("adaspa-paper-10-20-30-40", "AdaSpa, searches {10,20,30,40}", "four searches", searches_at(10, 20, 30, 40)),
    *(
        _adaspa_of_paper(
            f"adaspa-paper-warmup-{count}", f"AdaSpa, warm-up {count}", f"{count} of 50 steps dense, at least one", warmup_steps=OfFifty(count),
        )
        for count in WARMUPS
    ),
    *(_svg_of_paper(f"svg-warmup-{count}", f"SVG, warm-up {count}", f"{count} of 50 steps dense", warmup_steps=OfFifty(count)) for count in WARMUPS),
)

# ---- what is to be better than the papers ----


def _switch(base: str, name: str, title: str, about: str, **settings: Any) -> Variant:
    """A base with one thing exchanged."""
    method, before, of = {"adaspa": (adaspa, {}, "AdaSpa"), "auto": (auto, {}, "Auto"), "adaspa-paper": (adaspa, AS_IN_PAPER, "Paper's AdaSpa")}[base]
    return Variant(f"{base}-{name}", f"{of}, {title}", about, method, {**before, **settings}, ("better",), (0.7, 0.8, 0.9), base=base)


# What the small model skips as much at; found by trial.
FIDELITIES = {0.5: 0.965, 0.6: 0.945, 0.7: 0.925, 0.8: 0.892, 0.9: 0.83}

_BETTER = (
    _switch("adaspa-paper", "tile", "tile order", "blocks are boxes of 4 by 4 by 4", token_order="tile"),
    _switch("adaspa-paper", "hilbert", "Hilbert order", "blocks are runs of a Hilbert curve", token_order="hilbert"),
    _switch("adaspa-paper", "mean", "skipped blocks corrected", "a skipped block counts as one key, its mean", skipped_blocks="mean"),
    _switch("adaspa-paper", "block-128", "128 queries a block", "blocks of 128 queries by 64 keys", block_q=128),
    _switch("adaspa", "raster", "raster order", "blocks are runs of raster lines", token_order="raster"),
    _switch("adaspa", "tile", "tile order", "blocks are boxes of 4 by 4 by 4", token_order="tile"),
    _switch("adaspa", "block-64", "64 queries a block", "blocks of 64 by 64", block_q=64),
    _switch("adaspa", "drop", "skipped blocks dropped", "no correction", skipped_blocks="drop"),
    _switch("adaspa", "always-adapt", "heads adapted untried", "head-adaptive as in the paper, whether it comes nearer or not", always_adapt=True),
    _switch("adaspa", "equal-heads", "equal heads", "every head keeps as many blocks", head_adaptive=False),
    _switch("auto", "raster", "raster order", "blocks are runs of raster lines", token_order="raster"),
    _switch("auto", "tile", "tile order", "blocks are boxes of 4 by 4 by 4", token_order="tile"),
    _switch("auto", "block-64", "64 queries a block", "blocks of 64 by 64", block_q=64),
    _switch("auto", "drop", "skipped blocks dropped", "no correction", skipped_blocks="drop"),
    _switch("auto", "mass-row", "mass, by row", "each row keeps the heaviest blocks, all rows as many", selection="mass", scope="row"),
    _switch("auto", "mass-head", "mass, by head", "one threshold of mass a head", selection="mass", scope="head"),
    _switch("auto", "mass-layer", "mass, by layer", "one threshold of mass a layer", selection="mass", scope="layer"),
    _switch("auto", "share-head", "share of mass, by head", "rows of a head hold one share, in the fewest blocks", selection="share", scope="head"),
    _switch("auto", "share-layer", "share of mass, by layer", "all rows hold one share, in the fewest blocks", selection="share", scope="layer"),
    _switch("auto", "error-row", "error, by row", "each row keeps the blocks that change it most, as many each", selection="error", scope="row"),
    _switch("auto", "error-head", "error, by head", "one threshold of error a head", selection="error", scope="head"),
    _switch("auto", "calendar", "searches by calendar", "searched again 20 of 50 steps after the first search", cache_refresh=OfFifty(20)),
    _switch("auto", "once", "one search", "never searched again", cache_refresh=0),
    Variant(
        "auto-bands", "Auto, with bands", "narrow bands as SVG's are kept, and the searched blocks beside them", with_bands(),
        groups=("better",), budgets=(0.7, 0.8, 0.9), base="auto",
    ),
    Variant(
        "auto-fidelity", "Auto, by its knob", "layers share the budget by measured error: each has the same error", auto,
        groups=("plot", "better"), base="auto", fidelities=FIDELITIES,
    ),
)

# ---- few steps ----

FEW_STEPS = (4, 6, 8)
FEW_BUDGETS = (0.5, 0.7)
FEW_WARMUPS = (0, 1, 2, 3)
# How often it looks for what to keep: as it comes, and once.
_LOOKS = {svg.NAME: ((-1, "at every step"), (0, "once")), adaspa.NAME: ((-1, "again"), (0, "once")), auto.NAME: ((-1, "again"), (0, "once"))}


def _few_steps() -> Iterable[Variant]:
    """Schedules that skip as much of the run as one step of warm-up does; with equal sparsity, the longer warm-up would always win."""
    for name, method in (("svg", svg), ("adaspa", adaspa), ("auto", auto)):
        for steps, warmup, end, (refresh, how) in product(FEW_STEPS, FEW_WARMUPS, (0, 1), _LOOKS[method.NAME]):
            if warmup < method.LEAST_WARMUP or warmup + end >= steps:
                continue
            settings = {"warmup_steps": warmup, "end_steps": end, "cache_refresh": refresh, "dense_layers": ""}
            label = f"{name}-{steps}-steps-warmup-{warmup}-end-{end}-{how.split()[-1]}"
            title = f"{method.NAME}, {steps} steps, warm-up {warmup}, {end} dense at the end, {how}"
            about = "a schedule for few steps" if (warmup, end) == (1, 0) else "at another sparsity: the run skips as much as with warm-up 1"
            yield Variant(label, title, about, method, settings, ("few-steps",), FEW_BUDGETS, steps, equal_work=True)


VARIANTS: dict[str, Variant] = {variant.name: variant for variant in (*_PLOT, *_PAPER, *_BETTER, *_few_steps())}


def chosen(text: str) -> list[Variant]:
    """The variants of names and groups, as in "plot,adaspa-raster"; "all", or "none". Raises ValueError naming what is neither."""
    found: dict[str, Variant] = {}
    for part in (part.strip() for part in text.split(",")):
        if part in VARIANTS:
            found[part] = VARIANTS[part]
        elif part in GROUPS:
            found |= {name: variant for name, variant in VARIANTS.items() if part in variant.groups}
        elif part == "all":
            found |= VARIANTS
        elif part not in ("none", ""):
            raise ValueError(f'"{part}" is neither a variant nor one of {", ".join(GROUPS)}, all, none (--list names them)')
    return list(found.values())
