"""The nine tools' answers, each a function of one table, checked arguments and a style: language and corrected bugs.

They print what the official tools print, so the order of keys, the kinds of numbers and the blanks are not ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tip_exp.envs.deepplanning.data import Row

MISSING = float("nan")  # an empty cell, as pandas reads it upstream: equal to nothing, printed as nan
_READ_AS_MISSING = frozenset(  # what pandas.read_csv takes for an empty cell
    (
        *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>"),
        *("N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
    )
)

Cells = dict[str, Any]  # a row, every cell a string or MISSING
Arguments = dict[str, str]


@dataclass(frozen=True, slots=True)
class Style:
    """How to answer: one language of strings.STRINGS, and the names of the upstream bugs that are corrected."""

    say: dict[str, str]
    fixes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Roads:
    """The distance table by way; of two rows for one way the first stands."""

    ways: dict[tuple[Any, Any], Cells]
    places: frozenset[Any]

    @classmethod
    def of(cls, rows: list[Cells]) -> Roads:
        ways = {(row["origin"], row["destination"]): row for row in reversed(rows)}
        return cls(ways, frozenset(place for way in ways for place in way))


def cells(row: Row, style: Style) -> Cells:
    """A row as the tools read it, what pandas takes for empty being MISSING."""
    empty = "" if "empty_cells" in style.fixes else MISSING
    return {column: empty if cell is None or cell in _READ_AS_MISSING else cell for column, cell in row.items()}


def query_train_info(rows: list[Cells], args: Arguments, style: Style) -> str:
    routes = _routes(rows, args, style, "train")
    if not routes:
        return style.say["trains_none"].format_map(args)
    return _json(routes if "train_nesting" in style.fixes else [[route] for route in routes])


def query_flight_info(rows: list[Cells], args: Arguments, style: Style) -> str:
    if routes := _routes(rows, args, style, "flight"):
        return _json(routes)
    if "flight_not_found" in style.fixes:
        return style.say["flights_none"].format_map(args)
    raise TypeError("FlightQueryTool.<lambda>() missing 1 required positional argument: 'seat'")


def query_hotel_info(rows: list[Cells], args: Arguments, style: Style) -> str:
    if "hotel_city" in style.fixes:
        rows = [row for row in rows if str(row["city"]) in args["destination"]]
    for argument, column in (("hotelStar", "hotel_star"), ("hotelBrands", "brand")):
        if args.get(argument):
            rows = [row for row in rows if row[column] == args[argument]]
    if not rows:
        return style.say["hotels_none"].format_map(args)
    columns = {
        "name": "name",
        "address": "address",
        "latitude": "latitude",
        "longitude": "longitude",
        "decorationTime": "decoration_time",
        "hotelStar": "hotel_star",
        "price": "price",
        "score": "score",
        "brand": "brand",
    }
    hotels = []
    for row in rows:
        cells = {label: row.get(column, "") for label, column in columns.items()}
        known = {label: "" if cell is MISSING else cell for label, cell in cells.items()}
        hotels.append(known | _list_of(row, "services"))
    return _json(hotels)


def query_attraction_details(rows: list[Cells], args: Arguments, style: Style) -> str:
    row = _first(rows, "attraction_name", args["attraction_name"])
    if row is None:
        return style.say["attraction_none"].format_map(args)
    cell = {column: str(value) for column, value in row.items()}
    opening, closing = cell.get("opening_time", ""), cell.get("closing_time", "")
    return style.say["attraction"].format(
        id=cell.get("attraction_id", ""),
        name=cell["attraction_name"],
        city=cell.get("city", ""),
        address=cell.get("address", ""),
        latitude=cell.get("latitude", ""),
        longitude=cell.get("longitude", ""),
        description=cell.get("description", ""),
        rating=_known_number(row, "rating", ""),
        hours=opening if opening == closing else style.say["hours"].format(opening, closing),
        closed=cell.get("closing_dates", ""),
        shortest=_known_number(row, "min_visit_hours", ""),
        longest=_known_number(row, "max_visit_hours", ""),
        ticket=_known_number(row, "ticket_price", "0"),
        type=cell.get("attraction_type", ""),
    )


def recommend_attractions(rows: list[Cells], args: Arguments, style: Style) -> str:
    if "attraction_city" in style.fixes:
        rows = [row for row in rows if str(row["city"]) in args["city"]]
    if args.get("attraction_type"):
        rows = [row for row in rows if row["attraction_type"] == args["attraction_type"]]
    if not rows:
        return style.say["recommended_none"]
    lines = [
        style.say["recommendation"].format(
            name=row.get("attraction_name", ""),
            description=row.get("description", ""),
            type=row.get("attraction_type", ""),
        )
        for row in rows
    ]
    return "\n".join([style.say["recommended"], *lines])


def search_location(rows: list[Cells], args: Arguments, style: Style) -> str:
    row = _first(rows, "poi_name", args["place_name"])
    if row is None:
        return style.say["location_none"].format_map(args)
    found = {column: str(row.get(column, "")) for column in ("latitude", "longitude")}
    return _json({"place_name": row["poi_name"]} | found)


def query_road_route_info(roads: Roads, args: Arguments, style: Style) -> str:
    for place in (args["origin"], args["destination"]):
        if place not in roads.places:
            return style.say["road_unknown"].format(place)
    row = roads.ways.get((args["origin"], args["destination"]))
    if row is None:
        return style.say["road_none"].format_map(args)
    measures = {
        "distance_in_meters": int(row.get("distance_meters", 0)),
        "duration_in_minutes": int(row.get("duration_minutes", 0)),
        "cost": int(row.get("cost", 0)),
    }
    return _json({"origin": row["origin"], "destination": row["destination"]} | measures)


def recommend_restaurants(rows: list[Cells], args: Arguments, style: Style) -> str:
    here = (args["latitude"], args["longitude"])
    near = [r for r in rows if (str(r.get("query_latitude")), str(r.get("query_longitude"))) == here]
    if not near:
        return style.say["restaurants_none"].format_map(args)
    return _json([_restaurant(row) for row in near])


def query_restaurant_details(rows: list[Cells], args: Arguments, style: Style) -> str:
    row = _first(rows, "restaurant_name", args["restaurant_name"])
    if row is None:
        return no_such_restaurant(style.say["restaurant_none"].format_map(args), args)
    return _json({"id": row.get("restaurant_id", "")} | _restaurant(row))


def no_such_restaurant(message: str, args: Arguments) -> str:
    """The one tool that wraps its message, also where there is no table."""
    return _json({"message": message, "restaurant_name": args["restaurant_name"]})


ANSWERS: dict[str, Callable[[Any, Arguments, Style], str]] = {
    "query_train_info": query_train_info,
    "query_flight_info": query_flight_info,
    "query_hotel_info": query_hotel_info,
    "query_attraction_details": query_attraction_details,
    "recommend_attractions": recommend_attractions,
    "search_location": search_location,
    "query_road_route_info": query_road_route_info,
    "recommend_restaurants": recommend_restaurants,
    "query_restaurant_details": query_restaurant_details,
}


def _routes(rows: list[Cells], args: Arguments, style: Style, kind: str) -> list[dict[str, Any]]:
    """The routes of a day, each with its segments in order and the price of the first."""
    wanted = {"origin_city": args["origin"], "destination_city": args["destination"], "dep_date": args["depDate"]}
    if args.get("seatClassName"):
        wanted["seat_class"] = args["seatClassName"]
    routes: dict[Any, list[Cells]] = {}
    for row in rows:
        if all(row[column] == value for column, value in wanted.items()):
            routes.setdefault(row["route_index"], []).append(row)
    order = (lambda index: (float(index), index)) if "route_order" in style.fixes else None
    return [_route(sorted(routes[index], key=_segment), style, kind) for index in sorted(routes, key=order)]


def _route(segments: list[Cells], style: Style, kind: str) -> dict[str, Any]:
    route: dict[str, Any] = {}
    for place, row in enumerate(segments):
        city = row["origin_city"]
        if kind == "train" and place > 0:  # a change of trains: the city is read off the station
            city = segments[place - 1]["arr_station_name"].split(style.say["station"])[0]
        known = str(row["seat_status"]).strip().lower() not in ("", "nan")
        segment = {
            "arrCityName": row["destination_city"],
            "arrStationCode": row["arr_station_code"],
            "arrStationName": row["arr_station_name"],
            "depCityName": city,
            "depStationCode": row["dep_station_code"],
            "depStationName": row["dep_station_name"],
            "duration": int(row["duration"]),
            "arrDateTime": row["arr_datetime"],
            "depDateTime": row["dep_datetime"],
            "marketingTransportName": row["train_type" if kind == "train" else "airline"],
            "marketingTransportNo": row[f"{kind}_no"],
            "seatClassName": row["seat_class"],
            style.say["seats"]: row["seat_status"] if known else style.say["seats_left"],
        }
        if kind == "flight":
            segment |= {
                "equipSize": row["equip_size"],
                "equipType": row["equip_type"],
                "manufacturer": row["manufacturer"],
            }
        route[style.say["segment"].format(place + 1)] = segment
    price = _number(segments[0]["price"], "")
    return route | {"price": 0 if price == "" else price}


def _segment(row: Cells) -> tuple[bool, Any]:
    """Sorts segments as text, those without a number last."""
    return row["segment_index"] is MISSING, row["segment_index"]


def _restaurant(row: Cells) -> dict[str, Any]:
    return {
        "name": row.get("restaurant_name", ""),
        "latitude": str(row.get("latitude", 0)),
        "longitude": str(row.get("longitude", 0)),
        "price_per_person": str(row.get("price_per_person", 0)),
        "cuisine": row.get("cuisine", ""),
        "opening_time": row.get("opening_time", ""),
        "closing_time": row.get("closing_time", ""),
        "nearby_attraction_name": row.get("nearby_attraction_name", ""),
        "rating": str(row.get("rating", 4.5)),
    } | _list_of(row, "tags")


def _first(rows: list[Cells], column: str, name: str) -> Cells | None:
    return next((row for row in rows if row[column] == name), None)


def _list_of(row: Cells, column: str) -> dict[str, list[str]]:
    """A cell "a;b" as {column: ["a", "b"]}; nothing where it is empty."""
    cell = row.get(column)
    return {column: cell.split(";")} if isinstance(cell, str) and cell.strip() else {}


def _number(cell: Any, otherwise: str) -> float | str:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return otherwise


def _known_number(row: Cells, column: str, otherwise: str) -> float | str:
    """A cell as a float, so that 4 reads 4.0; `otherwise` where it is empty or no number."""
    cell = row.get(column, MISSING)
    return otherwise if cell is MISSING else _number(cell, otherwise)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)
