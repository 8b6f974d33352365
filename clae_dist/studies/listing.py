"""The cells of a study as lines for the console."""

from __future__ import annotations

from collections.abc import Iterator

from clae_dist.studies.cells import Cell, StudyPlan
from clae_dist.wording import count_of


def describe_cells(plan: StudyPlan) -> Iterator[str]:
    """One line for the study, one for each cell."""
    study = plan.study
    passes = f" = {plan.passes:,.0f} encoder passes a cell" if plan.passes else ""
    done = sum(cell.done for cell in plan.cells)
    yield (
        f"study {study.name}: {count_of(len(plan.cells), 'cell')}, {done} finished; budget {study.budget.kind} "
        f"{study.budget.amount:g}{passes}; {plan.manifest.name}; {study.folder}"
    )
    width = max(len(cell.title) for cell in plan.cells)
    for cell in plan.cells:
        yield f"  {cell.index:3}  {cell.title:{width}}  {_length(cell)}{'  finished' if cell.done else ''}"


def _length(cell: Cell) -> str:
    if cell.recipe is None:
        return "length depends on the selection"
    epochs = cell.steps / cell.steps_per_epoch
    passes = "" if cell.passes is None else f", {cell.passes:,.0f} encoder passes"
    return f"{count_of(cell.steps, 'step')}, {epochs:.3g} epochs{passes}"
