"""A client in a process of its own, to be killed: `python -m tests.chaos.client_process http|grpc ADDRESS MODEL COUNT`
streams so many tokens and prints a line for each that comes.
"""

import json
import sys

import grpc
import httpx

from perseid_protos.perseid.v1 import generation_pb2 as pb
from perseid_protos.perseid.v1 import generation_pb2_grpc as stubs


def main() -> None:
    """Stream to the end."""
    transport, address, model, count = sys.argv[1:]
    if transport == "http":
        body = {"model": model, "prompt": "Once upon a time", "max_tokens": int(count), "ignore_eos": True}
        with httpx.stream("POST", f"{address}/v1/completions", json=body | {"stream": True}, timeout=120) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    print(json.loads(line[6:])["choices"][0]["text"], flush=True)
        return
    sampling = pb.SamplingParams(max_tokens=int(count), ignore_eos=True)
    message = pb.GenerateRequest(prompt="Once upon a time", adapter=model, sampling=sampling)
    with grpc.insecure_channel(address) as channel:
        for chunk in stubs.GenerationStub(channel).GenerateStream(message):
            print(chunk.text, flush=True)


if __name__ == "__main__":
    main()
