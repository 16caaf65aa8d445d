"""The task that every client is given: a tool, a question, and the schema of a short answer.

A model of 135M parameters writes nonsense, so all values are bounded: what a grammar binds ends.
"""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

CITIES = ("Paris", "Rome", "Oslo")
QUESTION = "What is the weather in Paris?"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": list(CITIES)},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
DESCRIPTION = "Tells the weather of a city."
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": DESCRIPTION, "parameters": PARAMETERS},
}


class Report(BaseModel):
    """The weather of a city."""

    model_config = ConfigDict(extra="forbid")  # else a small model adds fields without an end
    city: Literal["Paris", "Rome", "Oslo"]
    degrees: int = Field(ge=-9, le=40)
    sunny: bool


def check_arguments(arguments: str | dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call; AssertionError if the schema of the tool refuses them."""
    values = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert values.keys() == {"city", "days"}
    assert values["city"] in CITIES
    assert type(values["days"]) is int
    assert 1 <= values["days"] <= 9
    return values


def weather(city: str, days: int) -> str:
    return json.dumps({"city": city, "days": days, "degrees": 22, "sky": "clear"})
