"""Some of a test's cases, others at each run, and with METAFAST_FULL=1 all."""

from __future__ import annotations

import os
import random

FULL = os.environ.get("METAFAST_FULL") == "1"
# The workers of pytest-xdist have to collect the same cases.
_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID")


def half(cases):
    """Half of the cases, rounded up."""
    return _part(cases, 2)


def third(cases):
    """A third of the cases, rounded up."""
    return _part(cases, 3)


def quarter(cases):
    """A quarter of the cases, rounded up."""
    return _part(cases, 4)


def _part(cases, divisor):
    cases = list(cases)
    return some(cases, -(-len(cases) // divisor))


def some(cases, number):
    """``number`` of the cases, in their order."""
    cases = list(cases)
    if FULL or number >= len(cases):
        return cases
    return [cases[index] for index in sorted(random.Random(_RUN).sample(range(len(cases)), number))]
