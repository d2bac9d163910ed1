"""Mechanisms whose cost grows linearly with the number of tokens."""
