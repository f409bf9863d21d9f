"""Schemathesis over our own OpenAPI document: every route, data that fits the document and data that does not. Each
answer is one that the document has, in status, type and content."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from fastapi.routing import iter_route_contexts
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi import checks as openapi

from perseid_server.api.http.access import NEEDS
from tests.fuzz.campaign import SEED, SENT, Campaign, fuzzer
from tests.fuzz.likely import MODELS, NAMES, likely
from tests.fuzz.served import attacked_server, no_traceback
from tests.server.stack import LiveStack

NOT_IN_THE_DOCUMENT = {"/openapi.json": "it is the document; the first thing these tests read"}
CHECKS: list[Any] = [
    schemathesis.checks.not_a_server_error,
    openapi.status_code_conformance,
    openapi.content_type_conformance,
    openapi.response_schema_conformance,
    openapi.response_headers_conformance,
    openapi.negative_data_rejection,
    openapi.unsupported_method,
    openapi.allow_header_conformance,
]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    with attacked_server(tmp_path_factory.mktemp("server")) as live:
        yield live


@pytest.fixture(scope="module")
def operations(live: LiveStack) -> list[Any]:
    """All of the document that the server hands out."""
    schema = schemathesis.openapi.from_dict(requests.get(f"{live.url}/openapi.json", timeout=30).json())
    return [result.ok() for result in schema.get_all_operations()]


def test_no_route_is_left_out(live: LiveStack, operations: list[Any]) -> None:
    """What the app serves is in the document, with the errors that may come."""
    served = {
        (method, route.path_format)
        for route in iter_route_contexts(live.stack.app.router.routes)
        if route.path_format not in NOT_IN_THE_DOCUMENT
        for method in route.methods - {"HEAD"}
    }
    told = {(operation.method.upper(), operation.path) for operation in operations}
    assert told == served
    for operation in operations:
        statuses = set(operation.definition.raw["responses"])
        assert {"200", "413", "429"} <= statuses, operation.label
        assert statuses.isdisjoint({"401", "403"}) == (NEEDS.get(operation.path) == "open"), operation.label
        assert "422" not in statuses, "bad input is answered with 400 here"


@fuzzer(short=12, long=240)
def test_http_operations(campaign: Campaign, live: LiveStack, operations: list[Any]) -> None:
    """`count` cases that fit and as many that do not for each route that takes anything, a tenth for the others."""
    with requests.Session() as session:
        for operation in operations:
            takes_something = bool(operation.body or operation.path_parameters)
            for mode in GenerationMode if operation.body else [GenerationMode.POSITIVE]:
                count = campaign.count if takes_something else max(1, campaign.count // 10)
                attack(live, session, operation, mode, count)


def attack(live: LiveStack, session: requests.Session, operation: Any, mode: GenerationMode, count: int) -> None:
    """So many cases of one kind for one route."""
    chance = random.Random(f"{SEED} {operation.label} {mode}")

    @seed(chance.getrandbits(64))
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Case) -> None:
        SENT[f"http {operation.method.upper()} {operation.path}"] += 1
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = likely(case.body)
        if case.path_parameters and chance.random() < 0.4:
            case.path_parameters = dict.fromkeys(case.path_parameters, chance.choice((*MODELS, *NAMES)))
        response = case.call(base_url=live.url, session=session, timeout=60)
        no_traceback(response.text)
        case.validate_response(response, checks=CHECKS)
        if response.headers.get("Content-Type", [""])[0].startswith("text/event-stream"):
            check_events(response)

    check()


def check_events(response: Any) -> None:
    """A stream is chunks and ends with [DONE]; one that fails says so in an error of the usual form."""
    events = response.text.split("\n\n")
    assert events.pop() == ""
    assert events.pop() == "data: [DONE]"
    for event in events:
        chunk = json.loads(event.removeprefix("data: "))
        assert set(chunk) == {"error"} or {"id", "object", "created", "model", "choices"} <= set(chunk), event
