"""Plots of what benches found. matplotlib is optional and imported where it draws."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cupyllama.errors import OutputError, UsageError

_MARKERS = "osD^vP*X"
_LABEL_GAP = 0.06  # of the height of the axes, from one label to the next
_WIDE_ENOUGH = 0.055  # share of a bar that a figure fits into


def check_plot(path: Path) -> None:
    """Find out before the run, not after it, whether it can be drawn.

    Raises:
        UsageError: matplotlib is missing, or draws no such files.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise UsageError(
            f"--plot needs matplotlib: {error}", "pip install 'cupyllama[plot]'"
        ) from error
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise UsageError(
            f"{path}: its name does not say what to draw", f"End it in one of .{', .'.join(known)}."
        )


def plot_kernels(measured: dict[str, Any], path: Path) -> None:
    """A roofline (Williams et al. 2009): the two ceilings, and every kernel below them.

    What computes nothing has no place in it and is named underneath.
    """
    bandwidth, peak = measured["copy_bytes_per_second"] / 1e12, measured["gemm_tflops"]
    kernels: dict[str, list[dict[str, Any]]] = {}
    for run in measured["runs"]:
        kernels.setdefault(run["kernel"], []).append(run)
    points = {name: [_point(run) for run in runs if run["flops"]] for name, runs in kernels.items()}
    everywhere = [point for some in points.values() for point in some]
    ridge = peak / bandwidth
    left = min(x for x, _ in [*everywhere, (1.0, 1.0)]) / 3
    right = max(x for x, _ in [*everywhere, (ridge, peak)]) * 3
    bottom = min([bandwidth * left, *(y for _, y in everywhere)]) / 2
    figure, axes = _figure(11, max(6, 2 + 0.35 * len(kernels)))
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="TFLOP/s")
    axes.set_xlim(left, right * (right / left) ** 0.5)  # the right third is for the labels
    axes.set_ylim(bottom, peak * 3)
    axes.plot([left, ridge, right], [bandwidth * left, peak, peak], color="black")
    axes.text(right, peak * 1.2, f"matrix products: {peak:,.0f} TFLOP/s", ha="right")
    middle = (left * ridge) ** 0.5
    axes.text(middle / 1.3, bandwidth * middle, f"copy: {1e3 * bandwidth:,.0f} GB/s", ha="right")
    for number, shape in enumerate(dict.fromkeys(run["shape"] for run in measured["runs"])):
        here = [_point(run) for run in measured["runs"] if run["shape"] == shape and run["flops"]]
        marker = _MARKERS[number % len(_MARKERS)]
        # Hollow, and larger by turns: one kernel lies at the same place in every shape.
        style = {"fillstyle": "none", "markersize": 6 + 3 * number, "linestyle": "none"}
        axes.plot(*zip(*here, strict=True), marker, label=shape, **style)
    axes.legend(loc="upper left")
    labels = [(*some[0], _title(kernels[name])) for name, some in points.items() if some]
    _label_column(axes, labels)
    idle = [_title(runs) for name, runs in kernels.items() if not points[name]]
    note = f"Without arithmetic: {'; '.join(idle)}. " if idle else ""
    figure.supxlabel(f"{note}Figures are shares of the ceiling.", fontsize=9)
    figure.suptitle(
        f"{measured['gpu']}, {measured['dtype']}, {measured['micro_batch_tokens']:,} tokens"
    )
    _save(figure, path)


def plot_score(measured: dict[str, Any], path: Path) -> None:
    """Where the time of a layer goes: a bar for each size of micro-batches."""
    runs = measured["runs"]
    names = list(dict.fromkeys(name for run in runs for name in run["breakdown"]["layer"]))
    figure, axes = _figure(11, 2 + 0.6 * len(runs) + 0.25 * -(-len(names) // 3))
    for place, run in enumerate(runs):
        spent, begin = run["breakdown"]["layer"], 0.0
        whole = sum(spent.values())
        for name, colour in zip(names, _colours(len(names)), strict=True):
            seconds = spent.get(name, 0.0)
            width = 1e6 * seconds * 1000 / run["micro_batch_tokens"]
            label = f"{name}: {100 * seconds / whole:.1f} %" if place == 0 else None
            axes.barh(place, width, left=begin, color=colour, edgecolor="white", label=label)
            if seconds > _WIDE_ENOUGH * whole:
                share = f"{100 * seconds / whole:.0f} %"
                axes.text(begin + width / 2, place, share, ha="center", va="center", fontsize=9)
            begin += width
    axes.set_yticks(range(len(runs)), [f"{run['micro_batch_tokens']:,} tokens" for run in runs])
    axes.set(xlabel="microseconds of a layer for 1,000 tokens", ylim=(len(runs) - 0.5, -0.5))
    figure.legend(loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(
        f"Where the time of a layer goes: {measured['shape']}, {measured['dtype']}, "
        f"{measured['gpu']}"
    )
    _save(figure, path)


def plot_generate(measured: dict[str, Any], path: Path) -> None:
    """Latency and throughput: a curve a quantization, a point a batch size, and the floor of each.

    What memory does not hold is named underneath.
    """
    from matplotlib.ticker import LogLocator

    figure, axes = _figure(9, 6)
    missing = []
    for number, setting in enumerate(measured["settings"]):
        name = setting["quantize"] or measured["dtype"]
        colour = _colours(20)[2 * number]
        runs = [run for run in setting["runs"] if not run["out_of_memory"]]
        if left := [f"{run['batch_size']}" for run in setting["runs"] if run["out_of_memory"]]:
            missing.append(f"There is no memory for a batch of {', '.join(left)} in {name}.")
        if not runs:
            continue
        points = [(run["ms_per_token"], run["queries_per_second"]) for run in runs]
        axes.plot(*zip(*points, strict=True), _MARKERS[number] + "-", color=colour, label=name)
        floor = [
            (run["floor_ms"], 1e3 * run["batch_size"] / run["floor_ms"] / measured["new_tokens"])
            for run in runs
        ]
        label = f"{name}, if reading memory were all"
        axes.plot(*zip(*floor, strict=True), ":", color=colour, marker=".", label=label)
        for run, place in zip(runs, points, strict=True):
            axes.annotate(
                f"{run['batch_size']}",
                place,
                (5, -9),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
    axes.set(yscale="log", xlabel="latency, ms a token", ylabel="queries a second")
    axes.set_xlim(left=0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    if axes.get_lines():
        axes.legend(loc="lower right")
    figure.supxlabel("\n".join(["Figures are batch sizes.", *missing]), fontsize=9)
    figure.suptitle(
        f"{measured['shape']} on {measured['gpu']}: {measured['new_tokens']} tokens after "
        f"{measured['prompt_len']}"
    )
    _save(figure, path)


def _point(run: dict[str, Any]) -> tuple[float, float]:
    return run["flops"] / run["bytes"], run["tflops"]


def _title(runs: list[dict[str, Any]]) -> str:
    """The kernel, and what it reaches at each shape, in the legend's order."""
    shares = " / ".join(f"{run['of_ceiling']:.2f}" for run in runs)
    return f"{runs[0]['kernel']}: {shares}"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Not pyplot: it would look for a screen, and keep what it has drawn.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab20"](number % 20) for number in range(count)]


def _label_column(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Labels one below the other at the right, in the order of their points, with lines to them.

    Args:
        points: x, y and label of each.
    """
    ordered = sorted(points, key=lambda point: (-point[1], -point[0]))
    gap = min(_LABEL_GAP, 0.85 / max(len(ordered), 1))
    bottom, top = np.log(axes.get_ylim())
    place, line = 0.9, {"arrowstyle": "-", "color": "grey", "linewidth": 0.5, "shrinkA": 0}
    for number, (x, y, title) in enumerate(ordered):
        left_below = gap * (len(ordered) - 1 - number)
        place = max(min(place - gap, (np.log(y) - bottom) / (top - bottom)), 0.03 + left_below)
        axes.annotate(
            title,
            (x, y),
            (0.7, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            arrowprops={**line, "relpos": (0, 0.5)},
        )


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
