"""The methods, one file each: NAME, CONFIG, AUTOMATIC, LEAST_WARMUP (steps), first_step(schedule),
plan(call, config, state) -> SparsePlan | Dense.

For files of patterns: PATTERN_SETTINGS (what a loaded one brings along), to_pattern(found) -> tensors by name, and its inverse
from_pattern(tensors, call, config, run).
"""

from . import adaspa, svg

METHODS = {method.NAME: method for method in (svg, adaspa)}
