"""The kernel's machine code: kept on disk, run without numba, whose import takes longer than 20 MB of text.

The file is an object file that needs no other, made once for this processor by `kernel`; llvmlite links it. Before a
new one is kept, another process tries it: what goes wrong in there ends no run. Where this fails, numba's own way does.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from internlm_ds.preprocess.engine.table_cache import cache_folder

Function = Callable[[int], int]
_DIGEST_BYTES = 32
_kept: dict[Path, Function] = {}


def encode_block() -> Function:
    """The kernel: takes the address of a `calls.Call`, returns why it stopped."""
    try:
        path = _path()
        if path not in _kept:
            _kept[path] = _linked(path)
        return _kept[path]
    except Exception:  # other versions of llvmlite and numba than this was written with, an unwritable disk, …
        from internlm_ds.preprocess.engine.kernel import jitted

        found: Function = jitted(int.from_bytes(digest_of_sources()[:4], "little"))
        return found


def is_kept() -> bool:
    """Whether the code is there already, so that nothing will be compiled."""
    try:
        return _path().is_file()
    except Exception:
        return False


def digest_of_sources() -> bytes:
    """Changes when the compiled code may."""
    names = ("calls", "kernel", "memory", "merging", "segments", "tables")
    sources = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in names]
    return hashlib.sha256(b"".join(sources)).digest()


def link(content: bytes) -> Function:
    """The function in a kept file.

    Raises:
        ValueError: The file is damaged.
    """
    digest, rest = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(rest).digest() != digest:
        raise ValueError("damaged machine code")
    name, _, code = rest.partition(b"\n")
    llvm = _llvm()
    machine = llvm.Target.from_default_triple().create_target_machine(opt=3, codemodel="jitdefault", jit=True)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    function = kind(engine.get_function_address(name.decode()))

    def call(job: int) -> int:
        result, error = ctypes.c_int64(), ctypes.c_void_p()
        status = function(ctypes.byref(result), ctypes.byref(error), job)
        assert status == 0 and engine is not None, status  # the code lives as long as the engine
        return result.value

    return call


def _linked(path: Path) -> Function:
    try:
        return link(path.read_bytes())
    except (OSError, ValueError):
        _make(path)
        return link(path.read_bytes())


def _make(path: Path) -> None:
    """Compile, try in a process of its own, keep.

    Raises:
        Exception: One of these failed; nothing is kept.
    """
    # first: compiling for a folder that cannot be written would be in vain
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        from internlm_ds.preprocess.engine.kernel import compiled_object

        name, code = compiled_object()
        rest = name.encode() + b"\n" + code
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(rest).digest() + rest)
        script = f"import sys; from {__name__} import link; link(open(sys.argv[1], 'rb').read())"
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *sys.path])}
        subprocess.run([sys.executable, "-c", script, part], check=True, capture_output=True, timeout=120, env=environ)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def _path() -> Path:
    """Where the code for this processor, made by this version of everything, lies."""
    llvm = _llvm()
    versions = (llvm.llvm_version_info, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten())
    digest = hashlib.sha256(digest_of_sources() + repr(versions).encode()).hexdigest()
    return cache_folder(os.environ) / f"kernel-{digest[:32]}.o"


def _llvm() -> Any:
    import llvmlite.binding as llvm

    with contextlib.suppress(RuntimeError):  # newer ones do it by themselves and refuse this
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm
