"""`python -m tests.null_gpu.verified FOLDER`: checks of `clae verify` on null GPUs, in FOLDER/verify.json.

Values mean nothing here: checks fail by values, and none may fail by an error. Spawned ranks import this module as well.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from clae_dist.cli import main
from clae_dist.verify import attacks, checkpoints, equality
from tests.null_gpu import program

CHECKS = "collectives,batch norm,attacks,checkpoints"
_backends, _cases = equality.backends, attacks._cases


def _on_cpu(function: Any) -> Any:
    """The function on the CPU, with its result on the device."""
    return lambda images: function(images.cpu()).to(images.device)


# cuFFT, and the compiler of the kernel of erfinv, are libraries of their own, which are not replaced.
torch.fft.fft2, torch.fft.ifft2, torch.erfinv = map(_on_cpu, (torch.fft.fft2, torch.fft.ifft2, torch.erfinv))
checkpoints.backends = lambda subject: {name: one for name, one in _backends(subject).items() if name != "zero-3"}
# DSCL compares the mean of a map of features with the features, by value.
attacks._cases = lambda subject, size: (case for case in _cases(subject, size) if case[0] != "dscl")

if __name__ == "__main__":
    assert program.counts()["launches"] == 0
    sys.exit(main(["verify", "--quick", "--device", "cuda", "--limit", "200", "--only", CHECKS, "--to", sys.argv[1]]))
