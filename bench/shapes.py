"""Where scripts beside it find the shapes, which are in the package."""

from cupyllama.bench.shapes import SHAPES, model_config, random_stage

__all__ = ["SHAPES", "model_config", "random_stage"]
