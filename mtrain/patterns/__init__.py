"""Which keys does each query need? Patterns, their estimation and the plan that a run follows."""

from mtrain.patterns.a_shape import a_shape_pattern
from mtrain.patterns.base import Pattern, Site
from mtrain.patterns.budget import Budget, Coverage, TopK
from mtrain.patterns.plan import PATTERNS, PatternPlan, budget_of
from mtrain.patterns.reach import reach_by_distance, scattered_rows
from mtrain.patterns.recall import measure_recall, spaced_rows
from mtrain.patterns.vertical_slash import estimate_vertical_slash

__all__ = [
    "PATTERNS",
    "Budget",
    "Coverage",
    "Pattern",
    "PatternPlan",
    "Site",
    "TopK",
    "a_shape_pattern",
    "budget_of",
    "estimate_vertical_slash",
    "measure_recall",
    "reach_by_distance",
    "scattered_rows",
    "spaced_rows",
]
