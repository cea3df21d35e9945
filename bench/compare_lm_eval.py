"""Questions a second beside lm-evaluation-harness's `hf` backend, in the same run on the same GPU.

    python bench/compare_lm_eval.py --shape llama-7b --folder /data/llama-7b-random \
        --data hellaswag_val_full.txt.bz2 --tokenizer tokenizer.model --json out.json

Both begin with the text of the questions and end with log-likelihoods. On a GPU, both are held
there at once: LLaMA-7B needs 80 GB.
"""

import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from comparison import compare, comparison_options, prepared, require
from engines import Job, Ours, Turn

from cupyllama.tasks.question import Question


def requests(questions: list[Question]) -> list[tuple[str, str]]:
    """Context and continuation of each choice, as lm-eval's HellaSwag task makes them."""
    return [
        (question.context, " " + choice) for question in questions for choice in question.choices
    ]


class LmEval:
    """`HFLM.loglikelihood` on the questions' text."""

    name = "lm-eval hf"

    def __init__(
        self, job: Job, batch_size: int, memory_fraction: float, softmax_dtype: str | None
    ):
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM

        if job.device == "cuda":
            import torch

            torch.cuda.set_per_process_memory_fraction(memory_fraction)

        class Marked(HFLM):
            """Notes when tokenising is over."""

            def _loglikelihood_tokens(self, *arguments, **options):
                self.tokenised = time.perf_counter()
                return super()._loglikelihood_tokens(*arguments, **options)

        self.lm = Marked(
            pretrained=str(job.model),
            tokenizer=str(job.hf_tokenizer),
            add_bos_token=job.bos,
            device=job.device,
            dtype=job.dtype,
            softmax_dtype=softmax_dtype,
            batch_size=batch_size,
        )
        pairs = requests(job.questions)
        self.instances = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
        self.dtype = job.dtype
        self.info = {
            "batch_size": batch_size,
            "rows_tokenised_otherwise": self.count_other_rows(job, pairs),
        }
        packages = ("lm_eval", "torch", "transformers", "accelerate")
        self.versions = {p: sys.modules[p].__version__ for p in packages if p in sys.modules}

    def count_other_rows(self, job: Job, pairs: list[tuple[str, str]]) -> int:
        """Rows that are not token for token ours, in the whole or in what is scored of them."""
        others = 0
        for pair, row in zip(pairs, job.rows.rows, strict=True):
            context, continuation = self.lm._encode_pair(*pair)
            whole = (context + continuation)[-(self.lm.max_length + 1) :]
            own = len(row.token_ids) - row.first_target
            others += whole != row.token_ids or len(continuation) != own
        return others

    def run(self) -> Turn:
        begin = time.perf_counter()
        answers = self.lm.loglikelihood(self.instances, disable_tqdm=True)
        seconds = time.perf_counter() - begin  # answers are numbers of Python: the GPU is done
        sums = np.array([value for value, _ in answers])
        return Turn(seconds, self.lm.tokenised - begin, sums)


@click.command()
@comparison_options
@click.option("--batch-size", default=256)
@click.option("--memory-fraction", default=0.7, help="Of the GPU's memory, that torch may take.")
@click.option("--softmax-dtype", help="Of lm-eval's softmax, by default that of the logits.")
def main(
    batch_size: int,
    memory_fraction: float,
    softmax_dtype: str | None,
    micro_batch_tokens: int,
    repeats: int,
    json_path: Path | None,
    **asked: Any,
):
    """Run cupyllama and lm-eval's hf backend in turn on the same questions."""
    require("lm_eval", "lm_eval[hf]==0.4.13")
    with prepared(**asked) as job:
        engines = [
            (Ours, job, micro_batch_tokens, True),
            (LmEval, job, batch_size, memory_fraction, softmax_dtype),
        ]
        compare("compare_lm_eval", job, engines, repeats, json_path)


if __name__ == "__main__":
    main()
