"""One number style for page, terminal, figures and study pages."""

import numpy as np
import pytest

from selfcorrect.evaluate.statistics.formatting import (
    compact,
    compact_with_interval,
    number,
    p_value,
    significant,
    size_name,
    with_interval,
    without_leading_zero,
)


@pytest.mark.parametrize("missing", [None, np.nan])
def test_undefined_is_never_a_number(missing):
    assert number(missing) == significant(missing) == "undefined"
    assert compact(missing) == "–"
    nothing = {"value": missing, "low": missing, "high": missing}
    assert with_interval(nothing) == "undefined"
    assert compact_with_interval(nothing) == "–"
    assert with_interval({**nothing, "value": 0.4}) == "0.400 (no interval)"
    assert compact_with_interval({**nothing, "value": 0.4}) == ".40"


def test_signs_are_minus_signs_and_zero_has_none():
    assert number(-0.0314) == "−0.031"
    assert number(-0.0004) == number(0.0) == "0.000"
    assert number(-1.005, 1) == "−1.0"
    assert significant(-0.000012345) == "−1.23e−05"
    assert significant(-1.49e-18) == significant(0.0) == "0"  # what rounding leaves is no slope
    row = {"value": -0.41, "low": -0.5, "high": 0.0}
    assert with_interval(row) == "−0.410 [−0.500, 0.000]"
    assert compact_with_interval(row) == "−.41 [−.50, .00]"


def test_compact_numbers_have_no_leading_zero_and_keep_a_small_sign():
    values = [0.41, -0.03, 0.996, 10.5, 0.002, -0.0049, -0.0004, 0.0]
    assert [compact(v) for v in values] == [
        ".41", "−.03", "1.00", "10.50", ".002", "−.005", ".00", ".00",
    ]  # fmt: skip


def test_p_values():
    assert [p_value(p) for p in (0.0004, 0.0123, 0.5, 0.9999)] == ["< 0.001", "0.012", "0.500", "1"]
    assert without_leading_zero(p_value(0.0004)) == "< .001"
    assert without_leading_zero("10.5 and 0.5") == "10.5 and .5"


def test_size_names():
    sizes = [600, 8_192, 9_940, 9_960, 75_300, 999_900, 1_300_000, 135_000_000, 7e9]
    names = ["600", "8.2k", "9.9k", "10k", "75k", "1.0M", "1.3M", "135M", "7.0B"]
    assert [size_name(size) for size in sizes] == names
