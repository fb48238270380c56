"""What the tools say to the model, in English and Chinese: the official texts word for word.

Source: Qwen-Agent, benchmark/deepplanning/travelplanning/tools, Apache-2.0. str.format fills the braces of an answer.
TOOL.PARAMETER describes a parameter, also officially: a refused call prints it. The descriptions of the tools
themselves, TOOL, are written for this package.
"""

from __future__ import annotations

EN = {
    "segment": "Segment {}",
    "seats": "Remaining Seats",
    "seats_left": "Available",
    "station": " Station",
    "no_table": "Database not loaded",
    "query_train_info.no_table": "No information found",
    "trains_none": "No train information found from {origin} to {destination} on {depDate}",
    "query_flight_info.no_table": "No information found, please check input parameters",
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
    "query_train_info": "Trains between two cities on a day, with times, seats and fares.",
    "query_train_info.origin": "Origin city, supports city name",
    "query_train_info.destination": "Destination city, supports city name",
    "query_train_info.depDate": "Departure date, format: YYYY-MM-DD",
    "query_train_info.seatClassName": "Train seat class: First Class Seat, Second Class Seat,Business Seat",
    "query_flight_info": "Flights between two cities on a day, with times, seats and fares.",
    "query_flight_info.origin": "Origin city, supports city name",
    "query_flight_info.destination": "Destination city, supports city name",
    "query_flight_info.depDate": "Departure date, format: YYYY-MM-DD",
    "query_flight_info.seatClassName": "Flight seat class: Economy Class, Business Class, First Class",
    "query_hotel_info": "Hotels with price, score, star and services.",
    "query_hotel_info.destination": "Destination (country, province, city, district/county name)",
    "query_hotel_info.checkinDate": "Check-in date, format: yyyy-MM-dd",
    "query_hotel_info.checkoutDate": "Check-out date, format: yyyy-MM-dd",
    "query_hotel_info.hotelStar": "Hotel star rating: 1~5; single value",
    "query_hotel_info.hotelBrands": (
        "Hotel brand, only supports single value query. Optional brands: Ji Hotel, Atour Hotel, Marriott, "
        "Hilton, Home Inn, Jinjiang Inn, Hanting Hotel, Orange Hotel"
    ),
    "query_attraction_details": "Hours, ticket, advised duration and place of one attraction.",
    "query_attraction_details.attraction_name": "Attraction name",
    "recommend_attractions": "Attractions of a city, by type if wanted.",
    "recommend_attractions.city": "City name or keyword",
    "recommend_attractions.attraction_type": (
        "Attraction type filter (enum), options: 'Historical and Cultural', 'Natural Scenery', "
        "'Art Exhibition', 'City Landmark', 'Theme Park', 'Leisure Experience'."
    ),
    "search_location": "Latitude and longitude of a place.",
    "search_location.place_name": "The place name to query, for example: 'Lao She Teahouse'",
    "query_road_route_info": "Distance, minutes and taxi fare between two coordinates.",
    "query_road_route_info.origin": (
        "Origin coordinates (format: latitude,longitude), precision retained to 6 decimal places"
    ),
    "query_road_route_info.destination": (
        "Destination coordinates (format: latitude,longitude), precision retained to 6 decimal places"
    ),
    "recommend_restaurants": "Restaurants near coordinates.",
    "recommend_restaurants.latitude": "Latitude coordinate, precision retained to 6 decimal places",
    "recommend_restaurants.longitude": "Longitude coordinate, precision retained to 6 decimal places",
    "query_restaurant_details": "Price, hours and place of one restaurant.",
    "query_restaurant_details.restaurant_name": "Restaurant name",
}
ZH = {
    "segment": "第{}段",
    "seats": "剩余票数量",
    "seats_left": "充足",
    "station": "站",
    "no_table": "数据库未加载",
    "query_train_info.no_table": "未查询到信息",
    "trains_none": "未找到从 {origin} 到 {destination} 在 {depDate} 的火车票信息",
    "query_flight_info.no_table": "未查询到信息，请检查输入参数",
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
    "query_train_info": "查询某日两城之间的火车、时刻、余票与票价。",
    "query_train_info.origin": "出发地，支持传城市名",
    "query_train_info.destination": "目的地，支持传城市名",
    "query_train_info.depDate": "出发日期，格式: YYYY-MM-DD",
    "query_train_info.seatClassName": "火车舱位等级：一等座,二等座,商务座",
    "query_flight_info": "查询某日两城之间的航班、时刻、余票与票价。",
    "query_flight_info.origin": "出发地：支持传城市名",
    "query_flight_info.destination": "目的地：支持传城市名",
    "query_flight_info.depDate": "出发日期，格式: YYYY-MM-DD",
    "query_flight_info.seatClassName": "飞机舱位等级：经济舱,超级经济舱,公务舱,头等舱",
    "query_hotel_info": "查询酒店的价格、评分、星级与服务。",
    "query_hotel_info.destination": "目的地(国家、省、市、区县名称)",
    "query_hotel_info.checkinDate": "入住日期, 格式: yyyy-MM-dd",
    "query_hotel_info.checkoutDate": "退房日期, 格式: yyyy-MM-dd",
    "query_hotel_info.hotelStar": "酒店星级: 1~5; 单值",
    "query_hotel_info.hotelBrands": (
        "酒店品牌,只支持单值查询。可选品牌：全季, 亚朵, 万豪, 希尔顿, 如家, 锦江之星, 汉庭, 桔子"
    ),
    "query_attraction_details": "查询一个景点的开放时间、门票、建议时长与位置。",
    "query_attraction_details.attraction_name": "景点名称",
    "recommend_attractions": "推荐某城市的景点，可按类型筛选。",
    "recommend_attractions.city": "城市名称或关键词",
    "recommend_attractions.attraction_type": (
        "景点类型筛选，如：'历史文化', '自然风光', '艺术展览', '城市地标', '主题乐园', '休闲体验'"
    ),
    "search_location": "查询地点的经纬度。",
    "search_location.place_name": "要查询的地点名称，例如：'老舍茶馆'",
    "query_road_route_info": "查询两个坐标之间的距离、耗时与车费。",
    "query_road_route_info.origin": "出发地经纬度坐标（格式：纬度,经度），精度保留6位小数",
    "query_road_route_info.destination": "目的地经纬度坐标（格式：纬度,经度），精度保留6位小数",
    "recommend_restaurants": "推荐坐标附近的餐厅。",
    "recommend_restaurants.latitude": "纬度坐标,精度保留6位小数",
    "recommend_restaurants.longitude": "经度坐标,精度保留6位小数",
    "query_restaurant_details": "查询一家餐厅的价格、营业时间与位置。",
    "query_restaurant_details.restaurant_name": "餐厅名称",
}
STRINGS = {"en": EN, "zh": ZH}
