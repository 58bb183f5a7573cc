"""Kept weights rounded to int8 or int4 after the repair: scales, rounded activations, the model that comes out."""
