"""python -m onnxq.runtime.once MODEL FEED.npz THREADS TARGET: run a model three times, print the peak memory."""

from __future__ import annotations

import sys

import numpy as np

from onnxq.runtime.machine import session_options, target_here
from onnxq.runtime.measure import peak_memory_bytes
from onnxq.runtime.session import Session


def main(model: str, feed: str, threads: str, target: str) -> None:
    """Print peak resident bytes."""
    with np.load(feed) as z:
        arrays = {k: z[k] for k in z.files}
    session = Session(model, session_options(target_here(target), int(threads), must=True))
    for _ in range(3):
        session.run(arrays)
    print(peak_memory_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
