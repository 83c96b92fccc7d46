"""``python -m s4mil_monai`` is ``s4mil``."""

from s4mil_monai.cli import main

main()
