"""`python -m tip_exp.deepplanning`: the command of tip_exp.envs.deepplanning under a short name."""

from tip_exp.envs.deepplanning.__main__ import main

if __name__ == "__main__":
    main()
