"""The mean error of a quantized layer's output, per channel, from batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


class MeanError:
    """Running mean of per-batch means [C], float64, shrunk where the batches disagree.

    A mean that is no larger than its own standard error would add noise: each channel's mean m is multiplied by
    max(0, 1 - se**2 / m**2), se**2 the variance of the mean over batches (the positive-part James-Stein factor).
    With fewer than 2 batches there is no estimate of se and the mean is taken as it is.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: npt.NDArray[np.float64] | float = 0.0
        self._squares: npt.NDArray[np.float64] | float = 0.0

    def update(self, x: npt.NDArray[Any]) -> None:
        """Fold in a batch's mean error [C]. ValueError when it holds NaN or infinities."""
        values = np.asarray(x, np.float64).reshape(-1)
        if not np.isfinite(values).all():
            raise ValueError("a mean error is not finite; look for infinities in the activations")
        self.count += 1
        self._sum = self._sum + values
        self._squares = self._squares + values * values

    def result(self) -> npt.NDArray[np.float32]:
        """The shrunk mean error [C]."""
        mean = np.asarray(self._sum / max(self.count, 1))
        if self.count > 1:
            variance = np.maximum(self._squares / self.count - mean * mean, 0) / (self.count - 1)
            factor = 1 - variance / np.maximum(mean * mean, np.finfo(np.float64).tiny)
            mean = mean * np.maximum(factor, 0)
        return mean.astype(np.float32)
