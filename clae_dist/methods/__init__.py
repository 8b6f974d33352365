"""One file per pretraining method (README.md here shows how to add one)."""

from __future__ import annotations

import difflib
import importlib
from functools import cache

from clae_dist.config import MethodSettings
from clae_dist.contrast.method import Method
from clae_dist.errors import ConfigError

METHODS = {
    "acl": "clae_dist.methods.acl:Acl",
    "advcl": "clae_dist.methods.advcl:AdvCl",
    "air": "clae_dist.methods.air:Air",
    "anchored": "clae_dist.methods.anchored:Anchored",
    "ascl": "clae_dist.methods.ascl:Ascl",
    "clae": "clae_dist.methods.clae:Clae",
    "clae_fused": "clae_dist.methods.clae_fused:ClaeFused",
    "clusterns": "clae_dist.methods.clusterns:ClusterNs",
    "dscl": "clae_dist.methods.dscl:Dscl",
    "dynacl": "clae_dist.methods.dynacl:DynAcl",
    "moco": "clae_dist.methods.moco:MoCo",
    "rocl": "clae_dist.methods.rocl:Rocl",
    "simclr": "clae_dist.methods.simclr:SimClr",
    "supcon": "clae_dist.methods.supcon:SupCon",
}

TASKS = {
    "adversarial": "clae_dist.downstream.adversarial:Adversarial",
    "classify": "clae_dist.downstream.classify:Classify",
    "domain": "clae_dist.downstream.domain:Domain",
    "noisy": "clae_dist.downstream.noisy:Noisy",
    "retrieve": "clae_dist.downstream.retrieve:Retrieve",
}  # methods as well: what a pretrained encoder is trained for next
KNOWN = METHODS | TASKS


@cache
def method_class(name: str) -> type[Method]:
    """The class behind `method.name`: a name of METHODS or TASKS, or package.module:Class. Raises ConfigError."""
    module, colon, attribute = KNOWN.get(name, name).partition(":")
    if not colon:
        close = difflib.get_close_matches(name, KNOWN, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ConfigError(f"method.name is {name!r}; expected one of {', '.join(KNOWN)}, or package.module:Class{hint}.")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"method.name is {name!r}, which cannot be imported ({error}).") from None
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"method.name is {name!r}, which is not a subclass of clae_dist.contrast.method.Method.")
    return found


def make_method(settings: MethodSettings) -> Method:
    """The method of a run, from the `method.*` settings of its Config."""
    return method_class(settings.name)(settings)
