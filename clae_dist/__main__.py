"""`python -m clae_dist …` is `clae …`."""

import sys

from clae_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
