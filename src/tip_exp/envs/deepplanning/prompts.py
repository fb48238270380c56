"""System prompts of the travel tasks: a compact one, and the official one read from a checkout of Qwen-Agent."""

from __future__ import annotations

import ast
from pathlib import Path

from tip_exp.utils.errors import DataError

_EN = """\
You plan trips. First look everything up with the tools; never ask the user, never invent a name, a number or a price.
Then write the whole plan once, between <plan> and </plan>, with names exactly as the tools give them:
Day 1:
Current City: from A to B            (or just A on days without a change)
Accommodation: HOTEL, ¥P/room/night  (or - on the last day)
HH:MM-HH:MM | travel_intercity_public | train NUMBER, FROM STATION - TO STATION, ¥P/person    (or flight NUMBER)
HH:MM-HH:MM | travel_city | FROM - TO, 3.2km, 12min, ¥P
HH:MM-HH:MM | attraction | NAME, ¥P/person
HH:MM-HH:MM | meal | Lunch, RESTAURANT, ¥P/person
HH:MM-HH:MM | hotel | Check-in, HOTEL
HH:MM-HH:MM | buffer | what for
After the last day:
**Budget Summary**:
**Total Estimated Budget: N RMB**
Full days have two meals and two sights; each day but the last ends at the hotel; nothing is visited or eaten at twice;
keep opening hours, closing days, advised durations and travel times."""
_ZH = """\
你负责规划旅行。先用工具查询所有信息；不要向用户提问，不要编造名称、班次或价格。
然后把完整计划一次写在 <plan> 与 </plan> 之间，名称与工具结果完全一致：
第1天：
当前城市：from A to B（不换城市时只写A）
住宿：酒店，￥P/间/晚（最后一天写 -）
HH:MM-HH:MM | travel_intercity_public | 火车 车次，出发站 - 到达站，￥P/人（或 飞机 航班号）
HH:MM-HH:MM | travel_city | 起点 - 终点，3.2km，12min，￥P
HH:MM-HH:MM | attraction | 名称，￥P/人
HH:MM-HH:MM | meal | 午餐，餐厅，￥P/人
HH:MM-HH:MM | hotel | 办理入住，酒店
HH:MM-HH:MM | buffer | 说明
最后一天之后：
**预算总结**：
**总估算预算：N 元**
整天安排两餐与两个景点；除最后一天外每天以酒店结束；景点与餐厅不重复；遵守营业时间、闭馆日、建议时长与路途时间。"""
# Language -> the official plan format in about a tenth of the official prompt's tokens.
COMPACT_PROMPTS = {"en": _EN, "zh": _ZH}
_OFFICIAL = ("benchmark/deepplanning/travelplanning/agent/prompts.py", "travelplanning/agent/prompts.py")


def official_prompt(checkout: Path, lang: str) -> str:
    """SYSTEM_PROMPT_EN or _ZH of the checkout's prompts.py, read without executing the file."""
    path = next((checkout / name for name in _OFFICIAL if (checkout / name).is_file()), None)
    if path is None:
        raise DataError(f"no official prompts in {checkout}: neither {' nor '.join(_OFFICIAL)}")
    name = f"SYSTEM_PROMPT_{lang.upper()}"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=ast.Constant(value=str(prompt))) if target == name:
                return prompt
    raise DataError(f"{path}: no string constant {name}")
