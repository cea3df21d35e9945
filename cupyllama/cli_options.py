"""Options that several commands have, and the types of their values."""

from pathlib import Path
from typing import Any

import click


class FileType(click.Path):
    """A path; none that is empty, as of a shell's variable that is not set."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


class TokensType(click.ParamType):
    """A positive number of tokens, or auto."""

    name = "auto|N"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | None:
        if value is None or isinstance(value, int) or value == "auto":
            return None if value == "auto" else value
        if not value.isdecimal() or int(value) < 1:
            self.fail(f"{value!r} is neither auto nor a number of tokens", param, ctx)
        return int(value)


class PositiveType(click.ParamType):
    """A finite number above 0."""

    name = "float"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if not 0 < number < float("inf"):
            self.fail(f"{value} is not a finite number above 0", param, ctx)
        return number


class LimitType(PositiveType):
    """A number of questions, or a fraction of them below 1."""

    name = "N|fraction"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        limit = super().convert(value, param, ctx)
        if limit >= 1 and limit != int(limit):
            self.fail(f"{value} is neither a number of questions nor a fraction", param, ctx)
        return limit


class CountsType(click.ParamType):
    """Positive numbers with commas between them."""

    name = "N,N,…"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        counts = value.split(",")
        if not all(count.strip().isdecimal() and int(count) for count in counts):
            self.fail(f"{value!r} is no list of positive numbers", param, ctx)
        return tuple(map(int, counts))


class KindsType(click.ParamType):
    """Kinds of quantization with commas between them."""

    name = "KIND,KIND,…"
    kinds = ("none", "fp8", "int8")

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        found = tuple(kind.strip() for kind in value.split(","))
        for kind in found:
            if kind not in self.kinds or found.count(kind) > 1:
                self.fail(f"{value!r} is no list of {', '.join(self.kinds)}", param, ctx)
        return found


FILE = FileType(path_type=Path)
PATTERN = "Metaseq's 'DIR/reshard-model_part-*.pt'"


def _refuse_more(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> None:
    if values:
        raise click.UsageError(
            f"{values[0]} follows no option. If the shell made it of a pattern, put that in "
            "quotes: --model 'DIR/reshard-model_part-*.pt'.",
            ctx,
        )


no_more = click.argument("more", nargs=-1, metavar="", expose_value=False, callback=_refuse_more)
model_option = click.option("--model", type=FILE, help=f"Checkpoint directory, or {PATTERN}.")
tokenizer_option = click.option(
    "--tokenizer",
    type=FILE,
    help="tokenizer.model, tokenizer.json or vocab.json beside merges.txt, if elsewhere.",
)
device_option = click.option(
    "--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float16", "bfloat16", "float32"]),
    default="auto",
    show_default=True,
    help="Of weights and activations; sums are float32. auto: as saved, float32 on a CPU.",
)
quantize_option = click.option(
    "--quantize",
    type=click.Choice(["auto", "none", "fp8", "int8"]),
    default="auto",
    show_default=True,
    help="The layers' matrices, and in fp8 what they multiply. auto: as they are stored.",
)
tensor_parallel_option = click.option(
    "--tensor-parallel",
    "--tensor-parallel-size",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Ranks that share the matrices of each stage.",
)
layers_per_stage_option = click.option(
    "--layers-per-stage", type=CountsType(), help="Not balanced, but these: 15,15,15,15."
)
quiet_option = click.option("--quiet", is_flag=True, help="No progress on stderr.")
