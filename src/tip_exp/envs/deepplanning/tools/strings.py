"""What the tools say to the model, in English and Chinese: the official texts word for word.

Source: Qwen-Agent, benchmark/deepplanning/travelplanning/tools, Apache-2.0. str.format fills the braces.
"""

from __future__ import annotations

EN = {
    "segment": "Segment {}",
    "seats": "Remaining Seats",
    "seats_left": "Available",
    "station": " Station",
    "no_table": "Database not loaded",
    "trains_no_table": "No information found",
    "trains_none": "No train information found from {origin} to {destination} on {depDate}",
    "flights_no_table": "No information found, please check input parameters",
    "flights_none": "No flight information found from {origin} to {destination} on {depDate}",
    "hotels_none": (
        "No hotel information found in {destination} from {checkinDate} to {checkoutDate}, "
        "please check parameters or reduce constraints"
    ),
    "attraction_none": "Detailed information not found for attraction {attraction_name}",
    "attraction": (
        "Attraction ID：{attraction_id}\nAttraction Name：{attraction_name}\nCity：{city}\nAddress：{address}\n"
        "Coordinates：Latitude {latitude}，Longitude {longitude}\nDescription：{description}\n"
        "Rating：{rating}(average visitor rating)\nOpening Hours：{hours}\nClosed Dates：{closing_dates}\n"
        "Minimum Visit Duration：{min_visit_hours} hours\nMaximum Visit Duration：{max_visit_hours} hours\n"
        "Ticket Price：{ticket_price} RMB\nAttraction Type：{attraction_type}"
    ),
    "hours": "{} to {}",
    "recommended_none": "No attraction recommendations found",
    "recommended": "Recommended attractions:\n",
    "recommendation": "{attraction_name}, {description}. This is a {attraction_type} type attraction",
    "location_none": (
        "Coordinate information not found for location {place_name}, please check: 1. Whether the place name comes "
        "from other tool results; 2. Whether the place name is exactly consistent with tool results, no abbreviation, "
        "renaming or additional description allowed"
    ),
    "road_none": "No transportation information found from {origin} to {destination}",
    "road_unknown": (
        "Coordinate {} is not in query range, please check:\n1. Whether coordinate comes from valid tool query result, "
        "not manual input or fabrication;\n2. Whether coordinate precision is exactly consistent with query result, "
        "6 decimal places"
    ),
    "restaurants_none": (
        "No recommended restaurants found near coordinates ({latitude}, {longitude}), please check coordinate source"
    ),
    "restaurant_none": "Detailed information not found for restaurant {restaurant_name}",
    "bad_json": "the arguments are not valid JSON",
}
ZH = {
    "segment": "第{}段",
    "seats": "剩余票数量",
    "seats_left": "充足",
    "station": "站",
    "no_table": "数据库未加载",
    "trains_no_table": "未查询到信息",
    "trains_none": "未找到从 {origin} 到 {destination} 在 {depDate} 的火车票信息",
    "flights_no_table": "未查询到信息，请检查输入参数",
    "flights_none": "未找到从 {origin} 到 {destination} 在 {depDate} 的航班信息",
    "hotels_none": (
        "未找到满足条件的 {destination} 在 {checkinDate} 到 {checkoutDate} 的酒店信息,请检查参数信息或减少约束条件"
    ),
    "attraction_none": "未找到景点 {attraction_name} 的详细信息",
    "attraction": (
        "景点ID：{attraction_id}\n景点名称：{attraction_name}\n所属城市：{city}\n地址：{address}\n"
        "经纬度坐标：纬度 {latitude}，经度 {longitude}\n景点简介：{description}\n"
        "用户评分：{rating}（游客平均评价）\n开放时间：{hours}\n闭馆日期：{closing_dates}\n"
        "建议最短游玩时长：{min_visit_hours} 小时\n建议最长游玩时长：{max_visit_hours} 小时\n"
        "门票价格：{ticket_price} 元\n景点类型：{attraction_type}"
    ),
    "hours": "{} 至 {}",
    "recommended_none": "未找到景点推荐",
    "recommended": "推荐的景点有：\n",
    "recommendation": "{attraction_name}，{description}这是一个{attraction_type}类型的景点",
    "location_none": (
        "未找到地点 {place_name} 的坐标信息, 请检查：1. 地点名称是否来自其他工具的返回结果; "
        "2. 地点名称是否与工具返回结果保持完全一致，不得缩写、改名或添加额外描述"
    ),
    "road_none": "未找到从 {origin} 到 {destination} 的交通信息",
    "road_unknown": (
        "坐标 {} 不在查询范围内，请检查：\n1. 坐标是否源自有效的工具查询结果，而非手动输入或编造；\n"
        "2. 坐标数值精度是否与查询结果保持完全一致,6位小数"
    ),
    "restaurants_none": "未找到坐标 ({latitude}, {longitude}) 附近的推荐餐厅, 请检查坐标来源",
    "restaurant_none": "未找到餐厅 {restaurant_name} 的详细信息",
    "bad_json": "参数不是有效的 JSON",
}
STRINGS = {"en": EN, "zh": ZH}
