"""python -m onnxq.runtime.once MODEL FEED.npz THREADS: run a model three times and print the process's peak memory."""

from __future__ import annotations

import sys

import numpy as np

from onnxq.runtime.measure import peak_memory_bytes
from onnxq.runtime.session import Session, SessionOptions


def main(model: str, feed: str, threads: str) -> None:
    """Print peak resident bytes."""
    with np.load(feed) as z:
        arrays = {k: z[k] for k in z.files}
    session = Session(model, SessionOptions(threads=int(threads)))
    for _ in range(3):
        session.run(arrays)
    print(peak_memory_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
