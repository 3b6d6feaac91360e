import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.errors import UsageError
from onnxq.numerics.budget import Budget, parse_drop
from onnxq.numerics.metrics import drop, make_metric

no_deadline = settings(deadline=None)


def test_drop_is_positive_when_worse():
    assert drop(make_metric("top1"), 0.9, 0.85) == pytest.approx(0.05)
    assert drop(make_metric("perplexity"), 10.0, 10.5) == pytest.approx(0.5)
    assert drop(True, 0.9, 0.95) == pytest.approx(-0.05)
    assert drop(False, 10.0, 9.0) == pytest.approx(-1.0)


def test_drop_to_something_undefined_is_infinite():
    for higher_is_better in (True, False):
        assert drop(higher_is_better, 0.9, math.nan) == math.inf
        assert drop(higher_is_better, math.nan, 0.9) == math.inf
    assert drop(False, 10.0, math.inf) == math.inf


@pytest.mark.parametrize(
    ("text", "float_value", "allowed"),
    [
        ("0.5%", 0.9, 0.0045),
        ("0.5 %", -0.9, 0.0045),
        ("0.5pt", 0.9, 0.005),
        (" 0.005 ", 0.9, 0.005),
        ("1%", 25.28, 0.2528),
        ("2", 25.28, 2.0),
        ("0", 0.9, 0.0),
        ("1e-3", 7.0, 0.001),
    ],
)
def test_allowed_drop(text, float_value, allowed):
    assert parse_drop(text).allowed(float_value) == pytest.approx(allowed, rel=1e-11)


@no_deadline
@given(st.floats(0, 1e6), st.sampled_from(["%", "pt", ""]))
def test_budget_reads_back_from_its_text(value, unit):
    budget = Budget(value, unit)
    assert parse_drop(str(budget)) == budget


@pytest.mark.parametrize("text", ["0.5%", "0.5pt", "0.005", "3"])
def test_budget_text_is_what_was_written(text):
    assert str(parse_drop(text)) == text


@no_deadline
@given(st.integers(1, 2000), st.integers(0, 20))
def test_a_drop_of_exactly_the_budget_is_allowed(hits, lost):
    """Losing `lost` of 2000 rows is exactly the budget of lost / 20 points, in spite of binary fractions."""
    lost = min(lost, hits)
    budget = parse_drop(f"{lost / 20}pt")
    assert drop(True, hits / 2000, (hits - lost) / 2000) <= budget.allowed(hits / 2000)
    assert drop(True, hits / 2000, (hits - lost - 1) / 2000) > budget.allowed(hits / 2000)


@pytest.mark.parametrize("text", ["", "%", "abc", "-1%", "-0.1", "nan", "inf%", "0.5 percent", "1%%"])
def test_parse_drop_errors(text):
    with pytest.raises(UsageError, match=r"write e\.g\. 0\.5% \(relative\), 0\.5pt or 0\.005 \(absolute\)"):
        parse_drop(text)
