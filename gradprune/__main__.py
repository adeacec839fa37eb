"""`python -m gradprune`, as torchrun starts it."""

from gradprune.cli import main

if __name__ == "__main__":
    main()
