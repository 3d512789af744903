"""Scenarios in which one sample is a generation of a whole model."""
