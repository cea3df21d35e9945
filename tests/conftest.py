"""Fixtures, and where the benchmark's own files are looked for."""

import os
from pathlib import Path

import pytest

# A folder with hellaswag_val_full.txt.bz2 (github.com/klosax/hellaswag_text_data) and LLaMA's
# llama_tokenizer.model; what compares with results on the real benchmark is skipped without it.
REAL_DATA = "CUPYLLAMA_TEST_DATA"


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = Path(os.environ.get(REAL_DATA) or os.devnull)
    if not (folder / "hellaswag_val_full.txt.bz2").is_file():
        pytest.skip(f"{REAL_DATA} does not name a folder with hellaswag_val_full.txt.bz2")
    return folder
