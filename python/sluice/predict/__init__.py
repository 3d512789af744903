"""Predictors: one per file behind one protocol."""

from sluice.predict.base import BasePredictor, Fitting, Shape
from sluice.predict.card import load, save
from sluice.predict.protocol import Guess, Predictor, RoutingEvent, union_probability
from sluice.predict.registry import make, names

__all__ = [
    "BasePredictor",
    "Fitting",
    "Guess",
    "Predictor",
    "RoutingEvent",
    "Shape",
    "load",
    "make",
    "names",
    "save",
    "union_probability",
]
