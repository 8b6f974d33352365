"""Start-up of a fork server, which imports this module first: the server ends with the process that started it.

Import it nowhere else: importing ties the importing process to its parent.
"""

import os

from clae_dist.lifetime import end_with_parent

PID = os.getpid()  # of the server, also in the processes that it forks
end_with_parent(os.getppid())
