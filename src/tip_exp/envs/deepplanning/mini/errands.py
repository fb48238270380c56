"""The mini world's shortest tasks: one day, three wishes, two of them to be looked up; small enough for a tiny model.

    "City: Alderby, 2025-11-12. Hotel: 4 stars. Sight of type: Theme Park. Must see: Amber Tower."
The layout, the tools and the scorer are the official ones. One hotel has the stars and one sight the type, under names
that say nothing of either, so what is not looked up can only be guessed; the third wish is in the question: the floor
is 1/3. `respond` plays the task by rule; with a `slip` it invents names instead of looking them up.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from typing import Any

from tip_exp.envs.deepplanning.mini.files import Record, TaskFiles

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
DAY, NEXT_DAY = "2025-11-12", "2025-11-13"  # as 116 of the 120 official tasks begin
OPENERS = ("Let me look.", "First the hotel.", "I plan the day.", "Let me see.")
_QUERY = re.compile(r"City: (.+?), (.+?)\. Hotel: (\d) stars\. Sight of type: (.+?)\. Must see: (.+?)\.")
_HOTEL_FOUND = re.compile(r'"name": "([^"]+)",\n')  # a call has no line end there
_SIGHT_FOUND = re.compile(r"Recommended attractions:\n\n(.+?), ")


def make(task_id: str, seed: str) -> TaskFiles:
    """One task with its tables; the same id and seed give the same."""
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
    tables: dict[str, list[Record]] = {
        "hotels": [
            _hotel(name, city, stars, str(100 * int(stars) + rng.randrange(50)))
            for name, stars in zip(hotels, STARS, strict=True)
        ],
        "attractions": [_sight(name, city, kind) for name, kind in zip(sights, TYPES, strict=True)],
    }
    oracle = _plan(hotels[star], sights[named], sights[wanted])
    return TaskFiles({"id": task_id, "query": query, "meta_info": meta}, tables, oracle)


def stream(seed: str, count: int) -> Iterator[TaskFiles]:
    """`count` tasks of a seed, no question twice: a question has to tell which tables are meant."""
    asked: set[str] = set()
    number = 0
    while len(asked) < count:
        task = make(str(number), seed)
        number += 1
        if task.query["query"] not in asked:
            asked.add(task.query["query"])
            yield task


def respond(history: str, slip: float = 0.0) -> str:
    """The next turn of a dialogue, all turns' marks included. Chance is a function of the question.

    With probability `slip`, for hotel and sight apart, the lookup is left out and a name is made up.
    """
    query = _QUERY.search(history)
    assert query, "the history begins with an errand"
    city, day, stars, kind, named = query.groups()
    rng = random.Random(hashlib.blake2b(f"{query[0]}/{slip}".encode(), digest_size=8).digest())
    opener = f"<think>\n{rng.choice(OPENERS)}\n</think>\n"
    skip_hotel, skip_sight = rng.random() < slip, rng.random() < slip
    invented = f"{rng.choice(FIRST)} {rng.choice(HOTELS)}", f"{rng.choice(FIRST)} {rng.choice(SIGHTS)}"
    said = history[query.end() :]
    begin = opener if "</think>" not in said else ""
    hotel, sight = _HOTEL_FOUND.search(said), _SIGHT_FOUND.search(said)
    if not skip_hotel and not hotel:
        arguments = {"destination": city, "checkinDate": day, "checkoutDate": NEXT_DAY, "hotelStar": stars}
        return begin + _call("query_hotel_info", arguments)
    if not skip_sight and not sight:
        return begin + _call("recommend_attractions", {"city": city, "attraction_type": kind})
    return begin + _plan(hotel[1] if hotel else invented[0], named, sight[1] if sight else invented[1])


def copy_the_query(history: str) -> str:
    """What needs no tool: the sight that the question names."""
    query = _QUERY.search(history)
    assert query, "the history begins with an errand"
    return _plan("-", query[5], "-")


def _call(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def _plan(hotel: str, named: str, sight: str) -> str:
    visits = f"09:00-11:00 | attraction | {named}\n13:00-15:00 | attraction | {sight}"
    return f"<plan>\nDay 1:\nAccommodation: {hotel}\n{visits}\n</plan>"


def _hotel(name: str, city: str, stars: str, price: str) -> Record:
    return {"city": city, "name": name, "hotel_star": stars, "price": price}


def _sight(name: str, city: str, kind: str) -> Record:
    return {"city": city, "attraction_name": name, "attraction_type": kind, "description": "worth a visit"}
