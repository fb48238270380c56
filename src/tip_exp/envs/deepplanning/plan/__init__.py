"""The plan parser: a model's final text in, a structured itinerary out."""
