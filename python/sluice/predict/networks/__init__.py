"""Predictors that are trained by gradient descent; import them by name (`sluice.predict.make`)."""
