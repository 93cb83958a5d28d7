"""Receptive fields: what receptive_field.py needs to print the exact field and to measure that of a model."""
