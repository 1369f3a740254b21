"""`python -m plainloop.trainer ...` and `torchrun -m plainloop.trainer ...` are `plainloop ...`."""

from plainloop.trainer.cli import main_of_process

if __name__ == "__main__":
    main_of_process()
