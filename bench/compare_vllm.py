"""Questions a second beside vLLM, driven as lm-evaluation-harness drives it, in the same run.

    python bench/compare_vllm.py --shape llama-7b --folder /data/llama-7b-random \
        --data hellaswag_val_full.txt.bz2 --tokenizer tokenizer.model --json out.json

Both begin with the same rows of token ids and end with log-likelihoods. Both are on the GPU at
once: LLaMA-7B needs 80 GB, of which vLLM takes --gpu-memory-utilization.
"""

import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from comparison import compare, comparison_options, prepared, require
from engines import Job, Ours, Turn


class Vllm:
    """`LLM.generate` for the log-probabilities of the prompt, and of one token that is ignored."""

    name = "vllm"

    def __init__(self, job: Job, gpu_memory_utilization: float, quantization: str | None):
        from vllm import LLM, SamplingParams, TokensPrompt

        self.llm = LLM(
            model=str(job.model),
            tokenizer=str(job.hf_tokenizer),
            dtype=job.dtype,
            quantization=quantization,
            gpu_memory_utilization=gpu_memory_utilization,
            seed=1234,  # as lm-eval has it
        )
        # The last token too, for vLLM tells of the prompt's own tokens; longest first, as lm-eval.
        self.rows = sorted(
            job.rows.rows, key=lambda row: (-len(row.token_ids), tuple(row.token_ids))
        )
        self.prompts = [TokensPrompt(prompt_token_ids=row.token_ids) for row in self.rows]
        self.parameters = SamplingParams(
            temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False
        )
        self.dtype = quantization or job.dtype
        self.info = {"gpu_memory_utilization": gpu_memory_utilization}
        packages = ("vllm", "torch", "transformers")
        self.versions = {p: sys.modules[p].__version__ for p in packages if p in sys.modules}

    def run(self) -> Turn:
        begin = time.perf_counter()
        outputs = self.llm.generate(self.prompts, self.parameters, use_tqdm=False)
        sums = np.zeros(len(self.rows))
        for row, output in zip(self.rows, outputs, strict=True):
            targets = zip(row.token_ids, output.prompt_logprobs, strict=True)
            scored = list(targets)[row.first_target :]
            sums[row.choice] = sum(found[token].logprob for token, found in scored)
        return Turn(time.perf_counter() - begin, 0.0, sums)


@click.command()
@comparison_options
@click.option("--gpu-memory-utilization", default=0.6, help="Of the GPU's memory, that vLLM takes.")
@click.option("--quantization", type=click.Choice(["fp8"]), help="Of vLLM's weights.")
def main(
    gpu_memory_utilization: float,
    quantization: str | None,
    micro_batch_tokens: int,
    repeats: int,
    json_path: Path | None,
    **asked: Any,
):
    """Run cupyllama and vLLM in turn on the same rows of tokens."""
    require("vllm", "vllm")
    with prepared(**asked) as job:
        engines = [
            (Ours, job, micro_batch_tokens, False),
            (Vllm, job, gpu_memory_utilization, quantization),
        ]
        compare("compare_vllm", job, engines, repeats, json_path)


if __name__ == "__main__":
    main()
