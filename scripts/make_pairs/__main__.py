"""Make a teacher-student pair.

    python -m scripts.make_pairs word_sums --out DIR     pretrain the pair `tiny` (3 minutes on two cores)
    python -m scripts.make_pairs tools --out DIR         pretrain the pair `tiny_tools` (10 minutes on two cores)
    python -m scripts.make_pairs ledger --out DIR        pretrain the pair `tiny_ledger` (6 minutes on two cores)
    python -m scripts.make_pairs smollm2 --out DIR       convert SmolLM2-135M-Instruct (2 minutes)
    python -m scripts.make_pairs students --out DIR      three students of the pair `tiny`, DIR/0 … DIR/2 (4 minutes)

The pairs are two Hugging Face folders, DIR/teacher and DIR/student. Pretraining gives the same files on every run on
one machine with the same library versions.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from pathlib import Path
from typing import Any

from scripts.make_pairs import ledger, smollm2, tools, word_sums


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.make_pairs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pair", choices=["word_sums", "tools", "ledger", "smollm2", "students"])
    parser.add_argument("--out", type=Path, required=True, help="where the folders go")
    arguments = parser.parse_args()
    if arguments.pair == "smollm2":
        smollm2.make(arguments.out, smollm2.source_folder())
        return
    roles: tuple[str | int, ...] = ("teacher", "student")
    makers = {"word_sums": word_sums.make, "tools": tools.make, "ledger": ledger.make}
    make: Any = makers.get(arguments.pair)
    if arguments.pair == "students":
        roles, make = (0, 1, 2), word_sums.make_student
    os.environ["OMP_NUM_THREADS"] = "1"  # one thread fixes the order of summation
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=make, args=(role, arguments.out), name=str(role)) for role in roles]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if failed := [process.name for process in processes if process.exitcode != 0]:
        raise SystemExit(f"pretraining failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
