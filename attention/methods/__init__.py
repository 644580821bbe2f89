"""The methods, one file each: NAME, CONFIG, LEAST_WARMUP (steps), first_step(schedule),
plan(call, config, state) -> SparsePlan | Dense."""

from . import adaspa, svg

METHODS = {method.NAME: method for method in (svg, adaspa)}
