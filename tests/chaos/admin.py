"""Loading adapters over either transport, and what refusals say."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import httpx

from perseid_protos.perseid.v1 import adapter_admin_pb2 as admin
from perseid_protos.perseid.v1 import adapter_admin_pb2_grpc as admin_stubs

TIMEOUT_S = 120
TRANSPORTS = ("http", "grpc")
OK, UNAVAILABLE, INVALID = "ok", "unavailable", "invalid"
_OF_HTTP = {200: OK, 503: UNAVAILABLE, 400: INVALID, 403: INVALID, 404: INVALID}
_OF_GRPC = {
    grpc.StatusCode.UNAVAILABLE: UNAVAILABLE,
    grpc.StatusCode.INVALID_ARGUMENT: INVALID,
    grpc.StatusCode.PERMISSION_DENIED: INVALID,
    grpc.StatusCode.NOT_FOUND: INVALID,
}


@dataclass(frozen=True)
class Told:
    """How a call ended. KeyError for a status that none of these calls may have."""

    status: str
    message: str = ""


@dataclass(frozen=True)
class Admin:
    """Calls that block."""

    http: str
    grpc: str

    def load(self, transport: str, name: str, folder: Path) -> Told:
        """Give a name a new meaning."""
        if transport == "http":
            body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
            return self._post("/v1/load_lora_adapter", body)
        message = admin.LoadAdapterRequest(name=name, source=str(folder), replace=True)
        return self._call(lambda stub: stub.LoadAdapter(message, timeout=TIMEOUT_S))

    def unload(self, transport: str, name: str) -> Told:
        """Take a name away."""
        if transport == "http":
            return self._post("/v1/unload_lora_adapter", {"lora_name": name})
        return self._call(lambda stub: stub.UnloadAdapter(admin.UnloadAdapterRequest(name=name), timeout=TIMEOUT_S))

    def _post(self, route: str, body: dict[str, object]) -> Told:
        answer = httpx.post(f"{self.http}{route}", json=body, timeout=TIMEOUT_S, verify=False)
        status = _OF_HTTP[answer.status_code]
        assert status != UNAVAILABLE or int(answer.headers["Retry-After"]) >= 1
        return Told(status, "" if status == OK else answer.json()["error"]["message"])

    def _call(self, call: Callable[[admin_stubs.AdapterAdminStub], object]) -> Told:
        with grpc.insecure_channel(self.grpc) as channel:
            try:
                call(admin_stubs.AdapterAdminStub(channel))
            except grpc.RpcError as error:
                return Told(_OF_GRPC[error.code()], error.details())
        return Told(OK)
