"""Predictors: one per file behind one protocol."""

from sluice.predict.base import BasePredictor, Fitting, Shape
from sluice.predict.card import load, save
from sluice.predict.evaluation import Evaluation, evaluate, scores_of
from sluice.predict.protocol import Guess, Predictor, RoutingEvent, union_probability
from sluice.predict.registry import make, names
from sluice.predict.train import Training, train

__all__ = [
    "BasePredictor",
    "Evaluation",
    "Fitting",
    "Guess",
    "Predictor",
    "RoutingEvent",
    "Shape",
    "Training",
    "evaluate",
    "load",
    "make",
    "names",
    "save",
    "scores_of",
    "train",
    "union_probability",
]
