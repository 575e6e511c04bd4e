"""Divergences between distributions, gathered: the one place to import them from.

- `f_divergences`: the table `F`, the alpha and skew Jensen-Shannon families, total variation.
- `f_custom`: the f-divergence of a function of yours.
- `score_distances`: distances d(y) between scores, squared L2 to any of yours.
- `score_divergences`: Fisher divergences, and KL, any f-divergence, entropy and mutual information from scores.

How to estimate an f-divergence (grid, Monte Carlo, critic, learned ratio) is in `estimators`.
"""

from minidistill.divergences.f_custom import from_function
from minidistill.divergences.f_divergences import (
    LOG2,
    F,
    FDivergence,
    Function,
    alpha_divergence,
    skew_jensen_shannon,
    total_variation,
)
from minidistill.divergences.score_distances import (
    ScoreDistance,
    from_distance,
    huber,
    l2,
    power,
    pseudo_huber,
    squared_l2,
)
from minidistill.divergences.score_divergences import (
    entropy_from_scores,
    fisher,
    from_scores,
    kl_from_scores,
    mutual_information,
    mutual_information_joint,
)

__all__ = [
    "LOG2", "F", "FDivergence", "Function", "ScoreDistance", "alpha_divergence", "entropy_from_scores", "fisher",
    "from_distance", "from_function", "from_scores", "huber", "kl_from_scores", "l2", "mutual_information",
    "mutual_information_joint", "power", "pseudo_huber", "skew_jensen_shannon", "squared_l2", "total_variation",
]
