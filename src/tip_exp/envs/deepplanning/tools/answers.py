"""The answers of the nine tools, each a function of one table, checked arguments and a style.

The text is that of the official tools byte for byte, including the order of keys, the types of numbers and blanks.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from tip_exp.envs.deepplanning.data import Row

MISSING = float("nan")  # an empty cell as pandas reads it upstream: unequal to everything, printed as nan
_NA_WORDS = "#N/A #NA -1.#IND -1.#QNAN -NaN -nan 1.#IND 1.#QNAN <NA> N/A NA NULL NaN None n/a nan null"
_READ_AS_MISSING = frozenset(("", "#N/A N/A", *_NA_WORDS.split()))  # texts that pandas.read_csv takes for empty cells

Cells = dict[str, Any]  # a row; every cell is a string or MISSING
Arguments = dict[str, str]


@dataclass(frozen=True, slots=True)
class Style:
    """How to answer: the texts of one language and the names of the upstream bugs to correct."""

    text: dict[str, str]
    corrected: frozenset[str]


@dataclass(frozen=True, slots=True)
class Roads:
    """The distance table by (origin, destination); the first of several rows counts."""

    routes: dict[tuple[Any, Any], Cells]
    places: frozenset[Any]

    @classmethod
    def of(cls, rows: list[Cells]) -> Roads:
        routes = {(row["origin"], row["destination"]): row for row in reversed(rows)}
        return cls(routes, frozenset(place for route in routes for place in route))


def cells(row: Row, style: Style) -> Cells:
    """A row as the tools read it: texts that pandas takes for empty become MISSING."""
    empty = "" if "empty_cells" in style.corrected else MISSING
    return {column: empty if cell in _READ_AS_MISSING else cell for column, cell in row.items()}


def query_train_info(rows: list[Cells], args: Arguments, style: Style) -> str:
    routes = _routes(rows, args, style, "train")
    if not routes:
        return style.text["trains_none"].format_map(args)
    return _json(routes if "train_nesting" in style.corrected else [[route] for route in routes])


def query_flight_info(rows: list[Cells], args: Arguments, style: Style) -> str:
    if routes := _routes(rows, args, style, "flight"):
        return _json(routes)
    if "flight_not_found" in style.corrected:
        return style.text["flights_none"].format_map(args)
    raise TypeError("FlightQueryTool.<lambda>() missing 1 required positional argument: 'seat'")


def query_hotel_info(rows: list[Cells], args: Arguments, style: Style) -> str:
    if "hotel_city" in style.corrected:
        rows = [row for row in rows if str(row["city"]) in args["destination"]]
    for argument, column in (("hotelStar", "hotel_star"), ("hotelBrands", "brand")):
        if args.get(argument):
            rows = [row for row in rows if row[column] == args[argument]]
    if not rows:
        return style.text["hotels_none"].format_map(args)
    renamed = {"decoration_time": "decorationTime", "hotel_star": "hotelStar"}
    columns = ["name", "address", "latitude", "longitude", "decoration_time", "hotel_star", "price", "score", "brand"]
    hotels = []
    for row in rows:
        hotel = {renamed.get(column, column): row.get(column, "") for column in columns}
        hotel = {label: "" if cell is MISSING else cell for label, cell in hotel.items()}
        hotels.append(hotel | _list_of(row, "services"))
    return _json(hotels)


def query_attraction_details(rows: list[Cells], args: Arguments, style: Style) -> str:
    row = _first(rows, "attraction_name", args["attraction_name"])
    if row is None:
        return style.text["attraction_none"].format_map(args)
    texts: dict[str, Any] = defaultdict(str, {column: str(cell) for column, cell in row.items()})
    opening, closing = texts["opening_time"], texts["closing_time"]
    texts["hours"] = opening if opening == closing else style.text["hours"].format(opening, closing)
    for column, default in {"rating": "", "min_visit_hours": "", "max_visit_hours": "", "ticket_price": "0"}.items():
        cell = row.get(column, MISSING)
        texts[column] = default if cell is MISSING else _float(cell, default)  # a float: 4 prints as 4.0
    return style.text["attraction"].format_map(texts)


def recommend_attractions(rows: list[Cells], args: Arguments, style: Style) -> str:
    if "attraction_city" in style.corrected:
        rows = [row for row in rows if str(row["city"]) in args["city"]]
    if args.get("attraction_type"):
        rows = [row for row in rows if row["attraction_type"] == args["attraction_type"]]
    if not rows:
        return style.text["recommended_none"]
    lines = [style.text["recommendation"].format_map({"description": ""} | row) for row in rows]
    return "\n".join([style.text["recommended"], *lines])


def search_location(rows: list[Cells], args: Arguments, style: Style) -> str:
    row = _first(rows, "poi_name", args["place_name"])
    if row is None:
        return style.text["location_none"].format_map(args)
    return _json({"place_name": row["poi_name"], "latitude": str(row["latitude"]), "longitude": str(row["longitude"])})


def query_road_route_info(roads: Roads, args: Arguments, style: Style) -> str:
    for place in (args["origin"], args["destination"]):
        if place not in roads.places:
            return style.text["road_unknown"].format(place)
    row = roads.routes.get((args["origin"], args["destination"]))
    if row is None:
        return style.text["road_none"].format_map(args)
    measures = {
        "distance_in_meters": int(row.get("distance_meters", 0)),
        "duration_in_minutes": int(row.get("duration_minutes", 0)),
        "cost": int(row.get("cost", 0)),
    }
    return _json({"origin": row["origin"], "destination": row["destination"]} | measures)


def recommend_restaurants(rows: list[Cells], args: Arguments, style: Style) -> str:
    point = (args["latitude"], args["longitude"])
    near = [row for row in rows if (str(row.get("query_latitude")), str(row.get("query_longitude"))) == point]
    if not near:
        return style.text["restaurants_none"].format_map(args)
    return _json([_restaurant(row) for row in near])


def query_restaurant_details(rows: list[Cells], args: Arguments, style: Style) -> str:
    row = _first(rows, "restaurant_name", args["restaurant_name"])
    if row is None:
        return no_such_restaurant(style.text["restaurant_none"].format_map(args), args)
    return _json({"id": row.get("restaurant_id", "")} | _restaurant(row))


def no_such_restaurant(message: str, args: Arguments) -> str:
    """The one tool that wraps its message in JSON, also when the table is missing."""
    return _json({"message": message, "restaurant_name": args["restaurant_name"]})


def _routes(rows: list[Cells], args: Arguments, style: Style, kind: str) -> list[dict[str, Any]]:
    """The routes of a day, each with its segments in order and the price of the first segment."""
    criteria = {"origin_city": args["origin"], "destination_city": args["destination"], "dep_date": args["depDate"]}
    if args.get("seatClassName"):
        criteria["seat_class"] = args["seatClassName"]
    routes: dict[Any, list[Cells]] = {}
    for row in rows:
        if all(row[column] == value for column, value in criteria.items()):
            routes.setdefault(row["route_index"], []).append(row)
    order = (lambda index: (float(index), index)) if "route_order" in style.corrected else None
    return [_route(sorted(routes[index], key=_segment_order), style, kind) for index in sorted(routes, key=order)]


def _route(segments: list[Cells], style: Style, kind: str) -> dict[str, Any]:
    route: dict[str, Any] = {}
    for index, row in enumerate(segments):
        city = row["origin_city"]
        if kind == "train" and index > 0:  # a change of trains: the city is the start of the station's name
            city = segments[index - 1]["arr_station_name"].split(style.text["station"])[0]
        has_seats = str(row["seat_status"]).strip().lower() not in ("", "nan")
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
            style.text["seats"]: row["seat_status"] if has_seats else style.text["seats_left"],
        }
        if kind == "flight":
            columns = {"equipSize": "equip_size", "equipType": "equip_type", "manufacturer": "manufacturer"}
            segment |= {label: row[column] for label, column in columns.items()}
        route[style.text["segment"].format(index + 1)] = segment
    return route | {"price": _float(segments[0]["price"], 0)}


def _segment_order(row: Cells) -> tuple[bool, Any]:
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
    """A cell "a;b" as {column: ["a", "b"]}; {} if it is empty."""
    cell = row.get(column)
    return {column: cell.split(";")} if isinstance(cell, str) and cell.strip() else {}


def _float(cell: Any, default: Any) -> Any:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return default


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)
