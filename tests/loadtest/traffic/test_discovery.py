"""What servers call their base and their adapters, and what is said of those that do not tell."""

import pytest

from perseid_server.errors import PerseidError
from tests.loadtest.traffic.peers import says, target_at

MODELS = "/v1/models"
LORA = "/lora-adapters"
ONE = {"data": [{"id": "base"}]}
LLAMA = {"data": [{"id": "base.gguf", "owned_by": "llamacpp"}]}


def fields(target, adapter=""):
    return target._dialect.fields(adapter)


@pytest.mark.parametrize(
    "routes",
    [
        {},
        *({MODELS: says("no", status)} for status in (400, 404, 405, 501)),
        *({MODELS: told} for told in ("<html>", [], {}, {"data": None}, {"data": [{}]}, {"data": ["x"]}, {"data": []})),
    ],
)
async def test_a_server_without_a_list_is_tested_by_the_models_name(routes):
    async with target_at(routes, model="mine") as target:
        assert fields(target) == {"model": "mine"}
        assert target.names is None


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (says("", 404), "HTTP 404; is this an OpenAI-compatible server.*--model"),
        (says("<html>"), "no list of models; .*--model"),
        (says({"data": []}), "lists no model; name the base with --model"),
    ],
)
async def test_without_a_list_the_option_that_helps_is_named(told, message):
    with pytest.raises(PerseidError, match=message):
        async with target_at({MODELS: told}):
            pass


@pytest.mark.parametrize(("status", "message"), [(401, "--api-key"), (403, "--api-key"), (503, "HTTP 503")])
async def test_a_key_or_a_server_that_is_not_well_is_told_whatever_the_model(status, message):
    with pytest.raises(PerseidError, match=message):
        async with target_at({MODELS: says("", status)}, model="mine"):
            pass


@pytest.mark.parametrize(
    "told", [{}, [], "x", 3, [1], [{"id": 0}], [{"id": "0", "path": "a.gguf"}], [{"id": 0, "path": None}]]
)
async def test_what_is_not_llama_servers_list_makes_no_llama_server(told):
    async with target_at({MODELS: {"data": [{"id": "base"}, {"id": "a"}]}, LORA: told}) as target:
        assert fields(target, "a") == {"model": "a"}
        assert target.names == ("a",)


@pytest.mark.parametrize("routes", [{MODELS: LLAMA}, {MODELS: ONE, "/props": {"build_info": "b1"}}])
async def test_a_llama_server_without_adapters_says_so(routes):
    async with target_at({**routes, LORA: []}, adapters=["typo"]) as target:
        assert target.names == ()


async def test_llama_servers_adapters_have_their_files_names():
    listed = [{"id": number, "path": path} for number, path in enumerate(("x/lora-sql.gguf", "dates.gguf"))]
    async with target_at({MODELS: LLAMA, LORA: listed}) as target:
        assert target.names == ("lora-sql", "dates")
        assert fields(target, "dates")["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}]


async def test_llama_servers_adapters_have_the_names_that_they_are_asked_for_by():
    listed = [{"id": number, "path": path} for number, path in enumerate(("x/lora-sql.gguf", "dates.gguf"))]
    async with target_at({MODELS: LLAMA, LORA: listed}, adapters=["sql", "typo"]) as target:
        assert set(target.names) == {"sql", "dates"}
        assert fields(target, "sql")["lora"][0] == {"id": 0, "scale": 1.0}


async def test_two_files_of_one_name_have_their_paths():
    listed = [{"id": number, "path": path} for number, path in enumerate(("a/x.gguf", "b/x.gguf", "y.gguf"))]
    async with target_at({MODELS: LLAMA, LORA: listed}) as target:
        assert target.names == ("a/x.gguf", "b/x.gguf", "y")


async def test_a_llama_server_that_wants_a_key_for_its_list_is_told():
    with pytest.raises(PerseidError, match="--api-key"):
        async with target_at({MODELS: LLAMA, LORA: says("", 401)}):
            pass
