"""Which keys does each query need? Patterns, their estimation and the plan that a run follows."""

from mtrain.patterns.a_shape import a_shape_pattern
from mtrain.patterns.budget import Budget, Coverage, TopK
from mtrain.patterns.vertical_slash import estimate_vertical_slash

__all__ = ["Budget", "Coverage", "TopK", "a_shape_pattern", "estimate_vertical_slash"]
