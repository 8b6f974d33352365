"""Whole runs in a bucket, killed at random moments of their saves and started again: the bits of an undisturbed run."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clae_dist.runs.checkpoint.objects import Objects
from clae_dist.runs.ends import read_ends
from clae_dist.runs.folder import RunFolder
from clae_dist.runs.record import ENDS_FILE, TO_READ, Record
from clae_dist.staging import copy_folder, staging_folder
from tests.fault_proxy import Faults, Request
from tests.object_server import ON_BOTH_LONG, ObjectServer
from tests.processes import CLAE, end, environment, finish, new_mark, started
from tests.small_run import Undisturbed, assert_same_weights

_REQUESTS = 24  # to checkpoints, of about two saves


@contextmanager
def killed_at(faults: Faults, moment: int, mark: dict[str, str], carried_out: bool) -> Iterator[threading.Event]:
    """Kill all processes with the mark at a request to objects of checkpoints, before it is carried out or after it.

    Then the event is set.
    """
    happened, numbers = threading.Event(), iter(range(1_000_000))

    def choose(request: Request) -> str:
        if happened.is_set():
            return "reset"
        if request.action != "list" and "/checkpoints/" in request.key and next(numbers) == moment:
            happened.set()
            end(mark)
            return "lost" if carried_out else "reset"
        return ""

    faults.choose = choose
    try:
        yield happened
    finally:
        faults.choose = lambda request: ""


def committed(bucket: ObjectServer) -> int:
    """The newest step that is committed in the bucket."""
    objects = Objects.of(staging_folder(bucket.url))
    assert objects is not None
    return max(objects.committed(), default=0)


@ON_BOTH_LONG
@pytest.mark.parametrize(
    ("num_kills", "epochs"),
    [
        pytest.param(3, 6, marks=pytest.mark.slow),
        pytest.param(50, 60, marks=[pytest.mark.long, pytest.mark.timeout(7200)]),
    ],
)
def test_a_killed_run_resumes_from_what_is_committed(
    num_kills: int, epochs: int, bucket: ObjectServer, recipe: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """kill -9 of the launcher, its fork servers and both ranks at once, as when the machine is lost."""
    draws, resumed, kills = random.Random(num_kills), [0], 0
    settings = [f"run_dir={bucket.url}", f"train.epochs={epochs}", "checkpoint.every_steps=2", "launch.workers=2"]
    command = (*CLAE, "train", recipe, "--launcher", "local", *settings)
    while kills < num_kills:
        before, mark = committed(bucket), new_mark()
        with (
            killed_at(bucket.faults, draws.randrange(_REQUESTS), mark, draws.random() < 0.5) as happened,
            started(*command, env=environment(), mark=mark) as process,
        ):
            code, output = finish(process)
        assert happened.is_set(), output
        assert code == -9, output
        kills += 1
        found = re.search(r"resuming after step (\d+)", output)
        if "starting: loader processes" in output:  # otherwise it was killed while it read the checkpoint
            assert (int(found[1]) if found else 0) == before, output
            resumed.append(before)
    with started(*command, env=environment()) as process:
        code, output = finish(process)
    assert code == 0, output
    assert len(set(resumed)) > 1
    assert_same_weights(staging_folder(bucket.url), undisturbed(2, epochs=epochs), 4 * epochs)
    copy = copy_folder(bucket.url)
    record = Record.of(copy)
    assert record is not None
    record.pull((*TO_READ, ENDS_FILE))
    assert {end.cause for end in read_ends(copy)} == {"host", "finished"}
    assert RunFolder(copy).metrics_file.read_text().count('"loss"') >= 4 * epochs
    print(f"{kills} kills; resumed after steps {resumed}")
