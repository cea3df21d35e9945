"""Seconds of one core that reading, tokenising and packing a whole benchmark take.

python bench/host_work.py --data hellaswag_val_full.txt.bz2 --tokenizer tokenizer.model
"""

import json
import os
import platform
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path

import click
from tqdm import tqdm

from cupyllama.packing import pack
from cupyllama.sizing import DEFAULT_TOKENS
from cupyllama.tasks.conventions import CONVENTIONS, token_rows
from cupyllama.tasks.files import load_task
from cupyllama.tokenizer import load_tokenizer


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True)
@click.option("--micro-batch-tokens", default=DEFAULT_TOKENS)
@click.option("--repeats", default=5)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(data, tokenizer, micro_batch_tokens, repeats, json_path):
    """Print the median of each phase, on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    phases: dict[str, list[float]] = {"read": [], "tokenise": [], "pack": []}
    for _ in tqdm(range(repeats), leave=False):
        marks = [time.perf_counter()]
        task = load_task(data, "lm-eval")
        marks.append(time.perf_counter())
        tokens = load_tokenizer(tokenizer.parent, tokenizer)
        rows = token_rows(task.questions, tokens, CONVENTIONS["lm-eval"], True, 2048)
        marks.append(time.perf_counter())
        batches = list(pack(rows.rows, micro_batch_tokens, 1024))
        marks.append(time.perf_counter())
        for seconds, begin, end in zip(phases.values(), marks[:-1], marks[1:], strict=True):
            seconds.append(end - begin)
    medians = {phase: statistics.median(seconds) for phase, seconds in phases.items()}
    computed = micro_batch_tokens * len(batches)
    result = {
        "bench": "host_work",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "questions": len(task.questions),
        "rows": len(rows.rows),
        "micro_batch_tokens": micro_batch_tokens,
        "tokens_asked": rows.tokens_asked,
        "tokens_computed": computed,
        "ratio": rows.tokens_asked / computed,
        "seconds": medians,
        "total_seconds": sum(medians.values()),
        "runs": phases,
    }
    parts = " + ".join(f"{phase} {seconds:.2f}" for phase, seconds in medians.items())
    print(
        f" > host work ({len(task.questions)} questions, {len(rows.rows)} rows): "
        f"{result['total_seconds']:.2f} s = {parts} | {rows.tokens_asked} tokens asked, "
        f"{computed} computed, {result['ratio']:.3f} times fewer"
    )
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
