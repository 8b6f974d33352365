"""The cause of an end by its error, and the digest that tells two crashes apart."""

from __future__ import annotations

import errno

import pytest
import torch
from torch.distributed import DistBackendError, DistNetworkError

from clae_dist.causes import cause_of, digest_of, exit_code_of
from clae_dist.errors import (
    MEMORY,
    NETWORK,
    STORAGE,
    UNEXPECTED,
    Cause,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    RankError,
)
from clae_dist.storage import StorageError


def accelerator_error(text: str) -> RuntimeError:
    """The class that torch raises for an error of a kernel; its constructor takes what any RuntimeError does."""
    error: RuntimeError = torch.AcceleratorError(text)
    return error


@pytest.mark.parametrize(
    ("error", "cause", "code"),
    [
        (ConfigError("a setting"), "configuration", UNEXPECTED),
        (DataError("a shard"), "data", UNEXPECTED),
        (DivergedError("the loss is NaN"), "configuration", UNEXPECTED),
        (RankError("ranks found different checkpoints"), "code", UNEXPECTED),
        (CheckpointError("full"), "storage", STORAGE),
        (StorageError(errno.ENOSPC, "No space left on device", "/x"), "storage", STORAGE),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "storage", STORAGE),
        (MemoryError(), "memory", MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory", MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), "memory", MEMORY),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "memory", MEMORY),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "memory", MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory", MEMORY),
        (DistBackendError("NCCL error ... Cuda failure 2 'out of memory'"), "memory", MEMORY),
        (DistBackendError("NCCL error: remote process exited or there was a network error"), "network", NETWORK),
        (DistBackendError("NCCL error: unhandled system error"), "network", NETWORK),
        (DistBackendError("NCCL error: invalid usage"), "code", UNEXPECTED),
        (DistNetworkError("The client socket has timed out"), "network", NETWORK),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"), "network", NETWORK),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:84] Timed out waiting 1000ms for recv"), "network", NETWORK),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "network", NETWORK),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "network", NETWORK),
        (accelerator_error("CUDA error: uncorrectable ECC error encountered"), "host", UNEXPECTED),
        (accelerator_error("CUDA error: an illegal memory access was encountered"), "code", UNEXPECTED),
        (RuntimeError("CUDA error: device-side assert triggered"), "code", UNEXPECTED),
        (FileNotFoundError(errno.ENOENT, "No such file"), "code", UNEXPECTED),
        (KeyError("connection closed by peer"), "code", UNEXPECTED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_the_cause_of_an_error(error: Exception, cause: Cause, code: int) -> None:
    assert cause_of(error) == cause
    assert exit_code_of(cause) == code


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


def test_an_error_has_the_cause_that_it_names() -> None:
    """An error that is raised while another is handled has that one as context only: a fault in the handler is a fault."""
    assert cause_of(raised(RuntimeError("the batch failed"), torch.OutOfMemoryError("CUDA out of memory"))) == "memory"
    assert cause_of(raised(RuntimeError("a"), raised(RuntimeError("b"), ValueError("c")))) == "code"
    in_the_handler = KeyError("in the handler")
    in_the_handler.__context__ = MemoryError()
    assert cause_of(raised(in_the_handler)) == "code"


def test_a_digest_is_of_the_place_and_not_of_the_message() -> None:
    def fail(value: object) -> None:
        raise ValueError(f"{value} at {id(value):#x}")

    def digest(value: object) -> str:
        try:
            fail(value)
        except ValueError as error:
            return digest_of(error)
        raise AssertionError

    assert digest("a") == digest("b")
    assert digest("a") != digest_of(raised(ValueError("a")))
    assert digest_of(raised(ValueError("a"))) != digest_of(raised(TypeError("a")))
