"""Hypothesis draws the same examples in every run: a test that fails fails again, and CI says nothing by chance."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.load_profile("fixed")
