"""Who computes how much: exact work accounting, and layouts that even it out.

from mtrain.balance import Balancer, work, imbalance, measure
"""

from mtrain.balance.forecast import Forecast, worker_bound
from mtrain.balance.solver import Plan, solve
from mtrain.balance.state import Balancer
from mtrain.balance.work import block_cost, imbalance, measure, tile_density, work

__all__ = [
    "Balancer",
    "Forecast",
    "Plan",
    "block_cost",
    "imbalance",
    "measure",
    "solve",
    "tile_density",
    "work",
    "worker_bound",
]
