"""Headline figures of the papers that can be checked here, each with the paper's number beside ours.

One file per system, named after its key, with a function `figures()` that yields `Figure` records. What needs
a GPU or trained weights of the authors is not here. `python -m benchmarks.papers` writes docs/papers.md.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a paper, and the same one computed here.

    Attributes:
        claim: what is counted or measured, in a few words.
        paper: the paper's number as printed there, or "not given".
        ours: our number, computed by the function that yields this record, never typed in.
        how: the setting in which ours was computed: shapes, data, what stands in for what.
    """

    claim: str
    paper: str
    ours: str
    how: str
