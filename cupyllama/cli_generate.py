"""`cupyllama generate`: text from a model, for a prompt, a file of prompts, or a person."""

from pathlib import Path
from typing import Any

import click

from cupyllama.cli_options import (
    FILE,
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

_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
_DRAWS = ("top_k", "top_p", "seed")  # of no effect where the most likely token is taken


@click.command()
@model_option
@click.option("--demo", is_flag=True, help="The packaged demo's model.")
@tokenizer_option
@click.option("--prompt", help="Text to go on from.")
@click.option(
    "--prompts",
    type=FILE,
    help='A prompt a line, or in a .jsonl file {"prompt": …} a line. Without it and --prompt, '
    "lines of stdin, whose end Open MPI 5's mpirun does not pass on.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Where an answer ends that does not end by itself.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, max=100),
    help="0: always the most likely token.  [default: 0; 1 with --top-k or --top-p]",
)
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from the K most likely tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Draw from the fewest tokens that have this probability together.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(min=0, min_open=True, max=100),
    help="Above 1, tokens that were there are less likely.  [default: 1]",
)
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), help="Of draws.  [default: 0]")
@click.option(
    "--beam-width",
    type=click.IntRange(min=1, max=256),
    help="Search for the likeliest text, not sampled.",
)
@click.option(
    "--stop",
    "stop_texts",
    multiple=True,
    metavar="TEXT",
    help="Ends an answer, and is not printed; several may be given.",
)
@device_option
@dtype_option
@quantize_option
@tensor_parallel_option
@layers_per_stage_option
@click.option(
    "--batch-size",
    type=click.IntRange(min=1, max=1024),
    help="Prompts answered at a time.  [default: 32]",
)
@click.option(
    "--output",
    type=FILE,
    help="Write one JSON line a prompt; FILE.partial has them as they come, till all are there.",
)
@quiet_option
@no_more
def generate(model: Path | None, demo: bool, **options: Any) -> None:
    """Continue prompts with a model.

    \b
    One prompt, or a conversation with a base model, line by line:
      cupyllama generate --model path/to/llama-7b --prompt "The man on the roof"
      cupyllama generate --model path/to/llama-7b
    A file of prompts, sampled, the same every time:
      cupyllama generate --model path/to/opt-30b --prompts prompts.txt --output answers.jsonl \\
        --top-k 20 --top-p 0.95 --temperature 0.7 --seed 1
    The layers shared out among four GPUs:
      mpirun -n 4 cupyllama generate --model path/to/llama-30b --prompt "The man on the roof"
    """
    from cupyllama.generate import GenerateOptions
    from cupyllama.generate import generate as run
    from cupyllama.tasks.files import demo_directory

    if demo == (model is not None):
        raise click.UsageError("Give one of --model DIR and --demo.")
    if options["prompt"] is not None and options["prompts"] is not None:
        raise click.UsageError("Give one of --prompt TEXT and --prompts FILE.")
    given = [name for name in _SAMPLING if options[name] is not None]
    if options["beam_width"] is not None and given:
        raise click.UsageError(
            f"--beam-width searches for the likeliest text, and --{given[0].replace('_', '-')} is "
            "for sampling: give one of them."
        )
    if options["beam_width"] is not None and options["batch_size"] is not None:
        raise click.UsageError(
            "--beam-width answers one prompt after the other, and --batch-size is for prompts "
            "answered side by side: give one of them."
        )
    if options["batch_size"] is None:
        del options["batch_size"]
    drawn = [name for name in _DRAWS if options[name] is not None]
    if options["temperature"] == 0 and drawn:
        raise click.UsageError(
            "--temperature 0 takes the most likely token, and "
            f"--{drawn[0].replace('_', '-')} is for draws: give one of them."
        )
    if options["temperature"] is None and (options["top_k"] or options["top_p"]):
        options["temperature"] = 1.0
    if options["temperature"] is None and drawn:
        raise click.UsageError(
            "--seed is for draws, and without --temperature, --top-k or --top-p the most likely "
            "token is taken: give one of these too."
        )
    run(GenerateOptions(model=demo_directory() if demo else model, **options))
