"""Bytes of stack that compiled Triton kernels take for each thread, as JSON: `python -m tests.data.compiled_augmentation 90`.

A kernel that takes any keeps values in memory for want of registers. Compiling needs no GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clae_dist.data import augment_triton
from clae_dist.data.augment_triton import _BLOCK, _CHUNK, _TILE, _WARPS

_POINTERS = {"pixels": "*u8", "parameters": "*fp32", "means": "*fp32", "augmented": "*fp32"}
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def stack_bytes(kernel: Any, capability: int, constants: dict[str, int]) -> int:
    """Stack of one kernel on GPUs of this compute capability (90 for 9.0), for images in channels-last memory."""
    constants = {"channel_stride": 1, **constants}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else _POINTERS.get(name, "i32") for name in names}
    source = ASTSource(
        fn=kernel, signature=signature, constexprs={name: constants[name] for name in names if name in constants}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": _WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"STACK:(\d+)", usage)))


if __name__ == "__main__":
    sizes = {"BLOCK": _BLOCK, "TILE": _TILE, "REACH": 2 * _TILE, "CHUNK": _CHUNK}
    kernels = (augment_triton._grey_means, augment_triton._augment_tiles)
    print(json.dumps({kernel.fn.__name__: stack_bytes(kernel, int(sys.argv[1]), sizes) for kernel in kernels}))
