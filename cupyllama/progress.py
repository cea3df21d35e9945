"""The progress of a run, for a person at a terminal."""

from typing import Any

import numpy as np


class ProgressBar:
    """Counts the questions whose choices are all done."""

    def __init__(self, choice_start: np.ndarray, done: np.ndarray, visible: bool):
        counts = np.diff(choice_start)
        self._question = np.repeat(np.arange(len(counts)), counts)  # of each choice
        self._waiting = np.bincount(self._question, ~done, len(counts)).astype(int)
        self._visible = visible

    def __enter__(self) -> "ProgressBar":
        from tqdm import tqdm

        self._bar = tqdm(
            total=len(self._waiting),
            initial=int((self._waiting == 0).sum()),
            unit="question",
            desc="scoring",
            disable=None if self._visible else True,  # None: on a terminal only
            smoothing=0.1,
        )
        return self

    def advance(self, choices: np.ndarray) -> None:
        """These choices are done."""
        np.subtract.at(self._waiting, self._question[choices], 1)
        self._bar.update(int((self._waiting == 0).sum()) - self._bar.n)

    def __exit__(self, *error: Any) -> None:
        self._bar.close()
