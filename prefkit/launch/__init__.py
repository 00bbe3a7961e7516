"""Several processes from one command: how many, how they find each other, and what becomes of them."""
