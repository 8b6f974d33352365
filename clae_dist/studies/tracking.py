"""A study in MLflow: a parent run with the results, and the runs of its cells as children."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from clae_dist.escape import shown
from clae_dist.runs.folder import RunFolder
from clae_dist.studies.cells import StudyPlan
from clae_dist.studies.results import CellResult, Table, flat_results


def track_study(plan: StudyPlan, results: Sequence[CellResult], tables: Sequence[Table], files: Sequence[Path]) -> str:
    """Record the study where the runs of its cells are. Returns the reason if that was not possible, or "".

    A tracking server that fails does not fail the study: the next report sends everything again.
    """
    tracked = [one for one in results if one.cell.recipe and one.cell.recipe.config.tracking.uses("mlflow")]
    if not tracked:
        return ""
    from clae_dist.tracking.mlflow import store_uri
    from clae_dist.tracking.nested import Nested, record_nested

    first = tracked[0].cell
    assert first.recipe is not None
    config = first.recipe.config
    study = plan.study
    nested = Nested(
        name=study.name,
        key=hashlib.sha256(str(study.folder).encode()).hexdigest()[:32],
        children=tuple(RunFolder(one.cell.folder).read_identity().run_key for one in tracked),
        metrics=flat_results(tables),
        params={
            "baseline": study.baseline,
            "budget": f"{study.budget.kind} {study.budget.amount:g}",
            "seeds": str(study.seeds),
        },
        files=tuple(files),
        finished=len(results) == len(plan.of("compare")),
    )
    try:
        record_nested(store_uri(config, first.folder), config.tracking.experiment, nested)
    except Exception as error:  # a tracking server, of which anything may fail
        return f"the study was not recorded in MLflow ({type(error).__name__}: {shown(error)[:200]}); --report tries again"
    return ""
