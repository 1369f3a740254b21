"""`python -m plainloop.trainer ...` and `torchrun -m plainloop.trainer ...` are `plainloop ...`."""

from plainloop.trainer.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
