"""Long sequences of loading, replacing, pinning, unloading and asking, over both transports, against a model of what
should be there: each answer follows from what came before, and what was taken away is gone from engine and disk."""

from collections.abc import Iterator
from random import Random

import grpc
import httpx
import pytest

from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as stubs
from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1.generation_pb2_grpc import GenerationStub
from tests.fakes import expected
from tests.fuzz.campaign import Campaign, fuzzer
from tests.fuzz.served import attacked_server
from tests.server.stack import LiveStack, known, stored, write_adapter

NAMES = ("a", "b", "org/c", "one", "bad name", "")
SEEDS = (10, 11, 12)
STEPS = 12
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveStack]:
    with attacked_server(tmp_path_factory.mktemp("server")) as live:
        for seed in SEEDS:
            write_adapter(live.stack.root / f"seed-{seed}", seed=seed)
        yield live


class Clients:
    """Both transports, their refusals in the same terms: 200, 400, 404, 409."""

    def __init__(self, http: httpx.Client, channel: grpc.Channel) -> None:
        self._http = http
        self._admin = stubs.AdapterAdminStub(channel)
        self._generation = GenerationStub(channel)

    def load(self, name: str, source: str, *, replace: bool, over_http: bool) -> int:
        if over_http:
            body = {"lora_name": name, "lora_path": source, "load_inplace": replace}
            return self._http.post("/v1/load_lora_adapter", json=body).status_code
        return _status(self._admin.LoadAdapter, admin.LoadAdapterRequest(name=name, source=source, replace=replace))

    def unload(self, name: str, *, over_http: bool) -> int:
        if over_http:
            return self._http.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code
        return _status(self._admin.UnloadAdapter, admin.UnloadAdapterRequest(name=name))

    def pin(self, name: str, pinned: bool) -> int:
        return _status(self._admin.PinAdapter, admin.PinAdapterRequest(name=name, pinned=pinned))

    def versions(self, *, over_http: bool) -> dict[str, str]:
        """By name, adapters alone."""
        if over_http:
            cards = self._http.get("/v1/models").json()["data"]
            told = [card for card in cards if card.get("perseid", {}).get("kind") == "LoRA"]
            return {card["id"]: card["perseid"]["version"] for card in told}
        adapters = self._admin.ListAdapters(admin.ListAdaptersRequest(), timeout=60).adapters
        return {adapter.name: adapter.version for adapter in adapters if adapter.kind == "LoRA"}

    def say(self, name: str, *, over_http: bool) -> tuple[int, str]:
        """A greedy answer of four tokens."""
        if over_http:
            body = {"model": name, "prompt": "say", "max_tokens": 4, "temperature": 0}
            told = self._http.post("/v1/completions", json=body)
            return told.status_code, told.json()["choices"][0]["text"] if told.status_code == 200 else ""
        sampling = pb.SamplingParams(max_tokens=4, temperature=0.0)
        try:
            told = self._generation.Generate(
                pb.GenerateRequest(prompt="say", adapter=name, sampling=sampling), timeout=60
            )
        except grpc.RpcError as error:
            return _STATUS[error.code()], ""
        return 200, told.choices[0].text


_STATUS = {Code.INVALID_ARGUMENT: 400, Code.NOT_FOUND: 404, Code.ALREADY_EXISTS: 409}


def _status(call: object, message: object) -> int:
    try:
        call(message, timeout=60)
    except grpc.RpcError as error:
        return _STATUS[error.code()]
    return 200


@fuzzer(short=8, long=120)
def test_lifecycles(campaign: Campaign, live: LiveStack) -> None:
    """A case is twelve steps; what it leaves is unloaded."""
    with httpx.Client(base_url=live.url, timeout=60) as http, grpc.insecure_channel(live.grpc) as channel:
        clients = Clients(http, channel)
        before = clients.versions(over_http=True)
        disk = stored(live.stack)

        def check(random: Random) -> None:
            there: dict[str, int | None] = dict.fromkeys(before)  # name → seed; None: was there before
            for _ in range(STEPS):
                step(random, clients, there, before)
            for name in set(there) - set(before):
                assert clients.unload(name, over_http=random.random() < 0.5) == 200
            assert clients.versions(over_http=False) == before
            assert stored(live.stack) == disk
            assert set(before.values()) <= known(live.stack)

        campaign.run(check)


def step(random: Random, clients: Clients, there: dict[str, int | None], before: dict[str, str]) -> None:
    """One call, and what must come of it."""
    name, over_http = random.choice(NAMES), random.random() < 0.5
    is_name = name not in {"bad name", ""}
    match random.randrange(5):
        case 0 | 1:
            seed, replace = random.choice(SEEDS), random.random() < 0.5
            if name in before:
                replace = False  # the others need them as they are
            wanted = 400 if not is_name else 409 if name in there and not replace else 200
            assert clients.load(name, f"seed-{seed}", replace=replace, over_http=over_http) == wanted, (name, there)
            if wanted == 200:
                there[name] = seed
        case 2:
            if name in before:
                return
            wanted = 200 if name in there else 404
            assert clients.unload(name, over_http=over_http) == wanted, (name, there)
            there.pop(name, None)
        case 3:
            told = clients.versions(over_http=over_http)
            assert told.keys() == there.keys()
            assert clients.pin(name, random.random() < 0.5) == (200 if name in there else 404)
        case _:
            if name == "":
                return  # the base
            status, text = clients.say(name, over_http=over_http)
            assert status == (200 if name in there else 404)
            if status == 200:
                version = clients.versions(over_http=True)[name]
                assert text == bytes(expected(tuple(b"say"), version, 4)).decode()
