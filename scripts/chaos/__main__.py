"""Disturb small runs at random and check that each ends like an undisturbed one, or refuses with one clear line.

python -m scripts.chaos --cases 378 --seed 0 --records outputs/chaos/0.jsonl --out results/chaos.md    (`make chaos`)
python -m scripts.chaos --only 17       (one case; its folder is kept if it is wrong)
python -m scripts.chaos --seconds 120   (start no case after this time, once each kind has run: `make chaos-quick`)
python -m scripts.chaos soak --steps 2000   (memory, handles and processes of a long run; readers beside writers)
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from scripts.chaos.campaign import campaign, is_wrong, summary
from scripts.chaos.soak import soak
from tip_exp.config.resolvers import register_resolvers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("cases", "soak"), default="cases")
    parser.add_argument("--steps", type=int, default=2000, help="of the soak")
    parser.add_argument("--cases", type=int, default=378)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases to run")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this time")
    parser.add_argument("--records", type=Path, help="file of one JSON line for each case; the command goes on from it")
    parser.add_argument("--out", type=Path, help="file for the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    register_resolvers()
    if arguments.what == "soak":
        text, is_wanted = soak(arguments.steps)
        print(text)
        return 0 if is_wanted else 1
    cases = list(range(arguments.cases)) if arguments.only is None else arguments.only
    records = campaign(cases, arguments.seed, arguments.seconds, arguments.records)
    command = shlex.join(["python", "-m", "scripts.chaos", *sys.argv[1:]])
    text = summary(records, command)
    print(text)
    if arguments.out:
        arguments.out.write_text(f"# Chaos\n\n{text}", encoding="utf-8")
    return 1 if any(map(is_wrong, records)) else 0


if __name__ == "__main__":
    sys.exit(main())
