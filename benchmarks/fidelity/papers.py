"""What the papers found, as pairs of variants, and whether it is found here.

SVG: arXiv 2502.01776 v2, tables 1 and 3 and section 4. AdaSpa: arXiv 2502.21079 v1, tables 1 and 2 and figure 10. Figures are PSNR in dB
against dense attention: HunyuanVideo (Hy) of about 110,000 to 119,000 tokens, CogVideoX 1.5 (Cog) of 45,000.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .study import Difference, difference


@dataclass(frozen=True)
class Finding:
    """A paper's claim that `better` comes nearer to dense attention than `worse`. paper: its figures, or that it gives none."""

    question: str
    better: str
    worse: str
    paper: str


_NO_FIGURES = "claimed; no figures"
FINDINGS = (
    Finding("SVG: classifying at every step, against once", "svg-online", "svg-fixed", "heads change kind with prompt and step; no figures"),
    Finding("SVG: classified heads, against random kinds", "svg-online", "svg-random", _NO_FIGURES),
    Finding("SVG: both kinds, against temporal alone", "svg-online", "svg-temporal", "Hy 29.55 against 25.85"),
    Finding("SVG: both kinds, against spatial alone", "svg-online", "svg-spatial", _NO_FIGURES),
    Finding("SVG: first-frame sink, against none", "svg-online", "svg-no-sink", _NO_FIGURES),
    Finding("AdaSpa against SVG, equal sparsity", "adaspa-paper", "svg-online", "Hy 29.07 against 27.61, Cog 23.25 against 18.98"),
    Finding(
        "AdaSpa: head-adaptive, against equal heads", "adaspa-paper", "adaspa-paper-equal-heads", "Hy 29.07 against 28.51, Cog 23.25 against 22.99",
    ),
    Finding("AdaSpa: LSE cache, against none", "adaspa-paper", "adaspa-paper-own-lse", "Hy 29.07 against 28.97, Cog 23.25 against 23.14"),
    Finding("AdaSpa: searches {10,30}, against {10}", "adaspa-paper", "adaspa-paper-10", "Hy 29.07 against 28.96"),
    Finding("AdaSpa: searches {10,30}, against {10,20,30}", "adaspa-paper", "adaspa-paper-10-20-30", "Hy 29.07 against 28.93"),
    Finding("AdaSpa: searches {10,30}, against {10,20,30,40}", "adaspa-paper", "adaspa-paper-10-20-30-40", "Hy 29.07 against 28.93"),
    Finding("AdaSpa: warm-up 10 of 50, against 5", "adaspa-paper-warmup-10", "adaspa-paper-warmup-5", "rises with warm-up (figure 10)"),
    Finding("AdaSpa: warm-up 5 of 50, against 2", "adaspa-paper-warmup-5", "adaspa-paper-warmup-2", "rises with warm-up (figure 10)"),
    Finding("AdaSpa: warm-up 10 of 50, against 0 (here 1 step)", "adaspa-paper-warmup-10", "adaspa-paper-warmup-0", "rises with warm-up (figure 10)"),
    Finding("SVG: warm-up 10 of 50, against 5", "svg-warmup-10", "svg-warmup-5", "12.5 of 50 dense by convention; no figures"),
    Finding("SVG: warm-up 5 of 50, against 2", "svg-warmup-5", "svg-warmup-2", "12.5 of 50 dense by convention; no figures"),
    Finding("SVG: warm-up 2 of 50, against 0", "svg-warmup-2", "svg-warmup-0", "12.5 of 50 dense by convention; no figures"),
)


@dataclass(frozen=True)
class Answer:
    """A finding at a sparsity here. better, worse: the rows."""

    finding: Finding
    budget: float
    better: dict
    worse: dict
    difference: Difference

    @property
    def reproduced(self) -> str:
        """From the figures: the sign of the difference, where it is more than seeds and clips bring about."""
        return self.difference.verdict


def answers(rows: Sequence[dict]) -> list[Answer]:
    """Every finding at every sparsity whose two rows are there."""
    by_name = {(row["variant"], row["budget"]): row for row in rows}
    found = []
    for finding in FINDINGS:
        for budget in sorted({row["budget"] for row in rows}):
            pair = by_name.get((finding.better, budget)), by_name.get((finding.worse, budget))
            if None not in pair:
                found.append(Answer(finding, budget, *pair, difference(*pair)))
    return found
