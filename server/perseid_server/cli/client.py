"""What the commands that talk to a running server share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import grpc
from cyclopts import Parameter

from perseid_server.errors import PerseidError

ServerAddress = Annotated[str, Parameter(name="--server", env_var="PERSEID_SERVER", help="gRPC address of the server.")]
DEFAULT_SERVER = "127.0.0.1:50051"


@contextmanager
def connected(address: str) -> Iterator[grpc.Channel]:
    """A channel to a server; its errors become one line for the user."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with grpc.insecure_channel(address) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise PerseidError(f"{address}: {error.details()}; is a server running there?") from error
            raise PerseidError(f"{error.code().name}: {error.details()}") from error
        except UnicodeEncodeError as error:
            raise PerseidError("an argument is not valid UTF-8") from error
