"""`python -m tip_exp …` is `tip-exp …`."""

from tip_exp.launch.cli import main

main()
