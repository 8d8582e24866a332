from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from locaudit.errors import DataError
from locaudit.stats.agreement import compare

PROBABILITIES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.sampled_from("abcdef")), min_size=1)


def two_judges(n: int, seed: int = 0) -> tuple[list[float], list[float], list[str]]:
    rng = random.Random(seed)
    first = [rng.random() for _ in range(n)]
    second = [min(1.0, max(0.0, x + rng.gauss(0, 0.3))) for x in first]
    return first, second, [f"q{i // 3}" for i in range(n)]


def test_by_hand():
    first = [0.9, 0.8, 0.1, 0.2, 0.9, None, 0.5, None]
    second = [0.7, 0.4, 0.3, 0.6, 0.5, 0.5, None, None]
    out = compare(first, second, ["a", "a", "b", "b", "c", "c", "d", "d"])
    assert (out.n, out.n_groups, out.missing) == (5, 3, (2, 2))
    assert out.counts == ((1, 1), (1, 2))
    assert out.yes == (0.6, 0.6) and out.agreement == pytest.approx(0.6)
    assert out.kappa == pytest.approx((0.6 - 0.52) / (1 - 0.52))
    assert compare(first, second, list("aabbccdd"), threshold=0.95).counts == ((5, 0), (0, 0))


def test_the_threshold_itself_is_a_yes():
    assert compare([0.5], [0.49999], ["a"]).counts == ((0, 0), (1, 0))


def test_a_judge_agrees_with_itself_and_not_with_its_opposite():
    first, _, groups = two_judges(60)
    same, opposite = compare(first, first, groups), compare(first, [1 - x for x in first], groups)
    assert same.agreement == same.kappa == 1 and same.agreement_interval == same.kappa_interval == (1, 1)
    assert same.pearson == pytest.approx(1) and same.spearman == pytest.approx(1)
    assert opposite.agreement == 0 and opposite.kappa < 0 and opposite.pearson == pytest.approx(-1)


@given(PROBABILITIES)
def test_it_is_symmetric_and_bounded(rows):
    first, second, groups = map(list, zip(*rows, strict=True))
    out, turned = compare(first, second, groups), compare(second, first, groups)
    assert out.n == sum(map(sum, out.counts)) == len(rows)
    assert 0 <= out.agreement <= 1 and (math.isnan(out.kappa) or -1 <= out.kappa <= 1)
    np.testing.assert_allclose(
        [out.agreement, out.kappa, *out.kappa_interval, out.spearman],
        [turned.agreement, turned.kappa, *turned.kappa_interval, turned.spearman],
        atol=1e-12,
    )


def test_correlations_are_scipys():
    first, second, groups = two_judges(90)
    first[:9] = [0.25] * 9  # ties
    out = compare(first, second, groups)
    assert out.pearson == pytest.approx(stats.pearsonr(first, second)[0])
    assert out.spearman == pytest.approx(stats.spearmanr(first, second)[0])


def test_questions_are_resampled_not_answers():
    # 20 questions with 10 equal answers each tell as much as 20 answers, and less than 200.
    first, second, _ = two_judges(20, seed=1)
    alone = compare(first, second, [f"q{i}" for i in range(20)])
    ten = compare(first * 10, second * 10, [f"q{i}" for i in range(20)] * 10)
    apart = compare(first * 10, second * 10, [f"q{i}" for i in range(200)])
    assert ten.agreement == alone.agreement and ten.agreement_interval == alone.agreement_interval
    assert ten.kappa_interval == pytest.approx(alone.kappa_interval)
    low, high = apart.agreement_interval
    assert high - low < 0.5 * (ten.agreement_interval[1] - ten.agreement_interval[0])


def test_the_interval_is_scipys_bootstrap():
    first, second, groups = two_judges(150, seed=2)
    same = np.array([(x >= 0.5) == (y >= 0.5) for x, y in zip(first, second, strict=True)]).reshape(-1, 3)
    expected = stats.bootstrap(
        (same.sum(axis=1),), lambda x, axis: x.mean(axis=axis) / 3, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert compare(first, second, groups).agreement_interval == pytest.approx(tuple(expected), abs=0.02)


def test_the_seed_decides():
    first, second, groups = two_judges(30)
    assert compare(first, second, groups) == compare(first, second, groups)
    other = compare(first, second, groups, seed=1)
    assert other.kappa == compare(first, second, groups).kappa
    assert other.kappa_interval != compare(first, second, groups).kappa_interval


def test_what_is_undefined_is_nan():
    nothing = compare([None, 0.5], [0.5, None], ["a", "b"])
    assert (nothing.n, nothing.missing, nothing.counts) == (0, (1, 1), ((0, 0), (0, 0)))
    assert all(math.isnan(x) for x in (nothing.agreement, nothing.kappa, nothing.pearson, *nothing.yes))
    assert all(map(math.isnan, nothing.agreement_interval))
    empty = compare([], [], [])
    assert empty.n == 0 and math.isnan(empty.spearman)
    constant = compare([0.9] * 7, [0.8] * 7, list("abcdefg"))
    assert constant.agreement == 1 and math.isnan(constant.kappa) and math.isnan(constant.pearson)
    assert constant.agreement_interval == (1, 1) and all(map(math.isnan, constant.kappa_interval))
    one_question = compare([0.9, 0.1], [0.9, 0.9], ["a", "a"])
    assert one_question.agreement == 0.5 and all(map(math.isnan, one_question.agreement_interval))


@pytest.mark.parametrize(
    ("first", "second", "groups"),
    [([0.5], [0.5, 0.5], ["a"]), ([0.5], [0.5], []), ([1.5], [0.5], ["a"]), ([0.5], [math.nan], ["a"])],
)
def test_bad_input(first, second, groups):
    with pytest.raises(DataError):
        compare(first, second, groups)


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_scikit_learns(seed):
    metrics = pytest.importorskip("sklearn.metrics")
    first, second, groups = two_judges(50, seed)
    verdicts = [[x >= 0.5 for x in values] for values in (first, second)]
    assert compare(first, second, groups).kappa == pytest.approx(metrics.cohen_kappa_score(*verdicts))
