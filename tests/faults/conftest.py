"""How long the faults are tried for, and the table of what became of them."""

import pytest


@pytest.fixture
def times(request):
    """times(short, long): how often something is tried, in the form asked for."""
    return lambda short, long: long if request.config.getoption("--long-faults") else short


@pytest.fixture
def only_long(request):
    if not request.config.getoption("--long-faults"):
        pytest.skip("takes minutes: pytest --long-faults")


@pytest.fixture
def tally(record_property):
    """tally(fault, tried, lost): a row of the table at the end; lost runs, files and processes fail the test."""
    def add(fault, tried, lost=0):
        record_property("fault", [fault, tried, lost])
        assert tried > 0
        assert lost == 0, f"{fault}: {lost} of {tried} lost"

    return add


def pytest_terminal_summary(terminalreporter):
    rows = [row for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, ())
            for name, row in getattr(report, "user_properties", ()) if name == "fault" and report.when == "call"]
    if rows:
        terminalreporter.section("faults")
        width = max(len(fault) for fault, _, _ in rows)
        terminalreporter.write_line(f"{'fault':<{width}}  {'tried':>6}  {'survived':>8}  {'lost':>4}")
        for fault, tried, lost in rows:
            terminalreporter.write_line(f"{fault:<{width}}  {tried:>6}  {tried - lost:>8}  {lost:>4}")
