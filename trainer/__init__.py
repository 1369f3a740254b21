"""How it is trained: __main__.py -> run.py -> loop.py is the whole program, in reading order."""
