"""Reading a request's body: as JSON, whatever its Content-Type says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

S = TypeVar("S", bound=BaseModel)


def body(model: type[S]) -> Callable[[Request], Awaitable[S]]:
    """Reads a body. What it raises is an HTTPException: 400 for what is no JSON, 422 for another
    shape."""

    async def read(request: Request) -> S:
        try:
            return model.model_validate_json(await request.body())
        except ValidationError as error:
            findings = error.errors(include_url=False, include_input=False)
            broken = findings[0]["type"] == "json_invalid"
            raise HTTPException(400 if broken else 422, sentence(findings)) from None

    return read


def sentence(findings: Any) -> str:
    """Pydantic's findings in one line."""
    said = [
        f"{'.'.join(map(str, one['loc']))}: {_words(one)}" if one["loc"] else _words(one)
        for one in findings[:5]
    ]
    return "; ".join(said)


def _words(finding: Any) -> str:
    """What is wrong; where we have said it ourselves, in our words alone."""
    return str(finding["msg"]).removeprefix("Value error, ")


def documented(model: type[BaseModel]) -> dict[str, Any]:
    """The same for the OpenAPI document."""
    schema = model.model_json_schema()
    inner = schema.pop("$defs", {})
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _whole(schema, inner)}},
        }
    }


def _whole(schema: Any, inner: dict[str, Any]) -> Any:
    """A schema in one piece: a part that is named elsewhere is put where it is meant."""
    if isinstance(schema, list):
        return [_whole(one, inner) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _whole(inner[schema["$ref"].rsplit("/", 1)[1]], inner)
    return {key: _whole(value, inner) for key, value in schema.items()}
