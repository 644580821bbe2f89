"""The methods, one file each: NAME, CONFIG, AUTOMATIC, LEAST_WARMUP (steps), first_step(schedule),
plan(call, config, state) -> SparsePlan | Dense; and where it looks at what came out, observe(call, config, state, out).

For files of patterns: PATTERN_SETTINGS (what a loaded one brings along), to_pattern(found) -> tensors by name, and its inverse
from_pattern(tensors, call, config, run).
"""

from . import adaspa, auto, svg

METHODS = {method.NAME: method for method in (svg, adaspa, auto)}
