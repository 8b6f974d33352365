"""For the fork server alone: what it imports once, loader processes share. One of its own would take 250 MB more."""

import atexit
import gc
import os
import signal

import clae_dist.data.loader  # noqa: F401
from clae_dist.data.decode import torchvision_decoder

signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a scheduler's notice goes to every process of a job step; it is for the ranks
torchvision_decoder()  # imports torchvision, which the first image would
gc.collect()
gc.freeze()  # the garbage collector would write to every object, and a page that is written to is a page of one's own
atexit.register(os._exit, 0)  # triton, which torchvision brings along, complains when Python is taken down
