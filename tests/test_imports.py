"""Importing is free: heavy packages load where they are used."""

import subprocess
import sys

import pytest

HEAVY = ("cupy", "mpi4py", "datasets", "sentencepiece", "tokenizers", "numpy", "tqdm")


# What generation is made of besides what scoring has.
GENERATION = ("cupyllama.generation", "cupyllama.generate", "cupyllama.parallel.links")
GENERATION += tuple(f"cupyllama.ops.{name}" for name in ("decode_reference", "sampling_reference"))


def loaded_after(statement: str, names: tuple[str, ...] = HEAVY) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*(name for name in {names} if name in sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return set(answer.stdout.split())


def test_the_command_line_loads_nothing():
    assert loaded_after("import cupyllama.cli") == set()


@pytest.mark.parametrize("module", ["score", "evaluate", "ops.reference", "kernels", "doctor"])
def test_modules_load_neither_cuda_nor_mpi_nor_datasets(module):
    assert not loaded_after(f"import cupyllama.{module}") & {"cupy", "mpi4py", "datasets"}


def test_scoring_a_local_file_on_the_cpu_loads_no_more(tmp_path):
    from tiny_models import write_tiny_model
    from tiny_tokenizer import write_tokenizer

    write_tokenizer(write_tiny_model("gqa", tmp_path))
    data = tmp_path / "q.jsonl"
    data.write_text('{"query": "the", "choices": ["man", "tea"], "gold": 0}\n')
    arguments = ["score", "--model", str(tmp_path), "--data", str(data), "--device", "cpu"]
    run = f"from cupyllama.cli import cli\ncli({arguments}, standalone_mode=False)"
    quiet = (
        f"import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):\n    exec({run!r})"
    )
    assert not loaded_after(quiet) & {"cupy", "mpi4py", "datasets", "tokenizers"}
    assert not loaded_after(quiet, GENERATION)


def test_what_generation_loads():
    """So that the names above are those of modules."""
    statement = "import cupyllama.generate, cupyllama.ops.decode_reference"
    assert loaded_after(statement, GENERATION) == set(GENERATION)
    assert not loaded_after(statement) & {"cupy", "mpi4py", "datasets"}
