"""The check that precedes every measurement on a GPU: it passes, and it can fail."""

import io

from rich.console import Console

from benchmarks import numerics


def test_kernels_are_within_their_bounds_and_the_check_notices_when_not(monkeypatch):
    console = Console(file=io.StringIO())
    assert numerics.check_kernels(console, interpret=True, few=True) == []
    monkeypatch.setattr(numerics, "BOUNDS", dict.fromkeys(numerics.BOUNDS, 1e-9))
    (wrong,) = numerics.check_kernels(console, interpret=True, few=True)
    assert "causal" in wrong


def test_every_path_of_the_kernels_is_among_the_cases():
    cases = numerics.cases()
    assert {case.form for case in cases} == {"tree", "window", "causal"}
    assert {case.kv_dtype for case in cases} == set(numerics.BOUNDS)
    assert {None, 1, 4} == {case.splits for case in cases}
    assert len({case.shape for case in cases}) == 4  # Scout and Maverick have the same heads
