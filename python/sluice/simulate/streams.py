"""Sequences of several tasks as one stream, as a server of mixed work sees them."""

from __future__ import annotations

from sluice.errors import ConfigError
from sluice.trace import Trace

STREAMS = ("stored", "mix", "balanced")


def order_of(trace: Trace, stream: str) -> list[int]:
    """The positions of a stream's sequences, in order.

    Args:
        trace: Sequences with tasks.
        stream: "stored": as they lie. "mix": the tasks take turns, a sequence each, in complete
            rounds. "balanced": the task with the fewest tokens so far comes next, ties in order of
            appearance, until that task has none left.

    Raises:
        ConfigError: No such stream.
    """
    if stream == "stored":
        return list(range(len(trace.sequences)))
    waiting = {
        task: [i for i, s in enumerate(trace.sequences) if s.task == task] for task in trace.tasks
    }
    if stream == "mix":
        return [i for turn in zip(*waiting.values(), strict=False) for i in turn]
    if stream == "balanced":
        order: list[int] = []
        tokens = dict.fromkeys(waiting, 0)
        while waiting:
            task = min(tokens, key=tokens.__getitem__)
            if not waiting[task]:
                break
            order.append(waiting[task].pop(0))
            tokens[task] += trace.sequences[order[-1]].length
        return order
    raise ConfigError(f"stream: got {stream!r}, expected one of {', '.join(STREAMS)}")
