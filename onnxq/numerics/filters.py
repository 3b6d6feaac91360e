"""Weights of layers and convolutions as one matrix, whose rows are the inputs."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Scalar = TypeVar("Scalar", bound=np.generic)


def to_matrix(weight: npt.NDArray[Scalar], filters: bool) -> npt.NDArray[Scalar]:
    """[K, N] of a weight: the weight itself, or of `filters` [N, C, ..] the numbers of each, [C .., N].

    The places of one channel follow one another, as in the rows of sampling.View.
    """
    return weight if not filters else np.ascontiguousarray(weight.reshape(len(weight), -1).T)


def from_matrix(matrix: npt.NDArray[Scalar], kernel: tuple[int, ...], filters: bool) -> npt.NDArray[Scalar]:
    """The weight of a matrix [K, N]: itself, or `filters` [N, C, *kernel], C as many as there are then."""
    turned = matrix if not filters else matrix.T
    return np.ascontiguousarray(turned) if not filters else np.ascontiguousarray(turned).reshape(
        matrix.shape[1], -1, *kernel)


def by_place(inputs: int, kernel: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Which rows of a matrix [K, N] come first, second ..., int64 [K], where the channels at one place of the filters
    follow one another instead, as kernels multiply them; of a layer the rows as they are."""
    places = int(np.prod(kernel, dtype=np.int64))
    return np.arange(inputs).reshape(-1, places).T.reshape(-1)


def restored(matrix: npt.NDArray[Any], order: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """What matrix[order] was made of."""
    back = np.empty_like(matrix)
    back[order] = matrix
    return back
