"""Hypothesis for machines that are busy with something else: slowness is not a defect here, nor is
a seed by which many inputs are about nothing. Where a test leaves inputs out, hypothesis goes on
until it has its number of others.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile(
    "patient",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("patient")
