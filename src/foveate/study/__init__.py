"""Blockwise statistics of attention, and published theory as numerical experiments."""
