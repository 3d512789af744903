"""The physical limit: what bytes take at the rates of a machine, measured or assumed by name."""

from sluice.limit.expected import MoeModel, expected_token, missed_work
from sluice.limit.machines import REFERENCE_MACHINES, device_rates, host_rates
from sluice.limit.model import (
    LayerWork,
    Rates,
    Terms,
    copy_seconds,
    cpu_seconds,
    cpu_share,
    disk_seconds,
    distinct_experts,
    goes_to_cpu,
    layer_terms,
    link_seconds,
    prefetch_seconds,
    step_seconds,
    step_terms,
)
from sluice.limit.predicted import MachinePrediction, Prediction, predict, prediction_text
from sluice.limit.spent import Limit, device_limit, host_limit, limit_of

__all__ = [
    "REFERENCE_MACHINES",
    "LayerWork",
    "Limit",
    "MachinePrediction",
    "MoeModel",
    "Prediction",
    "Rates",
    "Terms",
    "copy_seconds",
    "cpu_seconds",
    "cpu_share",
    "device_limit",
    "device_rates",
    "disk_seconds",
    "distinct_experts",
    "expected_token",
    "goes_to_cpu",
    "host_limit",
    "host_rates",
    "layer_terms",
    "limit_of",
    "link_seconds",
    "missed_work",
    "predict",
    "prediction_text",
    "prefetch_seconds",
    "step_seconds",
    "step_terms",
]
