"""Spatial gates: maps made by convolution or mixing that multiply the features, without attention logits."""
