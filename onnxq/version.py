"""The version of this package."""

from importlib import metadata

VERSION = metadata.version("onnxq")
