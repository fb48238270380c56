"""The nine travel tools over one task's tables; the answers are the official tools' word for word.

    sandbox = TravelSandbox(folder, "en")
    sandbox.call("search_location", {"place_name": "Laomendong"})
    -> '{\\n  "place_name": "Laomendong",\\n  "latitude": "32.014540",\\n  "longitude": "118.787654"\\n}'
Bugs of the official tools that change what the model reads are kept; UPSTREAM_BUGS lists those that can be corrected.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tip_exp.envs.base import error_observation
from tip_exp.envs.deepplanning.data import read_table
from tip_exp.envs.deepplanning.tools.answers import Roads, Style, cells, no_such_restaurant
from tip_exp.envs.deepplanning.tools.schemas import TOOLS, check_arguments
from tip_exp.envs.deepplanning.tools.strings import STRINGS
from tip_exp.utils.errors import DataError

UPSTREAM_BUGS = {  # name -> what happens upstream; what the correction does
    "flight_not_found": "a flight search without a hit prints a Python error; corrected: says that there is no flight",
    "hotel_city": (
        "hotels of every city are listed whatever the destination and the dates, which have no column; "
        "corrected: only hotels of a city named in the destination"
    ),
    "attraction_city": "attractions of every city are recommended; corrected: only those of a city named in the call",
    "route_order": "routes are sorted as text, 1, 10, 2; corrected: as numbers",
    "train_nesting": "each train route is wrapped in a list, unlike flights; corrected: no extra list",
    "empty_cells": "empty cells print as nan, in JSON as the bare word NaN; corrected: as empty text",
    "bad_json": "arguments that are not JSON count as {}, so a missing name is reported; corrected: reports bad JSON",
    "schema_dump": "a refused call prints the whole schema; corrected: only the first line",
    "restaurant_alias": (
        "the system prompt names recommend_around_restaurants, which does not exist; "
        "corrected: it calls recommend_restaurants"
    ),
}
ALIASES = {"recommend_around_restaurants": "recommend_restaurants"}
_ERRORS = (AttributeError, KeyError, TypeError, ValueError, RecursionError)


class TravelSandbox:
    """The tools over the tables of one task; each table is read when a tool first needs it.

    Reads only the seven files of `folder`, writes nothing, and keeps no state between calls. `corrected` are names of
    UPSTREAM_BUGS; with none the model reads exactly what the official tools print.
    """

    def __init__(self, folder: Path, lang: str, corrected: Collection[str] = ()) -> None:
        if unknown := sorted(set(corrected) - UPSTREAM_BUGS.keys()):
            raise DataError(f"unknown upstream bug {unknown[0]!r}; choose from {', '.join(UPSTREAM_BUGS)}")
        self._folder = folder
        self._lang = lang
        self._style = Style(STRINGS[lang], frozenset(corrected))
        self._tables: dict[str, Any] = {}

    def call(self, name: Any, arguments: Any) -> str:
        """Answers one call; `arguments` is an object or its JSON text. Any input gets an answer.

        Raises DataError only if a table cannot be read at all.
        """
        answer = self._answer(name, arguments)
        return answer.encode("utf-8", "replace").decode("utf-8")  # JSON escapes can make lone surrogates

    def _answer(self, name: Any, arguments: Any) -> str:
        if "restaurant_alias" in self._style.corrected and isinstance(name, str):
            name = ALIASES.get(name, name)
        if not isinstance(name, str) or name not in TOOLS:
            return error_observation(f"tool '{name}' not found")
        tool = TOOLS[name]
        table = self._table(tool.table)
        try:
            checked = check_arguments(name, self._lang, self._parse(arguments))
            return self._no_table(name, checked) if table is None else tool.answer(table, checked, self._style)
        except _ERRORS as error:  # upstream prints any exception to the model, so a faulty row reads as an error
            message = str(error)
            return error_observation(message.split("\n")[0] if "schema_dump" in self._style.corrected else message)

    def _no_table(self, name: str, arguments: dict[str, str]) -> str:
        text = self._style.text
        message = text.get(f"{name}.no_table", text["no_table"])
        return no_such_restaurant(message, arguments) if name == "query_restaurant_details" else message

    def _parse(self, arguments: Any) -> Any:
        """The arguments from JSON text; text inside the text is parsed once more, as upstream."""
        if arguments is None or arguments == "":
            return {}
        if not isinstance(arguments, str):
            return arguments
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            if "bad_json" in self._style.corrected:
                raise ValueError(self._style.text["bad_json"]) from None
            return {}
        if not isinstance(value, str):
            return value
        inner = value.strip("\n")
        if inner.startswith("```") and inner.endswith("\n```"):
            inner = "\n".join(inner.split("\n")[1:-1])
        try:
            return json.loads(inner)
        except ValueError:
            raise ValueError("Parameters must be formatted as a valid JSON!") from None

    def _table(self, name: str) -> Any:
        """Rows (Roads for the distances), read on first use; None if the file is missing."""
        if name not in self._tables:
            rows = read_table(self._folder, name)
            table = None if rows is None else [cells(row, self._style) for row in rows]
            self._tables[name] = Roads.of(table) if table is not None and name == "distances" else table
        return self._tables[name]
