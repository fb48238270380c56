"""Generated trips of 2 to 4 days in the layout of the official tasks, with invented places.

After a constraint is drawn the tables are changed until exactly one entry satisfies it, as in the official tasks.
Names contain commas and dashes, and every fourth task has no flights, as some official tasks lack a table.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

from tests.envs.deepplanning.oracle import Stops, oracle_plan
from tests.envs.deepplanning.render import render_plan

from tip_exp.envs.deepplanning.data import Row
from tip_exp.envs.deepplanning.errands import TaskFiles

CITIES = ("Alderby", "Brookhaven", "Carrowmore", "Dunmere", "Eastwick", "Fernhollow")
TYPES = (
    *("Historical and Cultural", "Natural Scenery", "Art Exhibition", "City Landmark", "Theme Park"),
    "Leisure Experience",
)
BRANDS = ("Larkspur Inn", "Northgate Hotel", "Quillon Suites")
SERVICES = ("Swimming Pool", "Gym", "Washer and Dryer", "Robot Service")
TAGS = ("Must-Eat Top 10", "Birthday Package", "Private Room", "Outdoor Seating")
FIRST = ("Amber", "Silver", "Willow", "Granite", "Copper", "Maple", "Harbor", "Lantern", "Ivory", "Juniper")
SIGHTS = ("Museum", "Garden", "Tower", "Bridge", "Gallery", "Lake Park", "Old Street", "Observatory", "Fort", "Market")
START = date(2025, 11, 12)  # a Wednesday, as in 116 of the 120 official tasks
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

Wish = tuple[str, dict[str, Any], str]  # constraint key, its data, and its sentence in the query


@dataclass(slots=True)
class TripWorld:
    """The tables of a task under construction and the coordinates of its places."""

    rng: random.Random
    number: int  # of the task; constraint kinds cycle with it, so that few tasks cover many kinds
    origin: str
    city: str
    days: int
    people: int
    tables: dict[str, list[Row]] = field(default_factory=dict)
    places: dict[str, tuple[float, float]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    @property
    def rooms(self) -> int:
        return (self.people + 1) // 2

    @property
    def last_day(self) -> date:
        return START + timedelta(days=self.days - 1)

    def place(self, name: str, kind: str, near: str | None = None) -> dict[str, str]:
        """Puts a place at free coordinates, near another place if given; returns its two cells."""
        south, west, width = (30.0, 110.0, 0.12) if near is None else (*_shift(self.places[near], -0.008), 0.016)
        while True:
            point = (round(south + self.rng.random() * width, 6), round(west + self.rng.random() * width, 6))
            if point not in self.places.values():
                break
        self.places[name], self.kinds[name] = point, kind
        return {"latitude": f"{point[0]:.6f}", "longitude": f"{point[1]:.6f}"}

    def road(self, a: str, b: str) -> tuple[int, int, int]:
        """Meters, minutes and taxi fare; up to two kilometers are walked for free."""
        (x, y), (u, v) = self.places[a], self.places[b]
        meters = int(math.hypot((x - u) * 111_000, (y - v) * 96_000)) + 60
        if meters <= 2000:
            return meters, max(1, math.ceil(meters / 80)), 0
        return meters, max(5, math.ceil(meters / 450)), 10 + math.ceil(meters / 1000 * 2.4)


def make(number: int, seed: int | str) -> tuple[TaskFiles, str]:
    """Task `number` of a seed, which lasts 2, 3, 4, 2, … days, and a plan with full score."""
    rng = random.Random(f"mini_world/{seed}/{number}")
    origin, city = rng.sample(CITIES, 2)
    world = TripWorld(rng, number, origin, city, days=2 + number % 3, people=rng.randint(2, 4))
    _sights(world)
    _hotels(world)
    for mode in ("train", "flight"):
        _legs(world, mode)
    mode = "flight" if number % 4 == 1 else "train"
    out, back, transport = _transport_wish(world, mode)
    hotel, stay = _hotel_wish(world)
    must, visit = _sight_wish(world)
    table, meal = _restaurant_wish(world, must[0]["attraction_name"])
    _map_tables(world)
    wishes = [transport, stay, visit, meal]
    stops = Stops(mode, out, back, hotel, must, table, world.tables["attractions"], world.tables["restaurants"])
    party = {"people_number": world.people, "room_number": world.rooms}
    plan = oracle_plan(stops, world.road, world.origin, world.city, world.days, party)
    if number % 2:
        limit = math.ceil(plan["budget_summary"]["total_estimated_budget"] * 1.15 / 100) * 100
        wishes.append(("budget_constraint", {"max_budget": limit}, f"The whole trip may cost at most {limit} yuan."))
    tables = {k: rows for k, rows in world.tables.items() if k != "flights" or number % 4 != 3}
    return TaskFiles(_query(world, wishes), tables), render_plan(plan)


def _query(world: TripWorld, wishes: list[Wish]) -> dict[str, Any]:
    start, end = START.isoformat(), world.last_day.isoformat()
    words = [
        f"I plan a {world.days}-day trip from {world.origin} to {world.city}, leaving on {start}, "
        f"a {WEEKDAYS[START.weekday()]}, and coming back on {end}.",
        f"We are {world.people} people and need {world.rooms} room{'s' if world.rooms > 1 else ''}.",
        *(sentence for _, _, sentence in wishes),
    ]
    meta = {"org": world.origin, "dest": [world.city], "days": world.days, "depart_date": start, "return_date": end}
    meta |= {"depart_weekday": START.isoweekday(), "people_number": world.people, "room_number": world.rooms}
    meta["hard_constraints"] = {key: values for key, values, _ in wishes}
    return {"id": str(world.number), "query": " ".join(words), "meta_info": meta}


def _sights(world: TripWorld) -> None:
    """Two attractions a day and four more, the last closed on Tuesdays; three restaurants near each."""
    rng = world.rng
    names = rng.sample([f"{first} {sight}" for first in FIRST for sight in SIGHTS], 2 * world.days + 4)
    names[0] += ", East Wing"
    world.tables["attractions"], world.tables["restaurants"] = [], []
    for i, name in enumerate(names):
        at = world.place(name, "attraction")
        sight = {"city": world.city, "attraction_name": name, "attraction_id": f"A{world.number}{i:02d}"}
        sight |= {"description": f"{name} is a well known sight of {world.city}", "attraction_type": TYPES[i % 6]}
        sight |= {"address": f"{i + 1} {world.city} Road", **at, "rating": f"{4.0 + 0.05 * (i % 9):.2f}"}
        sight |= {"opening_time": "08:00", "closing_time": "18:00", "min_visit_hours": "1.0", "max_visit_hours": "4.0"}
        sight |= {"closing_dates": "Tuesday" if i == len(names) - 1 else ""}
        sight |= {"ticket_price": str(rng.choice((0, 0, 20, 35, 60)))}
        world.tables["attractions"].append(sight)
        for j in range(3):
            _restaurant(world, name, at, i, j)


def _restaurant(world: TripWorld, sight: str, at: dict[str, str], i: int, j: int) -> None:
    rng = world.rng
    name = f"{sight.split(',')[0]} Kitchen No.{j + 1}{' - Lakeside Branch' if j == 1 else ''}"
    row = {"restaurant_id": f"R{world.number}{i:02d}{j}", "restaurant_name": name, "city": world.city}
    row |= {**world.place(name, "restaurant", sight), "price_per_person": str(rng.randint(30, 150))}
    row |= {"cuisine": rng.choice(("Noodles", "Seafood", "Hotpot")), "opening_time": "10:00", "closing_time": "22:00"}
    row |= {"nearby_attraction_name": sight, "nearby_attraction_coords": f"{at['longitude']},{at['latitude']}"}
    row |= {"query_latitude": at["latitude"], "query_longitude": at["longitude"]}
    row |= {"rating": f"{4.0 + 0.1 * j + 0.01 * (i % 7):.2f}", "tags": ";".join(rng.sample(TAGS, 2))}
    world.tables["restaurants"].append(row)


def _hotels(world: TripWorld) -> None:
    """Two of each brand, with distinct prices and ratings."""
    rng, rows = world.rng, []
    for i in range(6):
        brand = BRANDS[i % 3]
        name = f"{brand} {world.city} {'Riverside' if i < 3 else 'Old Town'}{' - Station Branch' if i == 4 else ''}"
        row = {"city": world.city, "name": name, "address": f"{i + 10} {world.city} Avenue"}
        row |= {**world.place(name, "hotel"), "decoration_time": str(2015 + i), "hotel_star": str(3 + i % 3)}
        row |= {"price": str(200 + 40 * i + rng.randint(0, 30)), "score": f"{4.1 + 0.1 * i:.1f}", "brand": brand}
        rows.append(row | {"services": ";".join(rng.sample(SERVICES, 2))})
    world.tables["hotels"] = rows


def _legs(world: TripWorld, mode: str) -> None:
    """Direct connections: out in the morning of the first day, back in the afternoon of the last."""
    stop = "Station" if mode == "train" else "Airport"
    home, away = f"{world.origin} {stop}", f"{world.city} Central {stop}"
    world.place(away, stop.lower())
    rng, rows = world.rng, []
    for out, day in ((True, START), (False, world.last_day)):
        ends = (home, away) if out else (away, home)
        cities = (world.origin, world.city) if out else (world.city, world.origin)
        for i in range(5 if mode == "train" else 3):
            leaves = (360 + 55 * i if out else 1000 + 35 * i) + (10 if mode == "flight" else 0)
            minutes = rng.randint(70, 110) if mode == "train" else rng.randint(50, 80)
            row = {"origin_city": cities[0], "destination_city": cities[1], "dep_date": day.isoformat()}
            row |= {"dep_station_code": ends[0][:3].upper(), "dep_station_name": ends[0]}
            row |= {"arr_station_code": ends[1][:3].upper(), "arr_station_name": ends[1]}
            row |= {"dep_datetime": _moment(day, leaves), "arr_datetime": _moment(day, leaves + minutes)}
            row |= {"duration": str(minutes), "seat_status": str(rng.randint(4, 9))}
            row |= {"price": str(rng.randint(120, 260) * (1 if mode == "train" else 2))}
            row |= {"segment_index": "1", "route_index": str(i + 1)}
            leg = f"{world.number}{1 if out else 2}{i}"
            if mode == "train":
                row |= {
                    "train_no": f"G{leg}",
                    "train_type": "Electric Multiple Unit",
                    "seat_class": "Second Class Seat",
                }
            else:
                row |= {"flight_no": f"QX{leg}", "airline": "Quill Air", "seat_class": "Economy Class"}
                row |= {"equip_type": "320", "equip_size": "Medium Aircraft", "manufacturer": "Airbus"}
            rows.append(row)
    world.tables[f"{mode}s"] = rows


def _transport_wish(world: TripWorld, mode: str) -> tuple[Row, Row, Wish]:
    """The legs there and back, and a constraint on one or both."""
    rows, number = world.tables[f"{mode}s"], f"{mode}_no"
    outs, backs = ([r for r in rows if (r["origin_city"] == world.origin) is outbound] for outbound in (True, False))
    out, back = world.rng.choice(outs[:3]), world.rng.choice(backs)
    kind = ("cheapest_direct", "earliest_departure_direct", "seat_status")[world.number // 2 % 3]
    if kind == "cheapest_direct":
        out["price"] = "95"
        text = f"For the way there I want the cheapest direct {mode}."
    elif kind == "earliest_departure_direct":
        out = min(outs, key=lambda row: row["dep_datetime"])
        text = f"On the way there please take the earliest direct {mode}."
    else:
        for row in rows:
            row["seat_status"] = str(world.rng.randint(1, world.people - 1))
        out["seat_status"] = back["seat_status"] = str(world.people + 3)
        text = f"We go by {mode} in both directions, and all of us need a seat."
    values = {f"outbound_{number}": out[number]}
    if kind == "seat_status":
        values[f"inbound_{number}"] = back[number]
    return out, back, (f"{mode}_{kind}", values, text)


def _hotel_wish(world: TripWorld) -> tuple[Row, Wish]:
    rows = world.tables["hotels"]
    hotel = world.rng.choice(rows)
    kinds = ("star_service_required", "highest_rated", "cheapest_brand", "newest_decoration")
    kind = kinds[(world.number + 1) % 4]
    if kind == "star_service_required":
        service = hotel["services"].split(";")[0]
        _make_unique(hotel, [row for row in rows if row["hotel_star"] == hotel["hotel_star"]], "services", service)
        text = f"I need a {hotel['hotel_star']}-star hotel with {service.lower()}."
    elif kind == "highest_rated":
        hotel["score"], text = "4.9", "Book the best rated hotel."
    elif kind == "cheapest_brand":
        hotel["price"], text = "150", f"Book the cheapest {hotel['brand']}."
    else:
        hotel["decoration_time"], text = "2024", "Book the most recently decorated hotel."
    return hotel, (f"hotel_{kind}", {"hotel_name": hotel["name"]}, text)


def _sight_wish(world: TripWorld) -> tuple[list[Row], Wish]:
    """Two attractions to visit, never the last of the table, which has a closing day."""
    must = world.rng.sample(world.tables["attractions"][:-1], 2)
    names = [sight["attraction_name"] for sight in must]
    kind = ("must_visit_named", "top_rated_must_visit")[world.number % 2]
    if kind == "top_rated_must_visit":
        must[0]["rating"], must[1]["rating"] = "4.90", "4.80"
        text = "We must see the two top rated sights."
    else:
        text = f"We must see '{names[0]}' and '{names[1]}'."
    return must, (f"attraction_{kind}", {"attraction_names": names}, text)


def _restaurant_wish(world: TripWorld, sight: str) -> tuple[Row, Wish]:
    rows = [row for row in world.tables["restaurants"] if row["nearby_attraction_name"] == sight]
    chosen = world.rng.choice(rows)
    kind = ("specific_tag_nearby", "cheapest_nearby_attraction", "highest_rated")[world.number % 3]
    if kind == "specific_tag_nearby":
        tag = chosen["tags"].split(";")[0]
        _make_unique(chosen, rows, "tags", tag)
        text = f"One meal should be near '{sight}' at a place that offers: {tag}."
    elif kind == "cheapest_nearby_attraction":
        chosen["price_per_person"], text = "25", f"One meal should be at the cheapest restaurant near '{sight}'."
    else:
        chosen["rating"], text = "4.95", f"One meal should be at the best rated restaurant near '{sight}'."
    values = {"attraction_name": sight, "restaurant_name": chosen["restaurant_name"]}
    return chosen, (f"restaurant_{kind}", values, text)


def _make_unique(chosen: Row, rows: list[Row], column: str, value: str) -> None:
    """Removes `value` from the column of all other rows, so that only the chosen row has it."""
    for row in rows:
        if row is not chosen:
            row[column] = ";".join(part for part in row[column].split(";") if part != value)


def _map_tables(world: TripWorld) -> None:
    written = {name: f"{x:.6f},{y:.6f}" for name, (x, y) in world.places.items()}
    world.tables["locations"], world.tables["distances"] = [], []
    for a, start in written.items():
        latitude, longitude = start.split(",")
        row = {"poi_name": a, "latitude": latitude, "longitude": longitude, "poi_type": world.kinds[a]}
        world.tables["locations"].append(row)
        for b, end in written.items():
            if a != b:
                measures = zip(("distance_meters", "duration_minutes", "cost"), map(str, world.road(a, b)), strict=True)
                world.tables["distances"].append({"origin": start, "destination": end, **dict(measures)})


def _shift(point: tuple[float, float], by: float) -> tuple[float, float]:
    return point[0] + by, point[1] + by


def _moment(day: date, minutes: int) -> str:
    return f"{day.isoformat()} {minutes // 60:02d}:{minutes % 60:02d}:00"
