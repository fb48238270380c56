"""The nine travel tools over one task's tables: what the model calls, and word for word what it reads back.

    sandbox = TravelSandbox(folder, "en")
    sandbox.call("search_location", {"place_name": "Laomendong"})
    -> '{\\n  "place_name": "Laomendong",\\n  "latitude": "32.014540",\\n  "longitude": "118.787654"\\n}'
Upstream's bugs are kept where they change what the model reads; UPSTREAM_BUGS names them and corrects them on request.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tip_exp.envs.deepplanning.data import LANGS, read_table
from tip_exp.envs.deepplanning.tools.answers import ANSWERS, Roads, Style, cells, no_such_restaurant
from tip_exp.envs.deepplanning.tools.schemas import TOOLS, check_arguments
from tip_exp.envs.deepplanning.tools.strings import STRINGS
from tip_exp.utils.errors import DataError

UPSTREAM_BUGS = {
    "flight_not_found": (
        "a flight search without a hit ends in a Python error about a missing argument; the fix says that there is none"
    ),
    "hotel_city": (
        "hotels of any city are shown whatever the destination, as are all dates, for which there is no column; "
        "the fix keeps the hotels of a city named in the destination"
    ),
    "attraction_city": "attractions of any city are recommended; the fix keeps those of a city named in the call",
    "route_order": "routes are sorted as text, 1, 10, 2; the fix sorts them as numbers",
    "train_nesting": "each train route comes in a list of its own, unlike flights; the fix leaves that list out",
    "empty_cells": "empty cells read nan, in JSON the bare word NaN; the fix leaves them empty",
    "bad_json": "arguments that are no JSON count as {}, so the model reads of missing names; the fix tells",
    "schema_dump": "a refused call prints the whole schema; the fix prints the first line",
    "restaurant_alias": (
        "the system prompt tells the model to call recommend_around_restaurants, which does not exist; "
        "the fix lets it call recommend_restaurants"
    ),
}
ALIASES = {"recommend_around_restaurants": "recommend_restaurants"}
_FAULTS = (AttributeError, KeyError, TypeError, ValueError, RecursionError)
_NO_TABLE = {"query_train_info": "trains_no_table", "query_flight_info": "flights_no_table"}


class TravelSandbox:
    """One task's tables, each read once when a tool first needs it, and the tools over them.

    Reads only the seven files of `folder`, writes nothing, and keeps nothing of one call for the next. `fixes` are
    names from UPSTREAM_BUGS to correct; without any the model reads what it reads officially.
    """

    def __init__(self, folder: Path, lang: str, fixes: Collection[str] = ()) -> None:
        if lang not in LANGS:
            raise DataError(f"the tools speak {' and '.join(LANGS)}; got {lang!r}")
        if unknown := sorted(set(fixes) - UPSTREAM_BUGS.keys()):
            raise DataError(f"no upstream bug is called {unknown[0]!r}; there are {', '.join(UPSTREAM_BUGS)}")
        self.folder = folder
        self.lang = lang
        self._style = Style(STRINGS[lang], frozenset(fixes))
        self._tables: dict[str, Any] = {}

    def call(self, name: Any, arguments: Any) -> str:
        """Answer one call; `arguments` is an object or its JSON text. Whatever the model sent, there is an answer.

        Raises DataError only if a table cannot be read at all.
        """
        if "restaurant_alias" in self._style.fixes and isinstance(name, str):
            name = ALIASES.get(name, name)
        if not isinstance(name, str) or name not in TOOLS:
            return _valid(_error(f"tool '{name}' not found"))
        table = self._table(TOOLS[name].table)
        try:
            checked = check_arguments(name, self.lang, self._parse(arguments))
            if table is not None:
                return _valid(ANSWERS[name](table, checked, self._style))
            message = self._style.say[_NO_TABLE.get(name, "no_table")]
            return _valid(no_such_restaurant(message, checked) if name == "query_restaurant_details" else message)
        except _FAULTS as fault:  # upstream shows the model any exception, so a faulty row reads as one here, too
            text = str(fault)
            return _valid(_error(text.split("\n")[0] if "schema_dump" in self._style.fixes else text))

    def _parse(self, arguments: Any) -> Any:
        """An object from JSON text. Text within text is unpacked once more, as upstream."""
        if arguments is None or arguments == "":
            return {}
        if not isinstance(arguments, str):
            return arguments
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            if "bad_json" in self._style.fixes:
                raise ValueError(self._style.say["bad_json"]) from None
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
        """Rows, or Roads for the distances, read on first use; None where the file is missing."""
        if name not in self._tables:
            rows = read_table(self.folder, name)
            read = None if rows is None else [cells(row, self._style) for row in rows]
            self._tables[name] = Roads.of(read) if read is not None and name == "distances" else read
        return self._tables[name]


def _error(message: str) -> str:
    return json.dumps({"error": message}, ensure_ascii=False)


def _valid(answer: str) -> str:
    """Half a surrogate pair, which JSON arguments can smuggle in, becomes "?": no tokenizer or file would take it."""
    return answer.encode("utf-8", "replace").decode("utf-8")
