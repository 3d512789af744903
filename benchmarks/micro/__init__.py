"""Scenarios below a whole model: an experts module, the few-token kernel."""
