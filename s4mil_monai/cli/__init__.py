"""The ``s4mil`` command: arguments in, one line out. The only package that prints.

Exit codes: 0 done, 1 something was wrong with a slide, a model or a folder, 2 wrong use of the command,
3 a result without a score (no tissue, or quality too bad).
"""
