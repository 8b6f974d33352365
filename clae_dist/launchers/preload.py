"""Imported once by the fork server of ranks; each rank is then forked from it in milliseconds, with torch imported.

No thread, process group or CUDA context may exist here: they do not survive a fork.
"""

import gc

import torch._dynamo

import clae_dist.launchers.local
import clae_dist.launchers.rank

_IMPORTED = (torch._dynamo, clae_dist.launchers.local, clae_dist.launchers.rank)  # an optimiser imports dynamo

gc.collect()
gc.freeze()  # the collector would write to these objects in every rank, and so copy their pages
