"""Names and parameters of the nine tools, their JSON schemas, and the check of a call's arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from tip_exp.envs.deepplanning.tools import answers
from tip_exp.envs.deepplanning.tools.strings import STRINGS


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool: its answer, its table of data.TABLES and its parameters, all of which are strings."""

    answer: Callable[[Any, answers.Arguments, answers.Style], str]
    table: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


_TOOLS = (
    Tool(answers.query_train_info, "trains", ("origin", "destination", "depDate"), ("seatClassName",)),
    Tool(answers.query_flight_info, "flights", ("origin", "destination", "depDate"), ("seatClassName",)),
    Tool(
        answers.query_hotel_info, "hotels", ("destination", "checkinDate", "checkoutDate"), ("hotelStar", "hotelBrands")
    ),
    Tool(answers.query_attraction_details, "attractions", ("attraction_name",)),
    Tool(answers.recommend_attractions, "attractions", ("city",), ("attraction_type",)),
    Tool(answers.search_location, "locations", ("place_name",)),
    Tool(answers.query_road_route_info, "distances", ("origin", "destination")),
    Tool(answers.recommend_restaurants, "restaurants", ("latitude", "longitude")),
    Tool(answers.query_restaurant_details, "restaurants", ("restaurant_name",)),
)
TOOLS = {tool.answer.__name__: tool for tool in _TOOLS}


def parameters(tool: str, lang: str) -> dict[str, Any]:
    """JSON schema of a tool's parameters, keys in the official order."""
    spec, texts = TOOLS[tool], STRINGS[lang]
    names = (*spec.required, *spec.optional)
    return {
        "type": "object",
        "properties": {name: {"type": "string", "description": texts[f"{tool}.{name}"]} for name in names},
        "required": list(spec.required),
    }


def tool_schemas(lang: str) -> list[dict[str, Any]]:
    """The tools in OpenAI's format, for a chat template."""
    functions = [
        {"name": name, "description": STRINGS[lang][name], "parameters": parameters(name, lang)} for name in TOOLS
    ]
    return [{"type": "function", "function": function} for function in functions]


def check_arguments(tool: str, lang: str, arguments: Any) -> dict[str, str]:
    """The arguments, if they are an object with all required parameters and only text in known ones.

    Raises ValueError with jsonschema's message, which the official tools print to the model.
    """
    error = best_match(_validator(tool, lang).iter_errors(arguments))
    if error is not None:
        raise ValueError(str(error))
    return arguments


@cache
def _validator(tool: str, lang: str) -> Draft202012Validator:
    return Draft202012Validator(parameters(tool, lang))
