"""``python -m s4mil_monai`` is ``s4mil``."""

from s4mil_monai.cli.main import main

main()
