"""Where the spread of scores within a group comes from: the window's noise, or the initial one.

A nested design (a random-effects analysis of variance): of each picture several initial noises are
drawn, and from each a group of candidates that differ by the noise of their window alone. Scores
within such a group spread by the window's noise, and its mean from group to group by the initial
noise too. The judge's own noise is part of both.
"""

import math

import numpy as np
from jaxtyping import Float


def window_share(scores: Float[np.ndarray, "pictures draws candidates"]) -> float:
    """The share of the variance within a group of independent candidates that the window explains.

    Both variances are unbiased, averaged over pictures before one is divided by the other; that of
    the initial noise, which is a difference, is 0 at least.

    Args:
        scores: of two or more draws of two or more candidates; pictures with a nan are left out.

    Returns:
        0 to 1; nan where no scores spread.
    """
    known = scores[np.isfinite(scores).all(axis=(1, 2))]
    if not len(known):
        return math.nan
    window = known.var(axis=2, ddof=1).mean()
    means = known.mean(axis=2).var(axis=1, ddof=1).mean()
    initial = max(means - window / scores.shape[2], 0.0)
    return float(window / (window + initial)) if window + initial > 0 else math.nan
