"""`python -m prefkit`, for torchrun and its like."""

from prefkit.cli import main

if __name__ == "__main__":
    main()
