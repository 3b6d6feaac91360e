"""One node's story: `explain` from a report, a float model or a compiled one; `codes` say how tensors are encoded."""
