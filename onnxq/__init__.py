"""A quantizing compiler for ONNX models that measures what it makes."""
