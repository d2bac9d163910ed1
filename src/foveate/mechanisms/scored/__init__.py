"""Mechanisms that change how strongly, or by which rule, tokens attend."""
