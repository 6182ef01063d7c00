"""Quantised activations: operators that keep b-bit codes for backward, and the wrapping of models in them."""
