"""Predictors: one per file behind one protocol."""

from sluice.predict.protocol import Guess, Predictor, RoutingEvent, union_probability

__all__ = ["Guess", "Predictor", "RoutingEvent", "union_probability"]
