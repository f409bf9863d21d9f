"""A server over the fake engine that may open few files: LIMIT [unbounded | CERT KEY].

Prints its two ports, then serves on. `unbounded`: it takes connections until there are no descriptors. CERT, KEY: of
TLS. A line on its standard input loads an adapter.
"""

import asyncio
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

import uvloop

from perseid_server.api.descriptors import allow_connections, connections_of_each
from perseid_server.api.tls import Tls, TlsFiles
from tests.server.stack import make_stack, serving


async def main(bounded: bool, tls: Tls | None) -> None:
    allowed = allow_connections()
    stack = make_stack(Path(tempfile.mkdtemp()))
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    async with serving(stack, tls, connections_of_each(allowed) if bounded else None) as live:
        tell(ports=[live.addresses.http_port, live.addresses.grpc_port])
        while await commands.readline():
            try:
                await stack.load(f"adapter-{len(stack.registry.names())}")
                tell(error=None)
            except Exception as error:  # noqa: BLE001  whatever it is, the test looks at it
                tell(error=repr(error))


def tell(**told: object) -> None:
    os.write(1, json.dumps(told).encode() + b"\n")


if __name__ == "__main__":
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit // 2, limit))
    pair = [Path(path) for path in sys.argv[2:4]]
    uvloop.run(main(sys.argv[2:] != ["unbounded"], Tls(TlsFiles(*pair)) if len(pair) == 2 else None))
