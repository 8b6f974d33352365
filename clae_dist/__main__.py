"""`python -m clae_dist …` is `clae …`."""

from clae_dist.cli import run

if __name__ == "__main__":
    run()
