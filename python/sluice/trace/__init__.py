"""Routing traces: recorded, kept, imported, split."""

from sluice.trace.trace import UNKNOWN, Trace, TraceSequence, concatenate, content_hash

__all__ = ["UNKNOWN", "Trace", "TraceSequence", "concatenate", "content_hash"]
