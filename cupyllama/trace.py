"""When each rank did what: busy shares, and a trace for Perfetto or chrome://tracing."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cupyllama.files import write_whole


@dataclass(frozen=True)
class Span:
    """Something that took time."""

    name: str  # load, tokenise, receive, compute or send
    number: int | None  # of the micro-batch
    begin: float  # seconds since the epoch
    end: float


def busy_seconds(spans: Sequence[Span]) -> float:
    """Time in computation."""
    return sum(span.end - span.begin for span in spans if span.name == "compute")


def write_trace(path: Path, ranks: Sequence[tuple[str, Sequence[Span]]]) -> None:
    """Chrome's trace event format: a process a rank, a thread for each kind of work.

    Args:
        ranks: title and spans of each, by rank.
    """
    first = min((span.begin for _, spans in ranks for span in spans), default=0.0)
    kinds = {"tokenise": 0, "load": 1, "receive": 2, "compute": 3, "send": 4}
    events = []
    for rank, (title, spans) in enumerate(ranks):
        events.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": title}})
        for name, thread in kinds.items():
            about = {"pid": rank, "tid": thread}
            events.append({"ph": "M", "name": "thread_name", "args": {"name": name}} | about)
        for span in spans:
            label = span.name if span.number is None else f"{span.name} {span.number}"
            events.append(
                {
                    "ph": "X",
                    "name": label,
                    "pid": rank,
                    "tid": kinds[span.name],
                    "ts": round(1e6 * (span.begin - first), 1),
                    "dur": round(1e6 * (span.end - span.begin), 1),
                }
            )
    write_whole(path, [json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n"])
