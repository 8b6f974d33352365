"""The evaluation protocols of `clae evaluate`, in the order of tables. A new one is a file and an entry here."""

from __future__ import annotations

from clae_dist.evaluation.knn import Knn
from clae_dist.evaluation.linear import LinearProbe
from clae_dist.evaluation.protocol import EvaluationProtocol

PROTOCOLS: dict[str, EvaluationProtocol] = {protocol.name: protocol for protocol in (Knn(), LinearProbe())}
