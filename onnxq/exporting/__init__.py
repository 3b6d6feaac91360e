"""A compiled model and what its device needs to know, in a folder: ORT format, a web page, or a bundle.

`export` writes such a folder, `verify_bundle` runs it: on another machine, years later, it tells whether the model
still gives what it gave.
"""

from onnxq.exporting.checking import verify_bundle
from onnxq.exporting.exporter import export
from onnxq.exporting.formats import FORMATS

__all__ = ["FORMATS", "export", "verify_bundle"]
