"""Traces: kept, imported, split, recorded."""
