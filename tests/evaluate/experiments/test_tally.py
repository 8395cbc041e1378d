"""Quotients of sums: undefined ones are NaN, without a warning."""

import numpy as np
import pytest

from selfcorrect.evaluate.experiments.tally import ratio


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("numerator", "denominator", "quotient"),
    [
        ([1.0, 3.0], [2.0, 4.0], [0.5, 0.75]),
        ([0.0, 1.0, -1.0, 6.0], [0.0, 0.0, -0.0, 3.0], [np.nan, np.nan, np.nan, 2.0]),
        ([np.inf, np.nan, 1.0], [np.inf, 1.0, np.nan], [np.nan, np.nan, np.nan]),
        ([[2.0], [4.0]], [0.0, 2.0], [[np.nan, 1.0], [np.nan, 2.0]]),
        (1.0, np.array(0.0), np.nan),
    ],
)
def test_a_quotient_is_nan_where_the_denominator_is_zero(numerator, denominator, quotient) -> None:
    found = ratio(np.asarray(numerator), np.asarray(denominator))
    assert np.array_equal(found, quotient, equal_nan=True)
