"""The statistics, against scipy, hand-worked cases and simulation."""
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, mannwhitneyu

from answer import flag_place
from measures import (ONSET_BINS, auroc, auroc_difference, auroc_interval, binomial_tail, catch_difference,
                      clopper_pearson, conformal_threshold, first_above, mean_and_spread, onset_bin, runs, share,
                      sustained, threshold_at, tpr_at)

scores = st.lists(st.integers(0, 8).map(lambda x: x / 8), min_size=1, max_size=40)  # few values, so many ties


@settings(max_examples=100, deadline=None)
@given(scores, scores)
def test_auroc_is_mann_whitneys_u_ties_included(a, b):
    assert auroc(a, b) == pytest.approx(mannwhitneyu(a, b).statistic / (len(a) * len(b)))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), st.data())
def test_clopper_pearson_is_scipys_exact_interval(n, data):
    k = data.draw(st.integers(0, n))
    reference = binomtest(k, n).proportion_ci(0.95, method="exact")
    assert clopper_pearson(k, n) == pytest.approx((reference.low, reference.high), abs=1e-9)


def test_clopper_pearson_at_its_ends():
    assert clopper_pearson(0, 10) == pytest.approx((0, 1 - 0.025 ** 0.1))  # closed form, where nothing was seen
    assert clopper_pearson(10, 10) == pytest.approx((0.025 ** 0.1, 1))
    assert clopper_pearson(0, 0) == (0, 1)


def test_binomial_tail_is_scipys():
    for n, k, p in ((1, 1, 0.3), (10, 0, 0.2), (360, 4, 0.01), (50, 51, 0.5)):
        assert binomial_tail(k, n, p) == pytest.approx(binom.sf(k - 1, n, p), abs=1e-12)


def test_the_bootstrap_interval_covers_the_true_area_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    truth = 0.5 * (1 + math.erf(1 / 2))  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    for i in range(200):
        low, high = auroc_interval(rng.normal(1, 1, 60), rng.normal(0, 1, 80), n_draws=400, seed=i)
        hits += low <= truth <= high
    assert binomtest(hits, 200, 0.95).pvalue > 1e-3


def test_the_bootstrap_interval_of_a_perfect_separation_is_a_point():
    assert auroc_interval([2.0, 3.0], [0.0, 1.0]) == (1.0, 1.0)
    assert auroc_interval([], [1.0]) is None and auroc([], [1.0]) is None


def test_the_difference_of_two_detectors_on_the_same_answers():
    a, b = [3.0, 1.0, 2.0], [0.0, 2.5]
    assert auroc_difference(a, b, a, b) == (0, 0, 0)
    assert auroc_difference([1.0], [0.0], [0.0], [1.0]) == (1, 1, 1) and auroc_difference([], b, [], b) is None
    rng, hits = np.random.default_rng(1), 0
    phi = lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2)))
    truth = phi(1.2 / math.sqrt(2)) - phi(0.8 / math.sqrt(2))
    for i in range(200):  # the second detector's noise is half the first one's, so that they go together
        noise = [(rng.normal(size=n), rng.normal(size=n)) for n in (60, 80)]
        (x, y), (u, v) = ((n, 0.5 ** 0.5 * (n + m)) for n, m in noise)
        _, low, high = auroc_difference(x + 1.2, u, y + 0.8, v, n_draws=400, seed=i)
        hits += low <= truth <= high
    assert binomtest(hits, 200, 0.95).pvalue > 1e-3


def test_how_much_more_is_caught_at_equal_false_positives():
    """Thresholds by hand: one of four negatives may cross, so 2 and then 30; 3 and 9 are caught, then 90 alone."""
    more, *_ = catch_difference([1.0, 3.0, 9.0], [0.0, 1.0, 2.0, 5.0], [90.0, 10.0, 20.0], [30.0, 0.0, 40.0, 1.0], 0.25)
    assert more == pytest.approx(2 / 3 - 1 / 3)
    x, y = [3.0, 1.0, 2.0], [0.0, 2.5]
    assert catch_difference(x, y, x, y, 0.5) == (0, 0, 0) and catch_difference([], y, [], y, 0.5) is None
    assert catch_difference([1.0], [0.0], [0.0], [1.0], 0.01) == (1, 1, 1)
    assert catch_difference([1.0], [0.0], [0.0], [1.0], 1.0) == (0, 0, 0)  # all may cross
    rng, hits = np.random.default_rng(2), 0
    above = lambda shift: 0.5 * math.erfc((1.2815515655446 - shift) / math.sqrt(2))  # a tenth of a normal's lies there
    for i in range(200):
        noise = [(rng.normal(size=n), rng.normal(size=n)) for n in (150, 400)]
        (p, q), (u, v) = ((n, 0.5 ** 0.5 * (n + m)) for n, m in noise)
        _, low, high = catch_difference(p + 1.6, u, q + 0.8, v, 0.1, n_draws=300, seed=i)
        hits += low <= above(1.6) - above(0.8) <= high
    assert binomtest(hits, 200, 0.95).pvalue > 1e-3


@settings(max_examples=200, deadline=None)
@given(scores, st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.5, 1.0]))
def test_the_threshold_at_a_rate_is_the_lowest_that_keeps_it(negative, fpr):
    t = threshold_at(negative, fpr)
    rate = lambda t: sum(x > t for x in negative) / len(negative)
    assert rate(t) <= fpr
    lower = [x for x in negative if x < t]
    assert not lower or rate(max(lower)) > fpr


def test_tpr_at_a_false_positive_rate_by_hand():
    negative, positive = [i / 100 for i in range(100)], [0.985, 0.985, 0.99, 0.5]
    assert threshold_at(negative, 0.01) == 0.98             # only 0.99 lies above
    assert tpr_at(positive, negative, 0.01)["share"] == 0.75
    assert tpr_at(positive, negative, 0.001)["k"] == 0      # no negative may cross: 0.99 is not above 0.99
    assert tpr_at(positive, [], 0.01) is None


def test_the_conformal_quantile_by_hand():
    assert conformal_threshold([i / 100 for i in range(99)], 0.01) == 0.98     # rank 99 of 99
    assert conformal_threshold(list(range(1, 200)), 0.01) == 198               # rank 198 of 199
    assert conformal_threshold([i / 10 for i in range(1, 10)], 0.2) == 0.8     # rank 8 of 9
    assert conformal_threshold([0.1] * 98, 0.01) == 1.0                        # too few: nothing is flagged
    assert conformal_threshold([], 0.01) == 1.0


@pytest.mark.parametrize("n, alpha", [(99, 0.01), (150, 0.05), (40, 0.1)])
def test_the_threshold_holds_its_rate_on_simulated_scores(n, alpha):
    """Over 4000 calibrations on U(0,1) the mean false-positive rate, exactly 1 - threshold, is alpha at most; for
    scores without ties its expectation is 1 - ceil((n+1)(1-alpha))/(n+1)."""
    rng = np.random.default_rng(0)
    rates = 1 - np.array([conformal_threshold(rng.random(n), alpha) for _ in range(4000)])
    error = rates.std() / 4000 ** 0.5
    expected = 1 - np.ceil(np.round((n + 1) * (1 - alpha), 9)) / (n + 1)
    assert rates.mean() < alpha + 4 * error and abs(rates.mean() - expected) < 4 * error


@pytest.mark.parametrize("delay, bin", [(0, "hit"), (1, "1-32"), (32, "1-32"), (33, "33-64"), (64, "33-64"),
                                        (65, "65-128"), (128, "65-128"), (129, "129-256"), (256, "129-256"),
                                        (257, ">256")])
def test_the_edges_of_the_onset_bins(delay, bin):
    probs = [0.1] * (5 + delay) + [0.9, 0.9]
    assert onset_bin(probs, onset=5, threshold=0.5) == (bin, delay) and bin in ONSET_BINS


def test_an_answer_flagged_before_its_onset_is_ahead_and_one_never_flagged_is_missed():
    assert onset_bin([0.1, 0.9, 0.9], onset=2, threshold=0.5) == ("ahead", None)
    assert onset_bin([0.5, 0.5, 0.5], onset=2, threshold=0.5) == ("missed", None)  # the flag needs f above


def test_runs_share_and_spread_by_hand():
    assert runs([0.9, 0.9, 0.1, 0.9, 0.2], 0.5) == (3, 2) and runs([], 0.5) == (0, 0)
    assert share([True, False, False, True])["share"] == 0.5 and share([])["share"] is None
    assert mean_and_spread([1.0, 3.0]) == (2.0, math.sqrt(2)) and mean_and_spread([1.0]) == (1.0, None)


@pytest.mark.parametrize("f, debounce, wanted", [
    ([0.1, 0.9, 0.3], 1, [0.1, 0.9, 0.3]), ([0.1, 0.9, 0.3], 2, [0.1, 0.1, 0.3]),
    ([0.9, 0.1, 0.4, 0.5], 2, [0.9, 0.1, 0.1, 0.4]), ([0.2, math.nan, 0.9], 2, [0.2, 0.2, 0.9]),
    ([0.2, 0.8, 0.7, 0.9], 3, [0.2, 0.2, 0.2, 0.7]), ([], 2, [])])
def test_f_counts_where_it_lasts_and_at_the_first_position(f, debounce, wanted):
    assert sustained(f, debounce) == wanted


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0, 1), st.integers(1, 4))
def test_the_score_is_above_the_threshold_where_the_flag_is_raised(f, threshold, debounce):
    assert first_above(sustained(f, debounce), threshold) == flag_place(f, threshold, debounce)[0]
