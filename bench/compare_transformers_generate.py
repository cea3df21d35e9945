"""Tokens a second beside transformers' `generate` with a static cache, in the same run.

    python bench/compare_transformers_generate.py --shape llama-7b --json out.json

Both have random weights of one shape, made on the GPU, where both are at once; with --model both
have a checkpoint's, and it is said how many tokens are the same. Prompts are random tokens, all of
one length; the likeliest token is taken, and none ends an answer. transformers runs twice: as it
is, and as torch compiles it, which is its default with such a cache on a GPU, if that can be had.
"""

import json
import statistics
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from comparison import require
from engines import take_turns
from one_line import one_line

from cupyllama.bench.generate import Run
from cupyllama.bench.shapes import model_config, random_stage
from cupyllama.checkpoint.source import open_checkpoint
from cupyllama.cli_options import CountsType
from cupyllama.config import ModelConfig, load_config
from cupyllama.families import family_of
from cupyllama.generation.engine import Event
from cupyllama.generation.session import decode_ops
from cupyllama.loading import load_stage
from cupyllama.parallel.devices import choose_device, storage_dtype
from cupyllama.parallel.world import World
from cupyllama.provenance import versions


class Case(NamedTuple):
    """Queries that are generated side by side."""

    batch_size: int
    prompt_len: int
    new_tokens: int

    def prompts(self, vocab_size: int) -> np.ndarray:
        """(batch, prompt) token ids, the same for every engine; not the special ones at first."""
        generator = np.random.default_rng([self.batch_size, self.prompt_len])
        return generator.integers(4, vocab_size, (self.batch_size, self.prompt_len))


class Outcome(NamedTuple):
    """A case, once."""

    seconds: float
    tokens: np.ndarray  # (batch, new) that were generated


# Of each case what each way to run it came to, or why it cannot be had.
Outcomes = dict[str, dict[Case, Outcome] | str]


class Ours:
    """The engine of `cupyllama generate`, from token ids to the last of them on the host."""

    name = "cupyllama"

    def __init__(self, model: Path | str, cases: Sequence[Case], dtype: str, kind: str):
        device, _ = choose_device(kind)
        config, storage = config_of(model), storage_dtype(dtype)
        if isinstance(model, Path):
            layers = range(config.num_hidden_layers)
            weights = load_stage(open_checkpoint(model), config, layers, storage, device.ops)
        else:
            weights = random_stage(config, storage, device.ops, 1).weights
        self.runs = {}
        for case in cases:
            positions = case.prompt_len + case.new_tokens
            stage = family_of(config).model.Stage(config, weights, decode_ops(device), positions)
            run = Run(World(), device, stage, storage, *case)
            run.rows = case.prompts(config.vocab_size).tolist()
            decoder = run.decoder()
            if decoder is None:
                raise MemoryError(f"no room for the keys and values of {case}")
            self.runs[case] = run, decoder
        self.dtype, self.versions = dtype, versions(device)
        self.info = {"gpu": device.name}

    def run(self) -> Outcomes:
        """Every case."""
        outcomes = {}
        for case, (run, decoder) in self.runs.items():
            tokens: list[list[int]] = [[] for _ in run.rows]

            def on_event(event: Event, tokens: list[list[int]] = tokens) -> None:
                tokens[event.number].append(event.token)

            seconds = run.generate(decoder, case.new_tokens, on_event)
            outcomes[case] = Outcome(seconds, np.array(tokens))
        return {self.name: outcomes}


class Transformers:
    """`generate` with cache_implementation="static", from token ids to tokens on the host."""

    name = "transformers"

    def __init__(self, model: Path | str, cases: Sequence[Case], dtype: str, kind: str):
        import torch
        import transformers

        self.torch, self.cases, self.kind = torch, cases, kind
        self.vocab_size = config_of(model).vocab_size
        if isinstance(model, Path):
            self.model = transformers.AutoModelForCausalLM.from_pretrained(str(model))
            self.model = self.model.to(kind, getattr(torch, dtype))
        else:
            fields = config_of(model).as_hugging_face()
            config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
            usual = torch.get_default_dtype()
            torch.set_default_dtype(getattr(torch, dtype))  # never there in float32
            with torch.device(kind):
                self.model = transformers.AutoModelForCausalLM.from_config(config)
            torch.set_default_dtype(usual)
        self.model.eval()
        self.model.generation_config.eos_token_id = None  # no answer ends early, nor do ours
        self.why_not_compiled = self.compile()
        self.dtype, self.info = dtype, {"why_not_compiled": self.why_not_compiled}
        self.versions = {"torch": torch.__version__, "transformers": transformers.__version__}

    def compile(self) -> str | None:
        """Have every case compiled; why that is not to be had."""
        from torch import _dynamo

        # Else a second batch size would make one graph for all sizes of both, a slower one.
        _dynamo.config.automatic_dynamic_shapes = False
        counters = _dynamo.utils.counters
        counters.clear()
        try:
            for case in self.cases:
                self.generate(case, is_compiled=True)
        except Exception as error:  # no compiler, no Triton, …: each has a type of its own
            return f"{type(error).__name__}: {error}".split("\n")[0]
        if not counters["stats"]["unique_graphs"]:
            return "generate compiled nothing"
        return None

    def run(self) -> Outcomes:
        """Every case, both ways."""
        outcomes: Outcomes = {"eager": self.outcomes(is_compiled=False)}
        outcomes["compiled"] = self.why_not_compiled or self.outcomes(is_compiled=True)
        return outcomes

    def outcomes(self, is_compiled: bool) -> dict[Case, Outcome]:
        """Every case."""
        return {case: self.generate(case, is_compiled) for case in self.cases}

    def generate(self, case: Case, is_compiled: bool) -> Outcome:
        """One case, once."""
        prompts = case.prompts(self.vocab_size)
        begin = time.perf_counter()
        ids = self.torch.tensor(prompts, device=self.kind)
        with self.torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=case.new_tokens,
                cache_implementation="static",
                disable_compile=not is_compiled,
                pad_token_id=0,
            )
        tokens = out[:, case.prompt_len :].cpu().numpy()  # the GPU is done
        seconds = time.perf_counter() - begin
        assert tokens.shape == (case.batch_size, case.new_tokens), f"{tokens.shape} {case}"
        return Outcome(seconds, tokens)


def config_of(model: Path | str) -> ModelConfig:
    """Of a checkpoint's directory, or of the name of a shape."""
    return load_config(model) if isinstance(model, Path) else model_config(model)


def summary(
    cases: Sequence[Case], turns: Sequence[Sequence[Outcomes]], is_same_model: bool
) -> list[dict[str, Any]]:
    """A record a case, with the medians of every way, and ours as a multiple of each.

    Args:
        turns: of ours and of the other engine, those of each run.
    """
    records = []
    for case in cases:
        ways: dict[str, dict[str, Any]] = {}
        for mine in turns:
            for way, first in mine[0].items():
                if isinstance(first, str):
                    ways[way] = {"unavailable": first}
                    continue
                seconds = [outcomes[way][case].seconds for outcomes in mine]
                count = case.batch_size * case.new_tokens
                ways[way] = {
                    "seconds": seconds,
                    "tokens_per_second": count / statistics.median(seconds),
                }
        ours, own = ways[Ours.name], turns[0][-1][Ours.name][case].tokens
        for way, found in ways.items():
            if way == Ours.name or "unavailable" in found:
                continue
            found["ours_times_this"] = ours["tokens_per_second"] / found["tokens_per_second"]
            if is_same_model:
                tokens = turns[1][-1][way][case].tokens
                # Up to the first that differs: what follows another token is another text.
                same = np.cumprod(tokens == own, axis=1).sum()
                found["same_tokens"] = int(same)
        records.append({**case._asdict(), "ways": ways})
    return records


def table(records: Sequence[dict[str, Any]]) -> list[str]:
    """The lines that a person reads."""
    lines = ["batch | prompt |   new | way        |  tokens/s | ms a token | ours / this"]
    for record in records:
        case = f"{record['batch_size']:5} | {record['prompt_len']:6} | {record['new_tokens']:5}"
        for way, found in record["ways"].items():
            if "unavailable" in found:
                lines.append(f"{case} | {way:<10} | not to be had: {found['unavailable']}")
                continue
            rate = found["tokens_per_second"]
            latency = 1e3 * record["batch_size"] / rate
            line = f"{case} | {way:<10} | {rate:9,.1f} | {latency:10.2f}"
            if "ours_times_this" in found:
                line += f" | {found['ours_times_this']:11.2f}"
            if "same_tokens" in found:
                count = record["batch_size"] * record["new_tokens"]
                line += f" | {found['same_tokens']} of {count} tokens are ours"
            lines.append(line)
    return lines


@click.command()
@click.option("--shape", default="llama-7b", help="Of random weights.")
@click.option("--model", type=click.Path(path_type=Path), help="A checkpoint instead.")
@click.option("--batch-sizes", type=CountsType(), default="1,32")
@click.option("--prompt-lens", type=CountsType(), default="4,128")
@click.option("--new-tokens", type=click.IntRange(min=1), default=128)
@click.option("--dtype", default="float16")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda")
@click.option("--repeats", type=click.IntRange(min=1), default=3)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    shape: str,
    model: Path | None,
    batch_sizes: tuple[int, ...],
    prompt_lens: tuple[int, ...],
    new_tokens: int,
    dtype: str,
    device: str,
    repeats: int,
    json_path: Path | None,
) -> None:
    """Run cupyllama and transformers in turn on the same prompts."""
    require("transformers", "transformers torch accelerate")
    cases = [Case(batch, length, new_tokens) for batch in batch_sizes for length in prompt_lens]
    with one_line():
        choose_device(device)
        config_of(model or shape)
    given = (model or shape, cases, dtype, device)
    children, turns = take_turns([(Ours, *given), (Transformers, *given)], repeats)
    records = summary(cases, turns, model is not None)
    print("\n".join(table(records)), flush=True)
    if json_path is not None:
        result = {
            "bench": "compare_transformers_generate",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "gpu": children[0].info["gpu"],
            "versions": {k: v for child in children for k, v in child.versions.items()},
            "shape": shape if model is None else model.resolve().name,
            "dtype": dtype,
            "cases": records,
        }
        json_path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
