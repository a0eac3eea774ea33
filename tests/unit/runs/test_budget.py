"""Error budget: when a run is stopped early."""

from collections import Counter

import pytest

from batchcls.errors import BudgetExceeded
from batchcls.runs.commit import Budget, RunProgress, allowed_fraction


def progress(rows: int, remaining: int, **failures: int) -> RunProgress:
    return RunProgress(rows, remaining, Counter(failures), Counter(failures))


def test_run_stops_as_soon_as_the_budget_is_exceeded():
    budget = Budget(10_000, 0.01)
    budget.check_progress(progress(5_000, 10_000, not_found=100))
    with pytest.raises(
        BudgetExceeded, match=r"101 of 10000 rows failed \(1.01%\).*not_found 101.*retries not_found"
    ):
        budget.check_progress(progress(5_000, 10_000, not_found=101))


def test_unreadable_bucket_stops_a_long_run_early():
    budget = Budget(1_000_000, 0.01)
    budget.check_progress(progress(2_400, 1_000_000, access_denied=2_400))
    with pytest.raises(BudgetExceeded, match="at this rate 1000000 of 1000000 would"):
        budget.check_progress(progress(2_600, 1_000_000, access_denied=2_600))


def test_run_of_failures_in_a_long_manifest_does_not_stop_it():
    budget = Budget(1_000_000, 0.01)
    budget.check_progress(progress(1_000, 1_000_000, not_found=1_000))
    budget.check_progress(progress(20_000, 1_000_000, not_found=5_000))
    budget.check_progress(progress(9_000, 1_000_000, null_id=8_000, duplicate_id=500, not_found=100))


@pytest.mark.parametrize(
    ("rows", "first", "most"),
    [
        (1, True, 0),
        (2, False, 1),
        (5, False, 2),
        (20, False, 5),
        (40, False, 10),
        (299, False, 10),
        (299, True, 29),
        (1_000, False, 10),
        (5_000, False, 50),
        (5_000, True, 500),
        (1_000_000, False, 10_000),
    ],
)
def test_default_budget_of_small_catalogs_and_of_first_runs(rows: int, first: bool, most: int):
    budget = Budget(rows, allowed_fraction("auto", rows, first=first))
    budget.check(Counter(truncated=most))
    with pytest.raises(BudgetExceeded):
        budget.check(Counter(truncated=most + 1))


def test_given_fraction_is_used_and_the_message_names_the_flag_to_accept_the_run():
    assert allowed_fraction(0.0, 299, first=True) == 0.0
    budget = Budget(299, 0.01, folder="out/runs/night")
    with pytest.raises(BudgetExceeded, match=r"out/runs/night/quarantine.*--max-failed-fraction 0\.011$"):
        budget.check(Counter(truncated=3), "row 1 truncated")
    Budget(299, 0.011).check(Counter(truncated=3))


def test_a_reason_can_have_a_separate_budget():
    budget = Budget(1_000, 0.5, {"not_found": 0.001})
    budget.check(Counter(truncated=400, not_found=1))
    with pytest.raises(
        BudgetExceeded, match=r"2 of 1000 rows failed .* --max-failed-fraction-by-reason not_found 0.10%"
    ):
        budget.check(Counter(truncated=400, not_found=2))


def test_failures_of_earlier_sessions_count_for_the_budget_but_not_for_the_rate():
    budget = Budget(10_000, 0.1)
    budget.check_progress(RunProgress(300, 5_000, Counter(truncated=900), Counter()))
    with pytest.raises(BudgetExceeded, match="--retry-quarantine retries all"):
        budget.check_progress(RunProgress(300, 5_000, Counter(truncated=1_001), Counter(truncated=101)))
