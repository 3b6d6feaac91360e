"""python -m benchmarks.load_once MODEL THREADS: what making one session takes, in a process that has nothing but
onnxruntime in it. Prints JSON: seconds, processor_seconds, and the peak of resident bytes before and after."""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from pathlib import Path

import onnxruntime


def peak_bytes() -> int:
    """Of this process so far; where the system doesn't tell, its share of what getrusage says, in KiB."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main(model: str, threads: str) -> None:
    """Load and print."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    empty = peak_bytes()
    wall, processor = time.perf_counter(), time.process_time()
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    print(json.dumps({"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor,
                      "empty_bytes": empty, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
