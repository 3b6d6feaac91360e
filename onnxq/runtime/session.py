"""A model in onnxruntime that either runs where it was told to, or says why it can't.

onnxruntime itself falls back to the CPU with no more than a log line when a provider's libraries are missing, prints
its errors besides raising them, and names a wrong input only after the run has begun. `Session` turns all of this into
onnxq's errors and prints nothing.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

from onnxq.errors import DataError, ModelError, RuntimeUnavailable, UsageError
from onnxq.ports import BFLOAT16, Port, dtype_name

CPU = "CPUExecutionProvider"

# onnxruntime raises its errors besides logging them; level 4 (fatal) leaves the raising only.
_LOG_FATAL = 4
_ONNX_BFLOAT16 = 16  # its number in onnx.TensorProto
_EXTERNAL_MIN_BYTES = "1024"

_NUMPY_TYPES: dict[str, type[Any]] = {
    "tensor(float)": np.float32,
    "tensor(bfloat16)": np.float32,  # as which it is fed and given
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
}

_INSTALL = {
    CPU: "pip install onnxruntime",
    "CUDAExecutionProvider": "pip install onnxruntime-gpu and the CUDA and cuDNN libraries that it asks for",
    "TensorrtExecutionProvider": "pip install onnxruntime-gpu and the CUDA and TensorRT libraries that it asks for",
    "CANNExecutionProvider": "pip install onnxruntime-cann and the CANN toolkit, and source its set_env.sh",
    "OpenVINOExecutionProvider": "pip install onnxruntime-openvino",
    "DmlExecutionProvider": "pip install onnxruntime-directml on Windows",
}


@dataclass(frozen=True)
class SessionOptions:
    """Where and how a model runs.

    `threads` is the number of threads inside one operator, 0 for onnxruntime's default (one per physical core).
    `optimize` False turns every graph optimization off. `config` holds onnxruntime's session configuration entries,
    e.g. `(("session.disable_quant_qdq", "1"),)`, `provider_options` those of the provider. A negative
    `threads` raises UsageError.
    """

    provider: str = CPU
    threads: int = 0
    optimize: bool = True
    config: tuple[tuple[str, str], ...] = ()
    provider_options: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise UsageError(f"threads is {self.threads}; give 0 for onnxruntime's default, or a positive number")


class Session:
    """A model in onnxruntime; fails loudly.

    `model` is a path, or the bytes of a serialized ModelProto. `profile_prefix` turns profiling on, into a file of that
    prefix plus a time stamp. `optimized_path` saves the graph as onnxruntime rewrote it; its initializers from 1 KiB on
    go to `<optimized_path>.data` beside it, since one protobuf file ends at 2 GiB.

    Raises RuntimeUnavailable when the wanted provider did not load, and ModelError when the model can't be loaded.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        options: SessionOptions = SessionOptions(),
        *,
        profile_prefix: str | None = None,
        optimized_path: str | None = None,
    ) -> None:
        self.options = options
        self.label = f"the model in memory ({len(model)} bytes)" if isinstance(model, bytes) else os.fspath(model)
        self._profiling = profile_prefix is not None
        _require_available(options.provider)
        self._session = self._create(model, ort_options(options, profile_prefix, optimized_path))
        self.providers: list[str] = list(self._session.get_providers())
        if options.provider not in self.providers:
            raise RuntimeUnavailable(
                f"{options.provider} did not load and onnxruntime fell back to {', '.join(self.providers)}; "
                f"to use it, {how_to_install(options.provider)}"
            )
        self.inputs: list[Port] = [_port(argument) for argument in self._session.get_inputs()]
        self.outputs: list[Port] = [_port(argument) for argument in self._session.get_outputs()]
        # onnxruntime exchanges bfloat16 with Python in values of its own only
        self._own_values = any(port.bfloat16 for port in (*self.inputs, *self.outputs))

    def run(
        self, feed: Mapping[str, np.ndarray[Any, Any]], outputs: Sequence[str] | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Run the model once and return the wanted outputs (None: all of them) by name, in the order asked for.

        `feed` holds one array for every input, of the input's dtype, rank and fixed sizes; float32 for bfloat16, which
        comes back as float32, too. An output that is no tensor comes back as onnxruntime gives it (a list or a dict).

        Raises DataError for a feed that doesn't fit the inputs, UsageError for an output that the model lacks, and
        ModelError when the run itself fails.
        """
        known = [port.name for port in self.outputs]
        wanted = known if outputs is None else list(outputs)
        for name in wanted:
            if name not in known:
                raise UsageError(f"{self.label} has no output '{name}'; ask for some of {_listed(known)}")
        if not wanted:
            return {}  # onnxruntime reads an empty list as "all outputs"
        return dict(zip(wanted, self._run(wanted, self._checked(feed)), strict=True))

    def runner(self, feed: Mapping[str, np.ndarray[Any, Any]]) -> Callable[[], None]:
        """A call that runs the model on `feed`, which is checked here and not at each call; for timing.

        Raises what `run` raises: DataError here, ModelError in the call.
        """
        checked = self._checked(feed)

        def call() -> None:
            self._run(None, checked)

        return call

    def cycle(self, feeds: Sequence[Mapping[str, np.ndarray[Any, Any]]]) -> Callable[[], None]:
        """A call that runs the model on each feed in turn; raises what `runner` raises."""
        calls = [self.runner(feed) for feed in feeds]

        def cycle() -> None:
            for call in calls:
                call()

        return cycle

    def end_profiling(self) -> str:
        """Close the profile and return the path of its JSON file. Raises UsageError in a session without profiling."""
        if not self._profiling:
            raise UsageError("the session has no profile; make it with a profile_prefix")
        self._profiling = False
        return str(self._session.end_profiling())

    def _create(self, model: str | os.PathLike[str] | bytes, ort_options: Any) -> Any:
        provider = self.options.provider
        own = dict(self.options.provider_options)
        wanted = (provider, own) if own else provider
        providers = [provider] if provider == CPU else [wanted, CPU]
        if provider != CPU:  # what stops it is raised below, too
            onnxruntime.set_default_logger_severity(_LOG_FATAL)
        try:
            # By default the Python layer prints a banner and retries on the CPU when a provider raises.
            return onnxruntime.InferenceSession(model, ort_options, providers=providers, enable_fallback=0)
        except Exception as error:
            # Status codes come back as onnxruntime's own classes; a provider that can't start throws through as these.
            if provider != CPU and isinstance(error, (RuntimeError, ValueError)):
                raise RuntimeUnavailable(
                    f"{provider} did not start: {first_line(error)}; to use it, {how_to_install(provider)}"
                ) from error
            raise ModelError(
                f"onnxruntime can't load {self.label}: {first_line(error)}; check the path, and the file with "
                "onnx.checker"
            ) from error

    def _run(self, names: list[str] | None, feed: dict[str, Any]) -> list[Any]:
        try:
            if self._own_values:
                return [_array(value) for value in self._session.run_with_ort_values(names, feed)]
            arrays: list[Any] = self._session.run(names, feed)
        except Exception as error:
            raise ModelError(
                f"onnxruntime failed in a run of {self.label}: {first_line(error)}; check that the sizes of the "
                "inputs agree with one another and with the model"
            ) from error
        return arrays

    def _checked(self, feed: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        names = [port.name for port in self.inputs]
        for name in feed:
            if name not in names:
                raise DataError(f"{self.label} has no input '{name}'; leave it out, the inputs are {_listed(names)}")
        checked: dict[str, Any] = {}
        for port in self.inputs:
            if port.name not in feed:
                raise DataError(f"input '{port.name}' of {self.label} is missing from the feed; add it as {port}")
            given = feed[port.name]
            checked[port.name] = given if port.dtype is None else _fitting(port, given)
        if self._own_values:
            return {port.name: _ort_value(port, checked[port.name]) for port in self.inputs}
        return checked


def _require_available(provider: str) -> None:
    available: list[str] = onnxruntime.get_available_providers()
    if provider not in available:
        raise RuntimeUnavailable(
            f"this onnxruntime {onnxruntime.__version__} has no {provider}, it has {_listed(available)}; "
            f"to use it, {how_to_install(provider)}"
        )


def how_to_install(provider: str) -> str:
    """What to do for a provider that is missing, as the end of a sentence."""
    return _INSTALL.get(provider, f"check the name, or install an onnxruntime package built with {provider}")


def ort_options(options: SessionOptions, profile_prefix: str | None = None, optimized_path: str | None = None) -> Any:
    """The same as onnxruntime's own object, with its log turned off."""
    levels = onnxruntime.GraphOptimizationLevel
    ort = onnxruntime.SessionOptions()
    ort.log_severity_level = _LOG_FATAL
    ort.intra_op_num_threads = options.threads
    ort.graph_optimization_level = levels.ORT_ENABLE_ALL if options.optimize else levels.ORT_DISABLE_ALL
    for key, value in options.config:
        ort.add_session_config_entry(key, value)
    if profile_prefix is not None:
        ort.enable_profiling = True
        ort.profile_file_prefix = profile_prefix
    if optimized_path is not None:
        prefix = "session.optimized_model_external_initializers_"
        ort.optimized_model_filepath = optimized_path
        # A bare file name: onnxruntime takes it relative to the saved model.
        ort.add_session_config_entry(prefix + "file_name", os.path.basename(optimized_path) + ".data")
        ort.add_session_config_entry(prefix + "min_size_in_bytes", _EXTERNAL_MIN_BYTES)
    return ort


def _port(argument: Any) -> Port:
    numpy_type = _NUMPY_TYPES.get(argument.type)
    dtype = None if numpy_type is None else np.dtype(numpy_type)
    return Port(argument.name, dtype, tuple(argument.shape), argument.type == "tensor(bfloat16)")


def _ort_value(port: Port, array: np.ndarray[Any, Any]) -> Any:
    if not port.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.astype(BFLOAT16).view(np.uint16),
                                                                   _ONNX_BFLOAT16)


def _array(value: Any) -> Any:
    """The array of a value of onnxruntime's; bfloat16, which it does not convert, is read from its memory."""
    if not value.is_tensor() or value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    shape = tuple(value.shape())
    codes = (ctypes.c_uint16 * int(np.prod(shape, dtype=np.int64))).from_address(value.data_ptr())
    return np.ctypeslib.as_array(codes).view(BFLOAT16).reshape(shape).astype(np.float32)


def _fitting(port: Port, given: Any) -> np.ndarray[Any, Any]:
    """`given` as an array in C order, or DataError when its dtype, rank or a fixed size is not that of `port`."""
    array = np.asarray(given, order="C")  # not ascontiguousarray, which makes a scalar rank 1
    if array.dtype != port.dtype and not (port.dtype == np.object_ and array.dtype.kind in "US"):
        remedy = f"cast it with .astype('{port.dtype}')"
    elif port.shape and array.ndim != len(port.shape):
        remedy = f"reshape it to rank {len(port.shape)}"
    elif port.shape and any(
        isinstance(want, int) and have != want for have, want in zip(array.shape, port.shape, strict=True)
    ):
        remedy = "reshape, pad or crop it"
    else:
        return array
    shape = ", ".join(str(size) for size in array.shape)
    raise DataError(f"input '{port.name}' was given {dtype_name(array.dtype)} [{shape}] but wants {port}; {remedy}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def first_line(error: Exception) -> str:
    """The first line of onnxruntime's message, without its code, the place in its source and the full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    message = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0])
    return re.sub(r"^/\S+\.\w+:\d+ [^)]*\) ", "", message).rstrip(". ")
