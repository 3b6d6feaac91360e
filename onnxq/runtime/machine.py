"""The target as it is on this machine."""

from __future__ import annotations

import platform
import re
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime

from onnxq.errors import ModelError, RuntimeUnavailable, UsageError
from onnxq.graph import alone, save
from onnxq.runtime.measure import environment
from onnxq.runtime.session import CPU, Session, SessionOptions, how_to_install
from onnxq.targets import ON_ARM, TARGETS, WITHOUT_VNNI, Target, runtimes

_X86 = frozenset({"AMD64", "i386", "i686", "x86", "x86_64"})
ATC, WASM = "atc", "wasm"  # Ascend's compiler, onnxruntime-web
STAND_INS = (ATC, WASM)  # what onnxruntime does not load as a provider: the CPU runs their models here
_UNSEEN = "nothing was timed or read back, and {}"
_VNNI = frozenset({"amx_int8", "avx512_vnni", "avx_vnni"})


def target_here(name: str, version: str | None = None) -> Target:
    """A target by name with the onnxruntime `version` ("1.20"; None: the installed one); `cpu` is what this machine's
    processor makes of it. Raises UsageError for an unknown target and a version that is too old.
    """
    if name not in TARGETS:
        raise UsageError(f"there is no target {name!r}; known: {', '.join(TARGETS)} (onnxq targets lists them)")
    found = TARGETS[name]
    if name == WITHOUT_VNNI.name and saturates():
        found = WITHOUT_VNNI
    if name == ON_ARM.name and ON_ARM.machines is not None and platform.machine() in ON_ARM.machines:
        found = ON_ARM
    return _of_version(found, onnxruntime.__version__ if version is None else version)


def _of_version(target: Target, asked: str) -> Target:
    """The target with what onnxruntime `asked` ("1.20", "1.20.1") has. Raises UsageError."""
    found = re.fullmatch(r"(\d+)\.(\d+)(\..*)?", asked)
    if found is None:
        raise UsageError(f"{asked!r} is no version of onnxruntime; write for example --runtime 1.20")
    version = int(found[1]), int(found[2])
    if version < runtimes.OLDEST:
        raise UsageError(f"onnxruntime {asked} lacks kernels that onnxq writes; {_text(runtimes.OLDEST)} is the oldest "
                         "that has them")
    opset, ir_version = next((o, ir) for since, o, ir in reversed(runtimes.OPSETS) if since <= version)
    return replace(
        target, since=_text(version), opset=min(opset, target.opset or opset), ir_version=ir_version,
        odd_tables=version >= runtimes.ODD_TABLES,
        lowerings={key: kernel for key, kernel in target.lowerings.items()
                   if runtimes.KERNELS.get(kernel, version) <= version},
        block_bits=frozenset(b for b in target.block_bits if runtimes.BLOCKS[b] <= version),
        code_bits=frozenset(b for b in target.code_bits if runtimes.CASTS[b] <= version))


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def is_here(target: Target) -> bool:
    """Whether models for a target run on this machine as they will there: its provider is there, and its processor."""
    return (target.machines is None or platform.machine() in target.machines) and _starts(target.provider)


@cache
def _starts(provider: str) -> bool:
    """Whether a provider runs a model of one node: one that was built in may lack its libraries or its device."""
    if provider == CPU or provider not in onnxruntime.get_available_providers():
        return provider == CPU
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        path = Path(folder) / "probe.onnx"
        save(alone("Abs", [np.ones((1, 1), np.float32)], [np.float32]), path)
        try:
            Session(path, SessionOptions(provider))
        except (ModelError, RuntimeUnavailable):
            return False
    return True


def session_options(target: Target, threads: int, must: bool = False) -> SessionOptions:
    """How a target's models run here: on its provider, or on the CPU where that is not here.

    must: leave the provider in, so that a session says what is missing, unless no machine like this one has it.
    """
    if target.provider in STAND_INS:
        return SessionOptions(CPU, threads, config=target.config)
    if not is_here(target) and not must:
        return SessionOptions(CPU, threads)
    return SessionOptions(target.provider, threads, config=target.config, provider_options=target.provider_options)


def elsewhere(target: Target) -> str:
    """What is to be said of times and kernels that are a target's by the CPU here; "" where this machine is it."""
    return "" if is_here(target) else (f"this machine is not {target.name}: times and kernels are those of the CPU "
                                       "provider here")


@dataclass(frozen=True)
class Checking:
    """How a target's models are checked on this machine.

    `options` are those of the session that runs them. `reads_back` tells whether its kernels are the target's, so that
    what ran there tells what will; `by_twin` whether the form of Q and DQ is run instead, operator by operator, since
    this machine's kernels would saturate where the target's don't. `note` says so in the report; "" where nothing is
    different.
    """

    options: SessionOptions
    reads_back: bool = True
    by_twin: bool = False
    note: str = ""


def checking(target: Target, threads: int) -> Checking:
    """How a target's models are checked on this machine."""
    options = session_options(target, threads)
    if is_here(target):
        return Checking(options)
    plain = replace(options, optimize=False)
    if target.provider == ATC:
        said = _UNSEEN.format("accuracy is that of Q and DQ as they are written, on the CPU")
        return Checking(options, False, False, f"{said}; onnxq export --format ascend makes what ATC takes")
    if target.provider not in (CPU, *STAND_INS):
        # pairs of Q and DQ run as they are written; float16 with MatMulNBits does not without optimizations, where
        # onnxruntime 1.32 was seen to be 40 dB off
        said = _UNSEEN.format(f"accuracy is that of the same operators on the CPU; to use it, "
                              f"{how_to_install(target.provider)}")
        return Checking(plain if target.symmetric else options, False, False, f"{target.provider} is not here: {said}")
    where = f"this machine is not {target.name}: nothing was timed"
    if saturates() and not target.saturates:
        return Checking(plain, False, True, f"{where} or read back, and accuracy is that of its QDQ form, since int8 "
                                            "saturates on this processor")
    return Checking(options, note=f"{where}; accuracy and kernels are those of the CPU provider here")


def saturates() -> bool:
    """Whether the integer kernels add two products in 16 bits: on x86 without VNNI, or where that is not known."""
    return platform.machine() in _X86 and not _VNNI & set(map(str, _flags()))


def _flags() -> list[object]:
    found = environment()["cpu_flags"]
    return list(found) if isinstance(found, list) else []
