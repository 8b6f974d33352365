from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import RankPool


@pytest.fixture(scope="package")
def pair() -> Iterator[RankPool]:
    """Two ranks of their own: DeepSpeed takes all ranks of torch.distributed, whatever group a backend is given."""
    pool = RankPool(2, imports=("deepspeed",))
    yield pool
    pool.close()
