"""For the fork server of loader processes alone, which imports this first: it ends with its rank.

Importing it elsewhere ties that process to its parent.
"""

import os

from clae_dist.lifetime import end_with_parent

PID = os.getpid()  # the server's, also in the loader processes that it forks
end_with_parent(os.getppid())
