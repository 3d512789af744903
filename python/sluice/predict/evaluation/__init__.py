"""How good predictors are: recall, precision, B_acc, calibration, with intervals."""

from sluice.predict.evaluation.evaluate import BATCHES, SET_SIZES, evaluate, scores_of
from sluice.predict.evaluation.results import Bin, Depth, Evaluation, HorizonResult, Union

__all__ = [
    "BATCHES",
    "SET_SIZES",
    "Bin",
    "Depth",
    "Evaluation",
    "HorizonResult",
    "Union",
    "evaluate",
    "scores_of",
]
