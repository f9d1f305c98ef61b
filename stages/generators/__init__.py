"""Generators of features from attributes: one file per way to train them, chosen by name."""
