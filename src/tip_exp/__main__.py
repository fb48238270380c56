"""`python -m tip_exp …` is `tip-exp …`."""

from tip_exp.cli import main

main()
