"""The command line: options in, one call, the result out."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from cupyllama import __version__
from cupyllama.cli_bench import bench
from cupyllama.cli_generate import generate
from cupyllama.cli_options import (
    FILE,
    PATTERN,
    CountsType,
    LimitType,
    TokensType,
    device_option,
    dtype_option,
    layers_per_stage_option,
    model_option,
    no_more,
    quantize_option,
    quiet_option,
    tensor_parallel_option,
    tokenizer_option,
)
from cupyllama.errors import CupyllamaError
from cupyllama.printing import print_now

INTERRUPTED = 130


class _Failure(click.ClickException):
    """An error of ours as one line and its exit code."""

    def __init__(self, error: CupyllamaError):
        super().__init__(str(error))
        self.exit_code = error.exit_code
        self.hint = error.hint

    def show(self, file: Any = None) -> None:
        click.echo(f"cupyllama: {self.message}", err=True)
        if self.hint:
            click.echo(f"  {self.hint}", err=True)


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CupyllamaError as error:
            raise _Failure(error) from error
        except KeyboardInterrupt:
            click.echo("cupyllama: interrupted", err=True)
            ctx.exit(INTERRUPTED)


@click.group(
    cls=_Group,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
        "max_content_width": 100,
    },
)
@click.version_option(__version__, prog_name="cupyllama")
def cli() -> None:
    """Score multiple-choice benchmarks with large language models, and have them write."""


@cli.command()
@model_option
@click.option("--demo", is_flag=True, help="Score the packaged demo: its model, its questions.")
@tokenizer_option
@click.option("--data", type=FILE, help="Questions: .jsonl or six-line text, plain, .gz or .bz2.")
@click.option("--task", "--tasks", help="Name in the results.  [default: hellaswag]")
@click.option("--limit", type=LimitType(), help="Only the first N questions, or that fraction.")
@device_option
@dtype_option
@quantize_option
@click.option(
    "--micro-batch-tokens",
    type=TokensType(),
    default="auto",
    show_default=True,
    help="Tokens computed at a time.",
)
@click.option(
    "--convention",
    type=click.Choice(["lm-eval", "fastertransformer", "llamacpp"]),
    default="lm-eval",
    show_default=True,
    help="Whose text, tokenisation and normalisation.",
)
@click.option(
    "--bos",
    type=click.Choice(["auto", "yes", "no"]),
    default="auto",
    show_default=True,
    help="Begin each row with BOS. auto: as the convention, else the tokenizer, has it.",
)
@click.option(
    "--replicas",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Pipelines side by side; ranks = replicas × stages × tensor-parallel.",
)
@tensor_parallel_option
@layers_per_stage_option
@click.option("--output", "--output-path", type=FILE, help="Write the results as JSON.")
@click.option("--samples", type=FILE, help="Write one JSON line a question.")
@click.option("--log-samples", is_flag=True, help="The same, beside --output.")
@click.option("--resume", is_flag=True, help="Go on with what --samples has from a broken run.")
@click.option(
    "--compare", type=FILE, help="Say what changed since the run that wrote this --samples file."
)
@click.option("--trace", type=FILE, help="Write when each rank did what, for Perfetto.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, touching no GPU.")
@quiet_option
@no_more
def score(
    model: Path | None,
    demo: bool,
    output: Path | None,
    samples: Path | None,
    log_samples: bool,
    bos: str,
    **options: Any,
) -> None:
    """Score a model on a multiple-choice benchmark.

    \b
    The packaged demo, on whatever this machine has:
      cupyllama score --demo
    All of HellaSwag, from Hugging Face:
      cupyllama score --model path/to/llama-7b --output results.json
    A file of your own, {"query": …, "choices": […], "gold": 0} a line:
      cupyllama score --model path/to/llama-7b --data questions.jsonl
    The layers shared out among four GPUs, or the matrices of each of them:
      mpirun -n 4 cupyllama score --model path/to/llama-30b
      mpirun -n 4 cupyllama score --model path/to/llama-30b --tensor-parallel 4
    """
    from cupyllama.files import is_special
    from cupyllama.score import ScoreOptions
    from cupyllama.score import score as run
    from cupyllama.tasks.files import demo_directory

    if demo == (model is not None):
        raise click.UsageError("Give one of --model DIR and --demo.")
    if demo:
        model = demo_directory()
        options["data"] = options["data"] or model / "questions.jsonl"
        options["task"] = options["task"] or "demo"
    if output is not None and os.path.isdir(output):
        output = output / "results.json"
    if log_samples and samples is None:
        if output is None or is_special(output):
            raise click.UsageError("--log-samples writes beside --output FILE; give that too.")
        samples = output.with_name(f"{output.stem}_samples.jsonl")
    if options["resume"] and (samples is None or is_special(samples)):
        raise click.UsageError("--resume goes on with --samples FILE; give that too.")
    run(
        ScoreOptions(
            model=model,
            output=output,
            samples=samples,
            bos={"yes": True, "no": False}.get(bos),
            **options,
        )
    )


@cli.command()
@click.option(
    "--model",
    type=FILE,
    required=True,
    help="Checkpoint directory: Hugging Face's safetensors or pytorch_model.bin, Meta's .pth, or "
    f"{PATTERN}.",
)
@click.option("--output", type=FILE, required=True, help="Directory to make.")
@click.option(
    "--stages",
    type=click.IntRange(min=1),
    required=True,
    help="Stages of the pipeline: a file for each.",
)
@click.option(
    "--tensor-parallel",
    "--tensor-parallel-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Ranks that share the matrices of each stage: a file for each.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float16", "bfloat16", "float32"]),
    default="auto",
    show_default=True,
    help="Of the weights written. auto: as they are stored.",
)
@click.option(
    "--quantize",
    type=click.Choice(["auto", "none", "fp8", "int8"]),
    default="auto",
    show_default=True,
    help="The layers' matrices. auto: as they are stored.",
)
@click.option(
    "--layers-per-stage",
    type=CountsType(),
    help="Layers of each stage, as in 15,15,15,15.  [default: balanced]",
)
@click.option("--force", is_flag=True, help="Replace a sharded checkpoint that is there.")
@quiet_option
@no_more
def shard(**options: Any) -> None:
    """Rewrite a checkpoint as one file a pipeline stage, for faster loading.

    An interrupted run is taken up by giving the same command again. What is written can be scored
    like the original, with any number of stages and of ranks in each.

    \b
    A file for each of four GPUs:
      cupyllama shard --model path/to/llama-30b --stages 4 --output llama-30b-4
    """
    from cupyllama.checkpoint.shard import ShardOptions
    from cupyllama.checkpoint.shard import shard as run
    from cupyllama.parallel.world import one_process

    one_process("shard writes every rank's file")
    print_now(run(ShardOptions(**options)).as_text() + "\n")


@cli.command()
def doctor() -> None:
    """Say what this machine offers, and the remedy for what is missing.

    \b
      cupyllama doctor
    """
    from cupyllama.doctor import examine

    for finding in examine():
        print_now(f"{finding.mark} {finding.name:<10} {finding.found}\n")
        if finding.remedy:
            print_now(f"  {'':<10} {finding.remedy}\n")


cli.add_command(generate)
cli.add_command(bench)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(cli())
