"""`cupyllama bench`: what is measured on this machine, and what is predicted from it."""

from pathlib import Path
from typing import Any

import click

from cupyllama.cli_options import FILE, CountsType, KindsType, PositiveType
from cupyllama.printing import print_now

_TOKENS = click.IntRange(min=1)
_REPEATS = click.IntRange(min=1)

_data = click.option("--data", type=FILE, help="Questions.  [default: generated token rows]")
_tokenizer = click.option(
    "--tokenizer", type=FILE, help="For --data: tokenizer.model, tokenizer.json or vocab.json."
)
_json = click.option("--json", "output", type=FILE, help="Write what was measured as JSON.")
_dtype = click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default="float16",
    show_default=True,
)


def _shape(several: bool, *default: str) -> Any:
    return click.option(
        "--shape",
        "shapes" if several else "shape",
        multiple=several,
        default=default if several else default[0],
        show_default=True,
        help="llama-7b, llama-13b, llama-30b, llama-65b, llama-2-70b, llama-3-8b, opt-6.7b, "
        "opt-13b, opt-30b or opt-66b.",
    )


def _plot(what: str) -> Any:
    return click.option("--plot", type=FILE, help=f"Draw {what}: .png, .svg, .pdf.")


@click.group()
def bench() -> None:
    """Measure and predict speed.

    \b
      cupyllama bench kernels --plot roofline.png
      cupyllama bench score --shape llama-30b
      cupyllama bench generate --shape opt-30b
      cupyllama bench pipeline results.json
    """


@bench.command("kernels")
@_shape(True, "llama-7b", "llama-30b")
@_dtype
@click.option("--micro-batch-tokens", type=_TOKENS, default=8192, show_default=True)
@click.option("--repeats", type=_REPEATS, default=50, show_default=True)
@_data
@_tokenizer
@_json
@_plot("a roofline")
def bench_kernels(
    shapes: tuple[str, ...],
    dtype: str,
    micro_batch_tokens: int,
    repeats: int,
    data: Path | None,
    tokenizer: Path | None,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Check every kernel against its definition, and time it beside what the GPU can do.

    The ceiling is a copy within the device or the matrix products of a layer, in the same run.

    \b
      cupyllama bench kernels --shape llama-30b --json kernels.json --plot roofline.png
    """
    device = _ready(shapes, output, plot, data=data, tokenizer=tokenizer)
    from cupyllama.bench.kernels import kernels_table, measure_kernels
    from cupyllama.bench.measure import enough_memory

    with enough_memory(device):
        measured = measure_kernels(
            device, list(shapes), dtype, micro_batch_tokens, repeats, data, tokenizer
        )
    _finish(measured, kernels_table(measured), output)
    if plot is not None:
        from cupyllama.bench.plot import plot_kernels

        plot_kernels(measured, plot)


@bench.command("gemm")
@_shape(True, "llama-7b", "llama-30b")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32", "fp8"]),
    default="float16",
    show_default=True,
)
@click.option(
    "--tokens", type=_TOKENS, multiple=True, default=(1024, 2048, 8192), show_default=True
)
@click.option("--repeats", type=_REPEATS, default=5, show_default=True)
@_json
def bench_gemm(
    shapes: tuple[str, ...], dtype: str, tokens: tuple[int, ...], repeats: int, output: Path | None
) -> None:
    """Time the matrix products of a layer, and of the head, beside CuPy's own.

    \b
      cupyllama bench gemm --shape llama-30b --tokens 8192
    """
    device = _ready(shapes, output)
    from cupyllama.bench.gemm import gemm_table, measure_gemm
    from cupyllama.bench.measure import enough_memory

    with enough_memory(device):
        measured = measure_gemm(device, list(shapes), dtype, list(tokens), repeats)
    _finish(measured, gemm_table(measured), output)


@bench.command("score")
@_shape(False, "llama-7b")
@click.option(
    "--questions", type=click.IntRange(min=1), default=1000, show_default=True, help="Of the file."
)
@_dtype
@click.option(
    "--quantize",
    type=click.Choice(["none", "fp8", "int8"]),
    default="none",
    show_default=True,
    help="The layers' matrices, and in fp8 what they multiply.",
)
@click.option(
    "--micro-batch-tokens", type=_TOKENS, multiple=True, default=(32768,), show_default=True
)
@click.option("--repeats", type=_REPEATS, default=3, show_default=True)
@_data
@_tokenizer
@_json
@_plot("where the time of a layer goes")
def bench_score(
    shape: str,
    questions: int,
    dtype: str,
    quantize: str,
    micro_batch_tokens: tuple[int, ...],
    repeats: int,
    data: Path | None,
    tokenizer: Path | None,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Time the evaluation phase with random weights of a published shape.

    The questions are spread over the file; the ceiling is what a layer's matrix products reach
    alone in the same run.

    \b
      cupyllama bench score --shape llama-30b --quantize fp8
      cupyllama bench score --data hellaswag_val.jsonl --tokenizer tokenizer.model
    """
    device = _ready((shape,), output, plot, data=data, tokenizer=tokenizer)
    from cupyllama.bench.measure import enough_memory
    from cupyllama.bench.score import measure_score, score_table

    with enough_memory(device):
        measured = measure_score(
            *(device, shape, questions, dtype, list(micro_batch_tokens), repeats, data, tokenizer),
            quantize=None if quantize == "none" else quantize,
        )
    _finish(measured, score_table(measured), output)
    if plot is not None:
        from cupyllama.bench.plot import plot_score

        plot_score(measured, plot)


@bench.command("generate")
@_shape(False, "opt-30b")
@click.option(
    "--batch-sizes",
    type=CountsType(),
    default="1,2,4,8,16,32,64,128,256,512,1024",
    show_default=True,
    help="Queries side by side.",
)
@click.option("--prompt-len", type=_TOKENS, default=4, show_default=True, help="Tokens of each.")
@click.option("--new-tokens", type=_TOKENS, default=256, show_default=True, help="After them.")
@_dtype
@click.option(
    "--quantize",
    type=KindsType(),
    default="none",
    show_default=True,
    help="The layers' matrices: a curve each of none, fp8, int8.",
)
@click.option("--repeats", type=_REPEATS, default=1, show_default=True)
@_json
@_plot("throughput against latency")
def bench_generate(
    shape: str,
    batch_sizes: tuple[int, ...],
    prompt_len: int,
    new_tokens: int,
    dtype: str,
    quantize: tuple[str, ...],
    repeats: int,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Time generation with random weights of a published shape, at many batch sizes.

    Latency is the time of a batch by the new tokens of a query. The floor is the bytes of weights,
    keys and values that a token reads, at the rate of a copy within the device in the same run.
    Under mpirun, the ranks share the matrices of each layer. A sweep that ends early leaves what it
    has measured beside the --json file, in FILE.partial.

    \b
      cupyllama bench generate --shape opt-30b --quantize none,int8 --plot sweep.png
      mpirun -n 2 cupyllama bench generate --shape opt-30b
    """
    from cupyllama.bench.generate import generate_table, measure_generate
    from cupyllama.bench.measure import enough_memory, gpu_of
    from cupyllama.bench.plot import plot_generate
    from cupyllama.files import is_special, partial_of, write_json
    from cupyllama.parallel.world import open_world

    kept = output is not None and not is_special(output)
    partial = partial_of(output) if kept else None

    def keep(measured: dict[str, Any]) -> None:
        """What is measured so far, for a sweep that ends early."""
        if partial is not None and world.rank == 0:
            write_json(partial, {"unfinished": True, **measured})

    world = open_world(f"What was measured, if anything was, is in {partial}." if partial else "")
    with world.together():
        _check_ends((shape,), output, plot)
        device = gpu_of(world)
    with world.alone(), enough_memory(device):
        measured = measure_generate(
            *(device, shape, batch_sizes, prompt_len, new_tokens, dtype, quantize, repeats, world),
            on_run=keep,
        )
        if world.rank == 0:
            _finish(measured, generate_table(measured), output)
            if partial is not None:
                partial.unlink(missing_ok=True)
            if plot is not None:
                plot_generate(measured, plot)
    world.close()


@bench.command("load")
@click.option("--model", type=FILE, help="Checkpoint directory.  [default: one is written]")
@_shape(False, "llama-7b")
@click.option("--folder", type=FILE, help="Where it is written.  [default: the system's own]")
@_dtype
@click.option("--repeats", type=_REPEATS, default=3, show_default=True)
@_json
def bench_load(
    model: Path | None,
    shape: str,
    folder: Path | None,
    dtype: str,
    repeats: int,
    output: Path | None,
) -> None:
    """Time the way of a checkpoint from the page cache to the GPU, beside a plain pinned copy.

    \b
      cupyllama bench load --shape llama-7b --folder /tmp
      cupyllama bench load --model path/to/llama-7b
    """
    device = _ready((shape,), output)
    from cupyllama.bench.load import load_table, measure_load
    from cupyllama.bench.measure import enough_memory

    with enough_memory(device):
        measured = measure_load(device, model, shape, folder, dtype, repeats)
    _finish(measured, load_table(measured), output)


@bench.command("pipeline")
@click.argument("results", type=FILE)
@click.option("--ranks-per-host", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--link-gbs", type=PositiveType(), help="GB/s between ranks of a host.  [default: measured]"
)
@click.option(
    "--network-gbs", type=PositiveType(), default=25.0, show_default=True, help="Between hosts."
)
def bench_pipeline(
    results: Path, ranks_per_host: int, link_gbs: float | None, network_gbs: float
) -> None:
    """Predict a measured run on 1 to 64 ranks and several hosts, one GPU a rank.

    RESULTS is what `score --output` wrote: it has the times of the stages and links.

    \b
      cupyllama bench pipeline results.json --ranks-per-host 4
    """
    from cupyllama.bench.pipeline import predict, read_run

    run = read_run(results)
    print_now(f"measured: {run.ranks} ranks, {run.seconds:.1f} s\n")
    print_now(f"{'ranks':>6}{'hosts':>7}{'seconds':>10}{'questions/s':>13}{'bubble':>9}\n")
    for line in predict(run, ranks_per_host, link_gbs, network_gbs):
        print_now(
            f"{line.ranks:>6}{line.hosts:>7}{line.seconds:>10.2f}"
            f"{line.questions_per_second:>13,.1f}{100 * line.bubble:>8.1f}%\n"
        )


def _ready(
    shapes: tuple[str, ...], output: Path | None, plot: Path | None = None, **read: Path | None
) -> Any:
    """The GPU of a process that is alone, after `_check_ends`."""
    from cupyllama.bench.measure import one_gpu

    _check_ends(shapes, output, plot, **read)
    return one_gpu()


def _check_ends(
    shapes: tuple[str, ...], output: Path | None, plot: Path | None, **read: Path | None
) -> None:
    """A look at all that could end the run when it is over; `read`: files by option."""
    from cupyllama.bench.plot import check_plot
    from cupyllama.bench.shapes import model_config
    from cupyllama.files import check_apart, check_writable

    for shape in shapes:
        model_config(shape)
    files = {f"--{option}": path for option, path in read.items()}
    check_apart(files, {"--json": output, "--plot": plot})
    if plot is not None:
        check_plot(plot)
    for path in (output, plot):
        if path is not None:
            check_writable(path)


def _finish(measured: dict[str, Any], text: str, output: Path | None) -> None:
    from cupyllama.files import write_json

    if output is not None:
        write_json(output, measured)
    print_now(text + "\n")
