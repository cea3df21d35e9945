"""Score multiple-choice benchmarks with large language models, by prefill alone."""

__version__ = "0.1.0"
