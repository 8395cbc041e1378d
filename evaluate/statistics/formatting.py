"""Write numbers in one style: on the report's page, in the terminal, in figures and study pages.

Minus signs are true minus signs, and zero has none.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from selfcorrect.evaluate.statistics.bootstrap import ROUNDING


def number(value: float | None, decimals: int = 3) -> str:
    """Return "0.410" or "−0.031"; "undefined" for None and NaN."""
    if value is None or math.isnan(value):
        return "undefined"
    text = f"{value:.{decimals}f}"
    return _with_minus_sign(text if float(text) else text.lstrip("-"))


def with_interval(row: Mapping[str, Any]) -> str:
    """Return "0.410 [0.302, 0.518]" for a row with the keys value, low and high."""
    value, low, high = (number(row[name]) for name in ("value", "low", "high"))
    if "undefined" in (low, high):
        return value if value == "undefined" else f"{value} (no interval)"
    return f"{value} [{low}, {high}]"


def compact(value: float | None) -> str:
    """Return two decimals without the leading zero, for narrow tables: ".41", "−.03", "1.00".

    Below .005 there are three, so that a small value keeps its sign. None and NaN are "–".
    """
    if value is None or math.isnan(value):
        return "–"
    return without_leading_zero(number(value, 3 if 0.0005 <= abs(value) < 0.005 else 2))


def compact_with_interval(row: Mapping[str, Any]) -> str:
    """Return ".41 [.30, .52]" as `with_interval`; the value alone where there is no interval."""
    value, low, high = (compact(row[name]) for name in ("value", "low", "high"))
    return value if "–" in (low, high) else f"{value} [{low}, {high}]"


def significant(value: float | None) -> str:
    """Return three significant digits, for slopes: "0.00123", "−1.2e−05"; 0 up to rounding."""
    if value is None or math.isnan(value):
        return "undefined"
    return _with_minus_sign(f"{value:.3g}") if abs(value) > ROUNDING else "0"


def p_value(value: float) -> str:
    """Return "0.012", "< 0.001" or "1"."""
    if value < 0.001:
        return "< 0.001"
    return "1" if value > 0.999 else f"{value:.3f}"


def size_name(parameters: float) -> str:
    """Return 8192 as "8.2k", 75300 as "75k", 135e6 as "135M"."""
    for unit, divisor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if parameters >= divisor * 0.9995:
            size = parameters / divisor
            return f"{size:.1f}{unit}" if size < 9.95 else f"{size:.0f}{unit}"
    return f"{parameters:.0f}"


def without_leading_zero(text: str) -> str:
    """Return "0.41" as ".41", "−0.03" as "−.03", "< 0.001" as "< .001"; other text unchanged."""
    return re.sub(r"(?<![\d.])0\.", ".", text)


def _with_minus_sign(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")
