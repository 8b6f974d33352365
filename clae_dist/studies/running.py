"""Run the cells of a study: one in this process (`--cell N`), or all in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from clae_dist.config import Config
from clae_dist.errors import INTERRUPTED, OK, STOPPED, ConfigError
from clae_dist.escape import say as print_line
from clae_dist.evaluation.metrics import read_metrics
from clae_dist.files import write_atomically
from clae_dist.launchers import claim, start
from clae_dist.reading import MissingError, ReadError, is_number, read_object
from clae_dist.recipe import Recipe
from clae_dist.redact import redact_text
from clae_dist.runs.folder import RunFolder
from clae_dist.studies.cells import Cell, StudyPlan, base_recipe, refreshed
from clae_dist.studies.held_out import write_score
from clae_dist.studies.study import Study
from clae_dist.training.finish import Request, evaluate
from clae_dist.wording import count_of

Say = Callable[[str], None]
MEASURED_STEPS = 24  # of each method, the first third of which is not timed
_POLL_S = 0.2
_SAME_REQUEST_S = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def run_cell(study: Study, cell: Cell, say: Say = print_line, *, debug: bool = False) -> int:
    """Train and evaluate one cell, resuming what is there. Returns the exit code.

    Raises ConfigError for a cell whose settings are still to be selected.
    """
    if cell.recipe is None:
        raise ConfigError(
            f"cell {cell.index} ({cell.title}) depends on a selection that is not finished; run the cells of the selection "
            f"first, which --dry-run lists."
        )
    if cell.done:
        say(f"{cell.title}: finished already, in {cell.folder}")
        return OK
    code = _train(cell.recipe, say, debug=debug)
    if code != OK:
        return code
    if cell.stage == "select":
        say(f"{cell.title}: held-out accuracy within the train split {write_score(cell.folder, cell.score_file):.2f} %")
    else:
        evaluate(Request(str(cell.folder), suite=study.suite, overrides=tuple(study.suite_overrides)), say=say)
    return OK


def _train(recipe: Recipe, say: Say, *, debug: bool) -> int:
    if problem := claim(recipe.config):
        say(f"the run could not be recorded as yours ({problem}): opening it later may need --trust.")
    ending = start(recipe, debug=debug)
    if ending.message:
        print_line(redact_text(f"clae: {ending.message}"), file=sys.stderr)
    return ending.code


def command_of(study: Study, overrides: Sequence[str], *words: str) -> list[str]:
    """The command of a part of a study in a process that ends with this one."""
    program = [sys.executable, "-m", "clae_dist.lifetime", str(os.getpid()), sys.executable, "-m", "clae_dist"]
    return [*program, "study", str(study.path), *overrides, "--folder", str(study.folder), *words]


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]


def run_study(
    study: Study, plan: StudyPlan, overrides: Sequence[str], at_once: int, after_cell: Callable[[StudyPlan], None], say: Say
) -> int:
    """Run every unfinished cell, `at_once` at a time. Returns 0, or the exit code of the last cell that failed.

    A failed cell does not keep others from running. A stop request is passed on to the running cells, and ends the study.

    Args:
        after_cell: called with the current plan whenever a cell has ended.
    """
    failed: dict[int, int] = {}
    ended: set[int] = set()  # in this process: no cell runs twice
    running: list[_Running] = []
    with _stop_requests(running) as requested:
        while True:
            waiting = _waiting(plan, ended | {one.cell.index for one in running})
            while waiting and len(running) < at_once and not requested:
                cell = waiting.pop(0)
                say(f"cell {cell.index} of {len(plan.cells)}: {cell.title}, {count_of(cell.steps, 'step')}; {cell.folder}")
                command = command_of(study, overrides, "--cell", str(cell.index))
                running.append(_Running(cell, subprocess.Popen(command)))
            if not running:
                break
            for one in _wait(running):
                running.remove(one)
                ended.add(one.cell.index)
                code = one.process.returncode
                if code in (STOPPED, INTERRUPTED):
                    requested.append(code)
                elif code != OK:
                    failed[one.cell.index] = code if code > 0 else 1
                    say(f"cell {one.cell.index} ({one.cell.title}) failed with exit code {code}; other cells continue")
            plan = refreshed(plan, read_speeds(study))
            after_cell(plan)
    if requested:
        return STOPPED
    if failed:
        say(f"failed: cells {', '.join(map(str, failed))}; the same command tries them again")
    return next(reversed(failed.values()), OK)


def _waiting(plan: StudyPlan, taken: set[int]) -> list[Cell]:
    return [cell for cell in plan.cells if cell.recipe and cell.index not in taken and not cell.done]


def _wait(running: Sequence[_Running]) -> list[_Running]:
    """The cells that have ended, at least one."""
    while not (over := [one for one in running if one.process.poll() is not None]):
        time.sleep(_POLL_S)
    return over


@contextmanager
def _stop_requests(running: Sequence[_Running]) -> Iterator[list[int]]:
    """Inside, the first stop signal is passed on to the running cells, which save and leave; a later one kills them.

    `timeout` and schedulers send a signal to the process and to its group: one that arrives again at once is the same request.
    Yields the received signals.
    """
    received: list[int] = []
    first_at: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        first_at.append(time.monotonic())
        again = first_at[-1] - first_at[0] > _SAME_REQUEST_S
        if len(received) > 1 and not again:
            return
        for one in running:
            if again and number != signal.SIGUSR1:
                one.process.kill()
            elif number != signal.SIGINT:  # a terminal sends it to the cells as well
                one.process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield received
    finally:
        for one in running:
            one.process.kill()
            one.process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def cells_at_once(config: Config) -> int:
    """The number of cells that run side by side: under Ray as many as fit, else 1."""
    if config.launch.launcher != "ray":
        return 1
    from clae_dist.launchers.ray import runs_that_fit

    return runs_that_fit(config)


# ---- speed, for budget.seconds ----


def read_speeds(study: Study) -> dict[str, float] | None:
    """Images per second of each method, as measured; None before that, and where a method is missing."""
    path = _speeds_file(study)
    try:
        content = read_object(path)
    except MissingError:
        return None
    except ReadError as error:
        raise ConfigError(f"{path} is damaged ({error}); delete it and measure again with --measure.") from None
    names = {method.name for method in study.methods}
    speeds = {name: float(speed) for name, speed in content.items() if is_number(speed) and speed > 0}
    return speeds if names <= speeds.keys() else None


def _speeds_file(study: Study) -> Path:
    return study.folder / "measured.json"


def measure_speeds(study: Study, say: Say = print_line, *, debug: bool = False) -> int:
    """Train every method for a few steps and write its speed to measured.json, which then determines the length of cells.

    Returns the exit code of the first run that fails, else 0.
    """
    speeds = {}
    for method in study.methods:
        base = base_recipe(study, method)
        folder = study.folder / "measure" / method.name
        config = base.config
        short = replace(
            config,
            name=f"{study.name}-measure-{method.name}",
            run_dir=str(folder),
            train=replace(config.train, epochs=_epochs_of(config, MEASURED_STEPS), knn_every=0.0, log_every=1),
            optim=replace(config.optim, warmup_epochs=0.0),
            tracking=replace(config.tracking, name="none"),
            checkpoint=replace(config.checkpoint, every_steps=0),
        )
        code = _train(Recipe(short, base.origins), say, debug=debug)
        if code != OK:
            return code
        rates = list(read_metrics(RunFolder(folder).metrics_file)[0].rates.y)
        speeds[method.name] = statistics.median(rates[len(rates) // 3 :])
        say(f"{method.name}: {speeds[method.name]:,.0f} images/s")
    write_speeds(study, speeds)
    return OK


def write_speeds(study: Study, speeds: Mapping[str, float]) -> None:
    study.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(_speeds_file(study), (json.dumps(speeds, indent=2) + "\n").encode())


def _epochs_of(config: Config, steps: int) -> float:
    from clae_dist.training.plan import Plan
    from clae_dist.training.sets import check_sets

    manifest = check_sets(config)
    if manifest is None:
        raise ConfigError("budget.seconds needs shards with a manifest; prepare the images with `python -m data_prep`.")
    return steps / Plan.of(config, manifest.num_samples(config.data.train_split)).steps_per_epoch
