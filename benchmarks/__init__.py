"""onnxq beside onnxruntime's own quantizer on real models: `python -m benchmarks.table`. Not part of the wheel."""
