"""Imports of the fork server, which loader processes share: they save 250 MB per process.

In a fork of the rank (lifetime.fork_server_from_here) they are there already.
"""

import atexit
import gc
import os

from clae_dist.data.decode import torchvision_decoder
from clae_dist.data.loader import leave_signals_to_the_rank
from clae_dist.lifetime import name_process

name_process("clae-loaders")
leave_signals_to_the_rank()
torchvision_decoder()  # imports torchvision, which the first image would
gc.collect()
gc.freeze()  # the garbage collector would write to every object, and a page that is written to is a page of one's own
atexit.register(os._exit, 0)  # triton, which torchvision brings along, complains when Python is taken down
