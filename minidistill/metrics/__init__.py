"""Numbers that read as quality.

    mixtures.py      against an exact mixture: both KLs on a grid, mode coverage, sliced W2 over its floor
    line.py          mixtures on the line: distribution function and quantiles
    fidelity.py      between sets of features: Fréchet distance, precision and recall
    calibration.py   of a classifier: expected calibration error
    classifier.py    small classifiers, whose features judge images
    features.py      what images are judged in: a classifier's features, or Inception's
    evaluation.py    a teacher and its students, drawn from and measured in one run
"""

from minidistill.metrics.calibration import expected_calibration_error
from minidistill.metrics.fidelity import PrecisionRecall, frechet_distance, precision_recall
from minidistill.metrics.line import cdf, quantile
from minidistill.metrics.mixtures import (
    GridKL,
    ModeCoverage,
    kl_both_ways,
    kl_on_grid,
    mode_coverage,
    over_floor,
    reverse_kl_on_grid,
)

__all__ = [
    "GridKL", "ModeCoverage", "PrecisionRecall", "cdf", "expected_calibration_error", "frechet_distance",
    "kl_both_ways", "kl_on_grid", "mode_coverage", "over_floor", "precision_recall", "quantile", "reverse_kl_on_grid",
]
