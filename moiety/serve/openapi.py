"""The description of the server in OpenAPI, made from the models that check requests and the types of what is sent."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import models_json_schema

from moiety.serve import replies
from moiety.serve.refusal import ErrorReply
from moiety.serve.requests import ChatRequest, CompletionRequest, ResponsesRequest

__all__ = ["description"]

PLACE = "#/components/schemas/{model}"
ERRORS = {
    "400": "the request is wrong; `param` names the field",
    "401": "the key is missing or wrong",
    "403": "the Host header names another machine",
    "404": "there is no such model",
    "408": "the body came too slowly",
    "413": "the body is too large",
    "415": "the body is not said to be JSON",
    "429": "too much is waiting; come again after Retry-After seconds",
    "431": "the head of the request is too large",
    "500": "an answer could not be computed",
    "503": "the server is starting, stopping or full; come again after Retry-After seconds",
}
RETRIED = {"Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}}
TEXT = {"type": "string"}
EVENT = {"type": "object", "required": ["data"], "properties": {"data": TEXT, "event": TEXT}}
ASKED: dict[str, tuple[type[BaseModel], Any, str]] = {
    "/v1/completions": (CompletionRequest, replies.Completion, "continue texts or tokens"),
    "/v1/chat/completions": (ChatRequest, replies.ChatReply, "answer messages"),
    "/v1/responses": (ResponsesRequest, replies.ResponseReply, "answer a text or messages"),
}
TOLD: dict[str, tuple[Any, str]] = {
    "/health": (replies.Health, "whether requests are taken; needs no key"),
    "/version": (replies.Version, "of the program"),
    "/v1/models": (replies.Models, "the served model"),
    "/v1/models/{model}": (replies.Model, "the served model by its name"),
    "/v1/routing": (replies.RoutingTotals, "where all tokens went since the start"),
}


def description(version: str, *, has_key: bool) -> dict[str, Any]:
    """The whole document.

    Args:
        version: Of the program.
        has_key: Whether a key is asked for.
    """
    kinds: list[tuple[str, Any]] = [(f"{path} get", kind) for path, (kind, _) in TOLD.items()]
    kinds += [(f"{path} post", kind) for path, (_, kind, _) in ASKED.items()] + [("error", ErrorReply)]
    shown, schemas = TypeAdapter.json_schemas(
        [(name, "serialization", TypeAdapter(kind)) for name, kind in kinds], ref_template=PLACE
    )
    by_name = {name: schema for (name, _), schema in shown.items()}
    models, asked = models_json_schema(
        [(kind, "validation") for kind, _, _ in ASKED.values()], ref_template=PLACE
    )
    paths: dict[str, Any] = {}
    for path, (_, about) in TOLD.items():
        paths[path] = {
            "get": _operation(about, {"application/json": {"schema": by_name[f"{path} get"]}}, by_name)
        }
    paths["/v1/models/{model}"]["get"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": TEXT}
    ]
    paths["/metrics"] = {"get": _operation("for Prometheus", {"text/plain": {"schema": TEXT}}, by_name)}
    paths["/openapi.json"] = {
        "get": _operation("this document", {"application/json": {"schema": {"type": "object"}}}, by_name)
    }
    for path, (kind, _, about) in ASKED.items():
        sent = {
            "application/json": {"schema": by_name[f"{path} post"]},
            "text/event-stream": {"itemSchema": EVENT},
        }
        body = {"required": True, "content": {"application/json": {"schema": models[kind, "validation"]}}}
        paths[path] = {"post": {**_operation(about, sent, by_name), "requestBody": body}}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "moiety", "version": version},
        "paths": paths,
        "components": {"schemas": {**schemas.get("$defs", {}), **asked.get("$defs", {})}},
    }
    if has_key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
        paths["/health"]["get"]["security"] = []
    return found


def _operation(about: str, content: dict[str, Any], by_name: dict[str, Any]) -> dict[str, Any]:
    error = {"application/json": {"schema": by_name["error"]}}
    refused = {
        status: {
            "description": why,
            "content": error,
            **({"headers": RETRIED} if status in ("429", "503") else {}),
        }
        for status, why in ERRORS.items()
    }
    return {"summary": about, "responses": {"200": {"description": "done", "content": content}, **refused}}
