"""Generated one-day tasks with three constraints, two of which need a tool call; small enough for a tiny model.

    "City: Alderby, 2025-11-12. Hotel: 4 stars. Sight of type: Theme Park. Must see: Amber Tower."
Layout of the files, tools and scorer are those of the official tasks. Exactly one hotel has the stars and one
attraction the type, and names are independent of both, so an answer that is not looked up is a guess. The query names
the third answer, so the no-tool baseline is 1/3.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tip_exp.envs.deepplanning.data import TABLES
from tip_exp.utils.distinct import distinct
from tip_exp.utils.errors import DataError

CITIES = ("Alderby", "Brookhaven", "Dunmere", "Eastwick", "Fernhollow", "Carrowmore")
TYPES = (
    *("Historical and Cultural", "Natural Scenery", "Art Exhibition", "City Landmark", "Theme Park"),
    "Leisure Experience",
)
FIRST = (
    *("Amber", "Silver", "Willow", "Granite", "Copper", "Maple", "Harbor", "Lantern", "Ivory", "Juniper"),
    *("Cedar", "Falcon", "Meadow", "Raven", "Saffron", "Velvet"),
)
HOTELS = ("Inn", "Hotel", "Lodge", "House")
SIGHTS = ("Tower", "Garden", "Bridge", "Gallery", "Fort", "Lake")
STARS = ("2", "3", "4", "5")
DAY, NEXT_DAY = "2025-11-12", "2025-11-13"  # departure of 116 of the 120 official tasks
_QUERIES = "data/travelplanning_query_en.json"
# All official columns, in the official order; the tasks fill only some of them.
_HOTEL_COLUMNS = "city name address latitude longitude decoration_time hotel_star price score brand services"
_SIGHT_COLUMNS = (
    "city attraction_name attraction_id description attraction_type address latitude longitude rating opening_time "
    "closing_time closing_dates min_visit_hours max_visit_hours ticket_price"
)


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """One task: its entry in the query file, and its tables; a table that is absent gets no file.

    The rows of a table all have the same columns, which become the header.
    """

    query: dict[str, Any]  # id, query, meta_info
    tables: dict[str, list[dict[str, str]]]


def write(root: Path, tasks: Iterable[TaskFiles]) -> dict[Path, str]:
    """ROOT/data/travelplanning_query_en.json and ROOT/database/database_en/id_<id>/…; path -> SHA-256 of each table.

    The folder is written aside and renamed, so it is complete or absent. An existing one is kept if it holds these
    files and nothing else, else replaced. Several processes may write one world at once.
    """
    files = _contents(tasks)
    if not _holds(root, files):
        root.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent, ignore_cleanup_errors=True) as aside:
            for name, content in files.items():
                path = Path(aside, "new", name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            with _locked(root.parent):
                if not _holds(root, files):  # another process may have been first
                    if os.path.lexists(root):
                        root.rename(Path(aside, "damaged"))  # a link is renamed, not followed
                    Path(aside, "new").rename(root)
    return {root / name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name != _QUERIES}


def digest(tasks: Iterable[TaskFiles]) -> str:
    """The first 12 digits of a SHA-256 of the names and contents of a world's files."""
    return hashlib.sha256(repr(_contents(tasks)).encode()).hexdigest()[:12]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time in, where the file system has locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _contents(tasks: Iterable[TaskFiles]) -> dict[str, bytes]:
    """Path below the root -> content, of all files of a world."""
    files: dict[str, bytes] = {}
    queries = []
    for task in tasks:
        queries.append(task.query)
        for table, rows in task.tables.items():
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
            files[f"database/database_en/id_{task.query['id']}/{TABLES[table][0]}"] = text.getvalue().encode()
    return files | {_QUERIES: json.dumps(queries, ensure_ascii=False, indent=1).encode()}


def _holds(root: Path, files: dict[str, bytes]) -> bool:
    """Whether a folder holds exactly these files, none of them or of their folders a link."""
    if root.is_symlink() or not root.is_dir():
        return False
    try:
        existing = list(root.rglob("*"))
        if any(path.is_symlink() for path in existing):
            return False
        names = {str(path.relative_to(root)) for path in existing if not path.is_dir()}
        return names == files.keys() and all((root / name).read_bytes() == content for name, content in files.items())
    except OSError:  # another process moves it
        return False


def make(task_id: str, seed: str) -> TaskFiles:
    """One task, a function of id and seed."""
    rng = random.Random(f"errands/{seed}/{task_id}")
    city = rng.choice(CITIES)
    hotels = [f"{first} {rng.choice(HOTELS)}" for first in rng.sample(FIRST, len(STARS))]
    sights = [f"{first} {rng.choice(SIGHTS)}" for first in rng.sample(FIRST, len(TYPES))]
    star, wanted, named = rng.randrange(len(STARS)), *rng.sample(range(len(TYPES)), 2)
    query = (
        f"City: {city}, {DAY}. Hotel: {STARS[star]} stars. Sight of type: {TYPES[wanted]}. Must see: {sights[named]}."
    )
    constraints = {
        "hotel_cheapest_star": {"hotel_name": hotels[star], "hotel_star": int(STARS[star])},
        "attraction_all_of_type": {"attraction_names": [sights[wanted]], "attraction_type": TYPES[wanted]},
        "attraction_must_visit_named": {"attraction_names": [sights[named]]},
    }
    meta = {"org": city, "dest": [city], "days": 1, "depart_date": DAY, "return_date": DAY, "depart_weekday": 3}
    meta |= {"people_number": 1, "room_number": 1, "hard_constraints": constraints}
    hotel_rows = [
        {"city": city, "name": name, "hotel_star": stars, "price": str(100 * int(stars) + rng.randrange(50))}
        for name, stars in zip(hotels, STARS, strict=True)
    ]
    sight_rows = [
        {"city": city, "attraction_name": name, "attraction_type": kind, "description": "worth a visit"}
        for name, kind in zip(sights, TYPES, strict=True)
    ]
    tables = {
        "hotels": [dict.fromkeys(_HOTEL_COLUMNS.split(), "") | row for row in hotel_rows],
        "attractions": [dict.fromkeys(_SIGHT_COLUMNS.split(), "") | row for row in sight_rows],
    }
    return TaskFiles({"id": task_id, "query": query, "meta_info": meta}, tables)


def stream(seed: str, num_tasks: int) -> list[TaskFiles]:
    """`num_tasks` tasks of a seed with distinct queries, which identify them; DataError if there are fewer."""
    made = (make(str(number), seed) for number in count())
    tasks = list(islice(distinct(made, lambda task: task.query["query"]), num_tasks))
    if len(tasks) < num_tasks:
        raise DataError(f"only {len(tasks)} generated trips have distinct queries; got num_problems={num_tasks}")
    return tasks
