"""Builds the null GPU for the torch of this Python: two libraries in a folder, and the environment that loads them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

_HERE = Path(__file__).parent
_RUNTIME = re.compile(r"^(cuda[A-Z]|cublas[A-Z]|nccl[A-Z])")
_DRIVER = re.compile(r"^cu[A-Z]")
_OF_TRITON = {
    "cuCtxGetLimit",
    "cuCtxSetCurrent",
    "cuCtxSetLimit",
    "cuFuncSetAttribute",
    "cuFuncSetCacheConfig",
    "cuModuleUnload",
}
_FLAGS = ("-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unused-parameter")


class NoNullGpuError(Exception):
    """The null GPU cannot be built here; the message says why."""


@dataclass(frozen=True)
class NullGpu:
    """A built null GPU in `folder`."""

    folder: Path

    def environment(self, gpus: int, **more: str) -> dict[str, str]:
        """This process's environment for a child that sees `gpus` null GPUs."""
        paths = [str(self.folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        return {
            **{name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"},
            "LD_LIBRARY_PATH": os.pathsep.join(paths),
            "LD_PRELOAD": str(self.folder / "libnull_gpu.so"),
            "NULL_GPUS": str(gpus),
            **more,
        }


def build(folder: Path) -> NullGpu:
    """Compiles into `folder`. Raises NoNullGpuError where there is no compiler, no CUDA build of torch, or a real GPU."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which("nm") is None:
        raise NoNullGpuError("no C compiler, or no binutils (nm); install gcc and binutils")
    if torch.version.cuda is None:
        raise NoNullGpuError(f"torch {torch.__version__} is no CUDA build")
    if torch.cuda.is_available():
        raise NoNullGpuError("this machine has a GPU of its own, whose driver would answer as well")
    includes = _cuda_headers()
    libraries = Path(torch.__file__).parent / "lib"
    asked = _undefined(libraries.glob("libtorch_cuda*.so"), _RUNTIME)
    asked |= _undefined([libraries / "libc10_cuda.so", libraries / "libtorch_nvshmem.so"], _RUNTIME)
    driver = _undefined([libraries / "libcaffe2_nvrtc.so"], _DRIVER) | _OF_TRITON
    flags = [compiler, *_FLAGS, f"-I{_HERE}", f"-I{includes}"]
    _library(flags, folder / "libnull_gpu.so", ["runtime.c", "libraries.c"], asked, "-lpthread", "-ldl")
    _library(flags, folder / "libcuda.so.1", ["driver.c"], driver, "-Wl,-soname,libcuda.so.1")
    return NullGpu(folder)


def _cuda_headers() -> Path:
    """The folder of CUDA's headers, which come with torch's CUDA packages."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for header in sorted(Path(folder).rglob("cuda_runtime_api.h")):
            return header.parent
    raise NoNullGpuError("CUDA's headers (cuda_runtime_api.h) are not among torch's packages")


def _undefined(libraries: Iterable[Path], names: re.Pattern[str]) -> set[str]:
    """Symbols that these libraries expect of others."""
    return {name for library in libraries if library.exists() for name in _symbols(library, "--undefined-only", names)}


def _symbols(library: Path, which: str, names: re.Pattern[str]) -> set[str]:
    listing = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[-1].partition("@")[0] for line in listing.splitlines()}
    return {symbol for symbol in symbols if names.match(symbol)}


def _library(flags: list[str], library: Path, sources: list[str], asked: set[str], *linking: str) -> None:
    """Compiles `sources`, and again with a stub for every symbol that is asked for and that they do not define."""
    written = [str(_HERE / source) for source in sources]
    _compile([*flags, "-o", str(library), *written, *linking])
    missing = sorted(asked - _symbols(library, "--defined-only", re.compile("")))
    stubs = library.parent / f"{library.name}.stubs.c"
    stubs.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
    _compile([*flags, "-o", str(library), *written, str(stubs), *linking])


def _compile(line: list[str]) -> None:
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(line)}\n{done.stderr}")
