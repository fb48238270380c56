"""Names and parameters of the nine tools, their JSON schemas, and the check of a call's arguments.

Parameter texts are the official ones (Qwen-Agent, benchmark/deepplanning/travelplanning/tools, Apache-2.0): a refused
call prints them, so the model reads them. The descriptions of the tools are written for this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from tip_exp.envs.deepplanning.data import LANGS

Texts = tuple[str, str]  # English, Chinese


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool: its table, its purpose and its parameters, all of which are strings."""

    table: str  # of data.TABLES
    purpose: Texts
    required: dict[str, Texts]
    optional: dict[str, Texts]


_DATE = ("Departure date, format: YYYY-MM-DD", "出发日期，格式: YYYY-MM-DD")
TOOLS = {
    "query_train_info": Tool(
        "trains",
        (
            "Trains between two cities on a day, with times, seats and fares.",
            "查询某日两城之间的火车、时刻、余票与票价。",
        ),
        {
            "origin": ("Origin city, supports city name", "出发地，支持传城市名"),
            "destination": ("Destination city, supports city name", "目的地，支持传城市名"),
            "depDate": _DATE,
        },
        {
            "seatClassName": (
                "Train seat class: First Class Seat, Second Class Seat,Business Seat",
                "火车舱位等级：一等座,二等座,商务座",
            )
        },
    ),
    "query_flight_info": Tool(
        "flights",
        (
            "Flights between two cities on a day, with times, seats and fares.",
            "查询某日两城之间的航班、时刻、余票与票价。",
        ),
        {
            "origin": ("Origin city, supports city name", "出发地：支持传城市名"),
            "destination": ("Destination city, supports city name", "目的地：支持传城市名"),
            "depDate": _DATE,
        },
        {
            "seatClassName": (
                "Flight seat class: Economy Class, Business Class, First Class",
                "飞机舱位等级：经济舱,超级经济舱,公务舱,头等舱",
            )
        },
    ),
    "query_hotel_info": Tool(
        "hotels",
        ("Hotels with price, score, star and services.", "查询酒店的价格、评分、星级与服务。"),
        {
            "destination": (
                "Destination (country, province, city, district/county name)",
                "目的地(国家、省、市、区县名称)",
            ),
            "checkinDate": ("Check-in date, format: yyyy-MM-dd", "入住日期, 格式: yyyy-MM-dd"),
            "checkoutDate": ("Check-out date, format: yyyy-MM-dd", "退房日期, 格式: yyyy-MM-dd"),
        },
        {
            "hotelStar": ("Hotel star rating: 1~5; single value", "酒店星级: 1~5; 单值"),
            "hotelBrands": (
                "Hotel brand, only supports single value query. Optional brands: Ji Hotel, Atour Hotel, Marriott, "
                "Hilton, Home Inn, Jinjiang Inn, Hanting Hotel, Orange Hotel",
                "酒店品牌,只支持单值查询。可选品牌：全季, 亚朵, 万豪, 希尔顿, 如家, 锦江之星, 汉庭, 桔子",
            ),
        },
    ),
    "query_attraction_details": Tool(
        "attractions",
        (
            "Hours, ticket, advised duration and place of one attraction.",
            "查询一个景点的开放时间、门票、建议时长与位置。",
        ),
        {"attraction_name": ("Attraction name", "景点名称")},
        {},
    ),
    "recommend_attractions": Tool(
        "attractions",
        ("Attractions of a city, by type if wanted.", "推荐某城市的景点，可按类型筛选。"),
        {"city": ("City name or keyword", "城市名称或关键词")},
        {
            "attraction_type": (
                "Attraction type filter (enum), options: 'Historical and Cultural', 'Natural Scenery', "
                "'Art Exhibition', 'City Landmark', 'Theme Park', 'Leisure Experience'.",
                "景点类型筛选，如：'历史文化', '自然风光', '艺术展览', '城市地标', '主题乐园', '休闲体验'",
            )
        },
    ),
    "search_location": Tool(
        "locations",
        ("Latitude and longitude of a place.", "查询地点的经纬度。"),
        {
            "place_name": (
                "The place name to query, for example: 'Lao She Teahouse'",
                "要查询的地点名称，例如：'老舍茶馆'",
            )
        },
        {},
    ),
    "query_road_route_info": Tool(
        "distances",
        ("Distance, minutes and taxi fare between two coordinates.", "查询两个坐标之间的距离、耗时与车费。"),
        {
            "origin": (
                "Origin coordinates (format: latitude,longitude), precision retained to 6 decimal places",
                "出发地经纬度坐标（格式：纬度,经度），精度保留6位小数",
            ),
            "destination": (
                "Destination coordinates (format: latitude,longitude), precision retained to 6 decimal places",
                "目的地经纬度坐标（格式：纬度,经度），精度保留6位小数",
            ),
        },
        {},
    ),
    "recommend_restaurants": Tool(
        "restaurants",
        ("Restaurants near coordinates.", "推荐坐标附近的餐厅。"),
        {
            "latitude": ("Latitude coordinate, precision retained to 6 decimal places", "纬度坐标,精度保留6位小数"),
            "longitude": ("Longitude coordinate, precision retained to 6 decimal places", "经度坐标,精度保留6位小数"),
        },
        {},
    ),
    "query_restaurant_details": Tool(
        "restaurants",
        ("Price, hours and place of one restaurant.", "查询一家餐厅的价格、营业时间与位置。"),
        {"restaurant_name": ("Restaurant name", "餐厅名称")},
        {},
    ),
}


def parameters(tool: str, lang: str) -> dict[str, Any]:
    """JSON schema of a tool's parameters, keys in the official order."""
    spec, index = TOOLS[tool], LANGS.index(lang)
    texts = {name: texts[index] for name, texts in (spec.required | spec.optional).items()}
    return {
        "type": "object",
        "properties": {name: {"type": "string", "description": text} for name, text in texts.items()},
        "required": list(spec.required),
    }


def tool_schemas(lang: str) -> list[dict[str, Any]]:
    """The tools in OpenAI's format, for a chat template."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": tool.purpose[LANGS.index(lang)],
                "parameters": parameters(name, lang),
            },
        }
        for name, tool in TOOLS.items()
    ]


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
