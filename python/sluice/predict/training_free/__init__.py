"""Predictors that count, search or run the model's own gates; none descends a gradient."""
