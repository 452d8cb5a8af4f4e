"""Numbers as a reader wants them."""

from __future__ import annotations

import math

MISSING = "–"


def number(value: float, digits: int | None = None, signed: bool = False) -> str:
    """A number with `digits` decimals, or with four significant ones; nan is a dash.

    The minus is the typographic one, as wide as the plus; `signed` shows the plus too.
    """
    if not math.isfinite(value):
        return MISSING if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if digits is None:
        text = f"{value:.4g}"
        text = f"{value:.0f}" if "e" in text and 1 <= abs(value) < 1e7 else text
    else:
        text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    elif signed and value > 0:
        text = f"+{text}"
    return text.replace("-", "−")
