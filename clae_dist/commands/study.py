"""`clae study`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from clae_dist.commands.settings import check_credentials, tracking_server
from clae_dist.errors import OK, STOPPED
from clae_dist.escape import say
from clae_dist.options import Parser, user_path

if TYPE_CHECKING:
    from clae_dist.studies.cells import StudyPlan
    from clae_dist.studies.study import Study

SUMMARY = "compare methods over seeds under an equal budget, or continue a study that was interrupted"
DESCRIPTION = """\
Runs every cell (method and seed) of STUDY as an ordinary run under the study's folder, evaluates it, and writes table,
curves, page, CSV and LaTeX. The same command continues after a kill. clae_dist/studies/README.md describes the file.

In a Slurm array:  sbatch --array=0-$(($(clae study STUDY --count) - 1)) … clae study STUDY --cell $SLURM_ARRAY_TASK_ID
"""


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "study", metavar="STUDY", type=user_path, help="a study file (YAML), such as configs/studies/cifar10.yaml"
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="settings of all methods, such as data.shards=shards"
    )
    parser.add_argument(
        "--folder", type=user_path, metavar="DIR", help="folder of the study (default: the file's, or runs/NAME)"
    )
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--dry-run", action="store_true", help="list the cells with their lengths and encoder passes; train nothing"
    )
    parts.add_argument("--count", action="store_true", help="print the number of cells")
    parts.add_argument("--cell", type=int, metavar="N", help="run cell N alone, counted from 0")
    parts.add_argument("--measure", action="store_true", help="measure every method's speed, which budget.seconds needs")
    parts.add_argument("--report", action="store_true", help="only write and print the results, of finished cells")


def run(arguments: argparse.Namespace) -> int:
    from clae_dist.studies.study import read_study

    study = read_study(arguments.study, arguments.overrides, arguments.folder, tracking_server())
    if arguments.count:
        from clae_dist.studies.cells import count_cells

        print(count_cells(study))
        return OK
    from clae_dist.launchers.output import lasting_output

    with lasting_output():
        return _run(arguments, study)


def _run(arguments: argparse.Namespace, study: Study) -> int:
    from clae_dist.studies import running
    from clae_dist.studies.cells import plan_cells
    from clae_dist.studies.listing import describe_cells

    speeds = running.read_speeds(study)
    if arguments.measure or (study.budget.kind == "seconds" and speeds is None and _runs_all(arguments)):
        code = running.measure_speeds(study, debug=arguments.debug)
        if code or arguments.measure:
            return code
        speeds = running.read_speeds(study)
    plan = plan_cells(study, speeds)
    for cell in plan.cells:
        if cell.recipe:
            check_credentials(cell.recipe)
    if arguments.dry_run:
        for line in describe_cells(plan):
            say(line)
        return OK
    if arguments.cell is not None:
        return _cell(arguments, plan)
    if arguments.report:
        _report(plan, print_table=True)
        return OK
    return _all(arguments, plan)


def _runs_all(arguments: argparse.Namespace) -> bool:
    return not (arguments.dry_run or arguments.report or arguments.cell is not None)


def _cell(arguments: argparse.Namespace, plan: StudyPlan) -> int:
    from clae_dist.errors import ConfigError
    from clae_dist.studies.running import run_cell

    if not 0 <= arguments.cell < len(plan.cells):
        raise ConfigError(
            f"--cell is {arguments.cell}, but the study has cells 0 to {len(plan.cells) - 1}; --dry-run lists them."
        )
    return run_cell(plan.study, plan.cells[arguments.cell], debug=arguments.debug)


def _all(arguments: argparse.Namespace, plan: StudyPlan) -> int:
    from clae_dist.studies.cells import refreshed
    from clae_dist.studies.listing import describe_cells
    from clae_dist.studies.running import cells_at_once, read_speeds, run_study

    for line in describe_cells(plan):
        say(line)
    first = next(cell.recipe for cell in plan.cells if cell.recipe)
    at_once = cells_at_once(first.config)
    code = run_study(plan.study, plan, arguments.overrides, at_once, lambda current: _report(current, print_table=False), say)
    if code == STOPPED:
        print("clae: stopped on request; the same command continues the study.", file=sys.stderr)
        return code
    _report(refreshed(plan, read_speeds(plan.study)), print_table=True)
    return code


def _report(plan: StudyPlan, *, print_table: bool) -> None:
    from clae_dist.studies.report import write_study_report

    for line in write_study_report(plan):
        if print_table:
            say(line)
