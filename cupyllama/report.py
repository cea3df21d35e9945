"""What a run found: accuracies, the table that a person reads, and the files that machines read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupyllama.compare import Comparison
from cupyllama.parallel.simulate import Simulation, side_by_side, simulate
from cupyllama.tasks.question import Question
from cupyllama.trace import Span

# How a choice's log-likelihood is normalised before the best one is picked.
NORMALISATIONS = {
    "acc": "sum of log-probabilities",
    "acc_norm": "per character",
    "acc_bytes": "per UTF-8 byte",
    "acc_tokens": "per token",
}


@dataclass(frozen=True)
class Metric:
    """A mean over the questions, and its standard error."""

    value: float
    stderr: float


@dataclass(frozen=True)
class Answers:
    """Every question's scores and the choice that each normalisation picks."""

    questions: Sequence[Question]
    choice_start: np.ndarray  # (questions + 1,)
    loglikelihoods: np.ndarray  # (choices,) float64
    is_greedy: np.ndarray  # (choices,) bool
    num_tokens: np.ndarray  # (choices,)
    picks: dict[str, np.ndarray] = field(init=False)  # normalisation -> (questions,)

    def __post_init__(self):
        choices = [choice for question in self.questions for choice in question.choices]
        lengths = {
            "acc": np.ones(len(choices)),
            "acc_norm": np.array([len(choice) for choice in choices]),
            "acc_bytes": np.array([len(choice.encode()) for choice in choices]),
            "acc_tokens": self.num_tokens,
        }
        bounds = list(zip(self.choice_start[:-1], self.choice_start[1:], strict=True))
        picks = {}
        for name, length in lengths.items():
            normalised = self.loglikelihoods / length
            # argmax takes the first of equals, as lm-eval does
            picks[name] = np.array([int(np.argmax(normalised[a:b])) for a, b in bounds])
        object.__setattr__(self, "picks", picks)

    def metrics(self) -> dict[str, Metric]:
        """Accuracy under each normalisation; stderr is the sample standard deviation / √n."""
        gold = np.array([question.gold for question in self.questions])
        metrics = {}
        for name, picked in self.picks.items():
            right = (picked == gold).astype(float)
            n = len(right)
            stderr = float(np.std(right, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
            metrics[name] = Metric(float(right.mean()), stderr)
        return metrics

    def samples(self) -> Iterable[dict[str, Any]]:
        """One record a question."""
        for doc_id, question in enumerate(self.questions):
            span = slice(self.choice_start[doc_id], self.choice_start[doc_id + 1])
            yield {
                "doc_id": doc_id,
                "gold": question.gold,
                "loglikelihoods": self.loglikelihoods[span].tolist(),
                "num_tokens": self.num_tokens[span].tolist(),
                "is_greedy": self.is_greedy[span].tolist(),
                "pred": int(self.picks["acc"][doc_id]),
                "pred_norm": int(self.picks["acc_norm"][doc_id]),
            }


@dataclass(frozen=True)
class RankReport:
    """What one rank did."""

    rank: int
    replica: int
    layers: tuple[int, int]  # from, and up to
    device: str
    bytes_read: int  # of the checkpoint
    micro_batches: int
    busy: float  # share of the evaluation in computation
    place: str  # host and GPU
    link_seconds: float | None  # of a micro-batch from the rank before, measured alone
    spans: list[Span]
    tensor_rank: int = 0  # its part of the stage's matrices
    tensor_parallel: int = 1  # of so many

    @property
    def stage_seconds(self) -> float:
        """Of one micro-batch, on average."""
        computing = [span.end - span.begin for span in self.spans if span.name == "compute"]
        return sum(computing) / max(len(computing), 1)

    @property
    def title(self) -> str:
        part = f", part {self.tensor_rank + 1}/{self.tensor_parallel}"
        layers = f"rank {self.rank}: layers {self.layers[0]} to {self.layers[1] - 1}"
        return layers + (part if self.tensor_parallel > 1 else "")

    def as_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "replica": self.replica,
            "tensor_rank": self.tensor_rank,
            "layers": list(self.layers),
            "device": self.device,
            "bytes_read": self.bytes_read,
            "micro_batches": self.micro_batches,
            "busy": self.busy,
            "stage_seconds": self.stage_seconds,
            "link_seconds": self.link_seconds,
        }


@dataclass(frozen=True)
class Report:
    """All that a run has to say."""

    task: str
    metrics: dict[str, Metric]
    headline: str  # the normalisation that the convention reports
    questions: int
    questions_in_file: int
    questions_scored: int  # without those that were resumed, as are the tokens
    tokens_asked: int
    tokens_computed: int
    truncated_rows: int
    seconds: dict[str, float]  # loading and preparing, side by side; evaluating
    total_seconds: float
    settings: dict[str, Any]  # model, convention, BOS, dtype, device, micro-batches
    digests: dict[str, str]
    versions: dict[str, str]
    date: float  # seconds since the epoch, when the run began
    ranks: Sequence[RankReport]
    comparison: Comparison | None = None  # with another run

    @property
    def bubble(self) -> float:
        """The share of all ranks' time in which they computed nothing."""
        return 1 - sum(rank.busy for rank in self.ranks) / len(self.ranks)

    @property
    def simulated(self) -> Simulation | None:
        """The schedule on paper, from the stages' and links' times; not where GPUs are shared."""
        places = [rank.place for rank in self.ranks if "/cpu" not in rank.place]
        if len(self.ranks) == 1 or len(set(places)) < len(places):
            return None
        replicas: dict[int, list[RankReport]] = {}
        for rank in self.ranks:
            # Ranks that share matrices are at the same at any time: one of them stands for all.
            if rank.tensor_rank == 0:
                replicas.setdefault(rank.replica, []).append(rank)
        return side_by_side(
            simulate(
                [rank.stage_seconds for rank in stages],
                [rank.link_seconds or 0.0 for rank in stages[1:]],
                stages[0].micro_batches,
            )
            for stages in replicas.values()
        )

    @property
    def questions_per_second(self) -> float:
        return self.questions_scored / max(self.seconds["evaluating"], 1e-9)

    def as_json(self) -> dict[str, Any]:
        """lm-eval's results keys, and under `cupyllama` what it has no key for."""
        results: dict[str, Any] = {"alias": self.task}
        for name, metric in self.metrics.items():
            results[f"{name},none"] = metric.value
            results[f"{name}_stderr,none"] = _finite(metric.stderr)
        return {
            "results": {self.task: results},
            "n-samples": {
                self.task: {"original": self.questions_in_file, "effective": self.questions}
            },
            "config": self.settings,
            "versions": {self.task: 1.0},
            "date": self.date,
            "total_evaluation_time_seconds": str(self.total_seconds),
            "cupyllama": {
                "headline": self.headline,
                "questions_per_second": self.questions_per_second,
                "seconds": self.seconds,
                "tokens_asked": self.tokens_asked,
                "tokens_computed": self.tokens_computed,
                "truncated_rows": self.truncated_rows,
                "bubble": self.bubble,
                "simulated_seconds": self.simulated.seconds if self.simulated else None,
                "ranks": [rank.as_json() for rank in self.ranks],
                "digests": self.digests,
                "versions": self.versions,
                "comparison": self.comparison.as_json() if self.comparison else None,
            },
        }

    def as_text(self) -> str:
        """One screen."""
        settings = self.settings
        bos = "with BOS" if settings["bos"] else "without BOS"
        dtype = settings["dtype"]
        if settings["quantize"] != "none":
            dtype += f" and {settings['quantize']}"
        lines = [
            f"{self.task}: {self.questions:,} questions, {settings['convention']} convention {bos}",
            f"{settings['model']} in {dtype} on {settings['device']}",
            "",
            f"  {'accuracy':<12}{'%':>7}   {'± stderr':>8}   normalised",
        ]
        for name, metric in self.metrics.items():
            mark = "*" if name == self.headline else " "
            lines.append(
                f"{mark} {name:<12}{100 * metric.value:>7.2f}   {100 * metric.stderr:>8.2f}   "
                f"{NORMALISATIONS[name]}"
            )
        ratio = self.tokens_asked / max(self.tokens_computed, 1)
        seconds = self.seconds
        lines += [
            "",
            f"  {self.questions_per_second:,.1f} questions/s; {self.tokens_asked:,} tokens asked, "
            f"{self.tokens_computed:,} computed ({ratio:.2f} times fewer)",
            f"  {seconds['loading']:.1f} s loading beside {seconds['preparing']:.1f} s preparing, "
            f"{seconds['evaluating']:.1f} s evaluating",
        ]
        if len(self.ranks) > 1:
            wide = max(28, *(len(rank.title) + 1 for rank in self.ranks))
            lines += ["", f"  {'rank':<{wide}}{'micro-batches':>14}{'GB read':>10}{'busy':>8}"]
            for rank in self.ranks:
                lines.append(
                    f"  {rank.title:<{wide}}{rank.micro_batches:>14,}{rank.bytes_read / 1e9:>10.2f}"
                    f"{100 * rank.busy:>7.1f}%"
                )
            lines.append(f"  bubble {100 * self.bubble:.1f}%")
            if self.simulated is not None:
                lines[-1] += (
                    f"; simulated {100 * self.simulated.bubble:.1f}%, "
                    f"{self.simulated.seconds:.1f} s"
                )
        if self.truncated_rows:
            lines.append(
                f"  {self.truncated_rows:,} rows were longer than the model allows and kept their "
                "last tokens"
            )
        if self.comparison is not None:
            lines += ["", self.comparison.as_text()]
        return "\n".join(lines)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
