"""`python -m fourfold` is the `fourfold` command, so that `torchrun -m fourfold train run.yaml` can start it."""

from fourfold.cli import main

if __name__ == "__main__":
    main()
