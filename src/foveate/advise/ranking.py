"""Which differences are real: noise rules, ranks, Pareto front. Pure functions on numbers (being written)."""

from __future__ import annotations
