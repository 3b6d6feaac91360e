"""Every error that a user can meet, by what went wrong; each maps to one exit status.

A message is one sentence that says what is wrong and ends with what to do about it. The library raises these and
nothing else for problems that lie with the input; anything else that escapes is a bug (exit status 70).
"""

from __future__ import annotations

from typing import ClassVar


class OnnxqError(Exception):
    """Base of all errors with a remedy; `exit_code` is what the command line returns for it."""

    exit_code: ClassVar[int] = 3


class UsageError(OnnxqError):
    """The call itself is wrong: an unknown scheme or metric, options that exclude one another."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that can't be used; the message begins with the path of the key, e.g. `rules[1].match.op`."""


class ModelError(OnnxqError):
    """The model file can't be read, is not valid ONNX or holds something that onnxq refuses."""


class GraphError(ModelError):
    """The graph holds a construct that the graph layer can't carry."""


class DataError(OnnxqError):
    """Calibration or evaluation data that don't fit the model."""


class OutputError(OnnxqError):
    """The result can't be written: the file exists, the folder is read-only, the disk is full."""


class RuntimeUnavailable(OnnxqError):
    """An execution provider that was asked for did not load."""


class CheckFailed(OnnxqError):
    """A check that the user asked for did not hold (budget, verification); the result is written all the same."""

    exit_code = 1


class PassError(OnnxqError):
    """A pass left an invalid graph: a bug in onnxq, named with the pass and those before it."""

    exit_code = 70
