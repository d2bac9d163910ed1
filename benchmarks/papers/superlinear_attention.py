"""Superlinear attention (arXiv 2601.18401): exponents of its cost, and where it crosses dense attention."""

import math
from collections.abc import Iterator

from benchmarks.papers import Figure
from foveate.routing.spans import Stripe

BASE = Stripe(index=3)
UPSCALED = Stripe(index=3, search_power=0.55, span_power=0.5)
SPANS = 2


def figures() -> Iterator[Figure]:
    """Yield the exponents for two configurations, products at long contexts, and the share of positions reached."""
    for name, stripe, printed in (("base", BASE, "1.5"), ("upscaled", UPSCALED, "1.54")):
        # A query's products grow by one power less than those of the sequence.
        search = math.log(len(stripe.distances(2**24)) / len(stripe.distances(2**22)), 4)
        every = math.log(products(2**24, stripe) / products(2**22, stripe), 4)
        yield Figure(
            claim=f"exponents in the number of tokens of the search, and of search and attention, {name}",
            paper=printed,
            ours=f"{1 + search:.2f}, {1 + every:.2f}",
            how=f"products of one query at 4M and 16M tokens; {stripe}, {SPANS} spans",
        )
    for n in (2**16, 10**6, 10**7):
        total = products(n, UPSCALED)
        yield Figure(
            claim=f"products of one query with {n} tokens behind it, as a share of dense attention's",
            paper="not given",
            ours=f"{total} = {total / n:.5f}",
            how=f"{UPSCALED}, {SPANS} spans",
        )
    missed = sum(uncovered(n, BASE) for n in (1000, 10**5, 10**6))
    yield Figure(
        claim="positions that neither the window nor any candidate span reaches",
        paper="none",
        ours=str(missed),
        how="queries at 1000, 100000 and 1000000 with spans of 2 sqrt(t)",
    )


def products(n: int, stripe: Stripe) -> int:
    """Return the products of search, spans and window for the query that sees n tokens."""
    return len(stripe.distances(n)) + SPANS * (stripe.longest(n) + stripe.window)


def uncovered(n: int, stripe: Stripe) -> int:
    """Count the positions up to n that lie in no candidate span and not in the window."""
    missed, left = 0, n - stripe.window
    reach = math.ceil(stripe.backward * n**stripe.span_power)
    for distance in stripe.distances(n):
        anchor = n - distance
        missed += max(left - 1 - anchor, 0)
        left = max(anchor - reach, 0)
    return missed + left
