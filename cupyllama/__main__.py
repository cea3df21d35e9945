"""`python -m cupyllama`, the usual way in under mpirun."""

from cupyllama.cli import main

if __name__ == "__main__":
    main()
