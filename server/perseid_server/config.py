"""What an operator can set: one frozen tree, filled from the command line, `PERSEID_*` variables and a file.

The command line wins over the environment, the environment over the file, the file over the defaults. The text
beside each field is what `perseid serve --help` prints. Nothing here imports torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter, validators

from perseid_server.speculation.options import Mode

MODEL = Group("Model", sort_key=1)
ADAPTERS = Group("Adapters", sort_key=2)
NETWORK = Group("Network", sort_key=3)
SECURITY = Group("Security", sort_key=4)
CAPACITY = Group("Memory and batching", sort_key=5)
OPERATION = Group("Operation", sort_key=6)

PORT = validators.Number(gte=0, lte=65535)
POSITIVE = validators.Number(gte=1)


@dataclass(frozen=True)
class NamedSource:
    """`NAME=SOURCE` from the command line."""

    name: str
    source: str

    @staticmethod
    def parse(text: str) -> "NamedSource":
        """Split at the first `=`; ValueError when either side is missing."""
        name, separator, source = text.partition("=")
        if not (separator and name and source):
            raise ValueError(f"expected NAME=SOURCE, got {text!r}")
        return NamedSource(name, source)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """All options of `perseid serve`."""

    model: Annotated[str, Parameter(group=MODEL)] = "embedded"
    """Base model: "embedded" (SmolLM2-135M-Instruct), a .gguf file, a Hugging Face folder, or a hub id
    org/name[@revision]. 16-bit checkpoints are quantised to NF4 while loading."""

    served_name: Annotated[str | None, Parameter(group=MODEL)] = None
    """Name clients use for the base. Default: the model's own name."""

    device: Annotated[Literal["auto", "cpu", "cuda"], Parameter(group=MODEL)] = "auto"
    """Where to run. "auto" takes a CUDA device when there is one."""

    activations: Annotated[Literal["exact", "int16", "int8"], Parameter(group=MODEL)] = "exact"
    """How a CPU with AVX-512 VNNI multiplies 4- and 8-bit weights. "exact": as exactly as float32. "int16" and "int8"
    round what goes into each linear to so many bits, as other CPU servers do: faster, but answers may change."""

    adapter: Annotated[
        tuple[str, ...],
        Parameter(group=ADAPTERS, negative=(), consume_multiple=False, metavar="NAME=SOURCE", show_default=False),
    ] = ()
    """Adapter to load at start, NAME=SOURCE, with SOURCE a PEFT folder, a folder with a gate set or Medusa heads, or a
    hub id. Repeat for more. Default: none."""

    gate_set: Annotated[str | None, Parameter(group=ADAPTERS)] = None
    """Gate set that "auto" alone means. Default: the one that is loaded, where it is one."""

    store: Annotated[Path | None, Parameter(group=ADAPTERS)] = None
    """Folder that keeps loaded adapters across restarts. Default: perseid/stores/BASE in the user's data folder."""

    adapter_root: Annotated[
        tuple[Path, ...],
        Parameter(group=ADAPTERS, negative=(), consume_multiple=False, metavar="FOLDER", show_default=False),
    ] = ()
    """Folder from which clients may load adapters at run time. Repeat for more. Default: none."""

    allow_hub: Annotated[bool, Parameter(group=ADAPTERS)] = False
    """Let clients load adapters from the Hugging Face hub."""

    allow_pickle_heads: Annotated[bool, Parameter(group=ADAPTERS)] = False
    """Read Medusa heads from medusa_lm_head.pt too. Such pickles are read as data, without running any of their code,
    and stored as safetensors."""

    host: Annotated[str, Parameter(group=NETWORK)] = "127.0.0.1"
    """Address to listen on."""

    http_port: Annotated[int, Parameter(group=NETWORK, validator=PORT)] = 8000
    """HTTP port; 0 picks a free one and prints it."""

    grpc_port: Annotated[int, Parameter(group=NETWORK, validator=PORT)] = 50051
    """gRPC port; 0 picks a free one and prints it."""

    api_keys: Annotated[Path | None, Parameter(group=SECURITY)] = None
    """File of API keys, their roles and limits ("perseid keys new" writes it), read again when it changes. Default:
    none, everybody may do everything."""

    insecure_listen: Annotated[bool, Parameter(group=SECURITY)] = False
    """Listen beyond loopback without API keys: something else guards the address."""

    metrics_role: Annotated[Literal["admin", "none"], Parameter(group=SECURITY)] = "admin"
    """Role that a key needs for /metrics, which names everybody's adapters. "none": no key at all."""

    tls_cert: Annotated[Path | None, Parameter(group=SECURITY)] = None
    """Certificate chain, PEM, for HTTP and gRPC; read again when it changes. Default: none, plain text."""

    tls_key: Annotated[Path | None, Parameter(group=SECURITY)] = None
    """Its private key, PEM, without a password. Default: none."""

    tls_client_ca: Annotated[Path | None, Parameter(group=SECURITY)] = None
    """Certificates, PEM, one of which must have signed each client's (mutual TLS). Default: clients need none."""

    kv_memory: Annotated[int, Parameter(group=CAPACITY, validator=POSITIVE)] = 360
    """Memory for the KV cache, MiB. The default holds one request of the embedded base's longest context on a CPU."""

    kv_dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Parameter(group=CAPACITY)] = "auto"
    """Element type of the KV cache. "auto": float32 on a CPU, bfloat16 on a GPU."""

    adapter_memory: Annotated[int, Parameter(group=CAPACITY, validator=POSITIVE)] = 512
    """Memory for adapters on the device, MiB. Others wait in host memory or on disk."""

    adapter_host_memory: Annotated[int, Parameter(group=CAPACITY, validator=POSITIVE)] = 1024
    """Memory for adapters kept ready in host memory, in float32, MiB. One alone may be larger."""

    max_batch_tokens: Annotated[int, Parameter(group=CAPACITY, validator=POSITIVE)] = 512
    """Most tokens in one step, prefill chunks and decodes together. Larger: faster prefill, longer steps."""

    max_num_seqs: Annotated[int, Parameter(group=CAPACITY, validator=POSITIVE)] = 64
    """Most sequences decoding at once."""

    max_model_len: Annotated[int | None, Parameter(group=CAPACITY, validator=POSITIVE)] = None
    """Most tokens of prompt and completion together. Default: what the model and the KV memory allow."""

    max_queue: Annotated[int, Parameter(group=CAPACITY, validator=POSITIVE)] = 1024
    """Most requests in progress; more are answered with 429 / RESOURCE_EXHAUSTED at once."""

    max_queue_tokens: Annotated[int | None, Parameter(group=CAPACITY, validator=POSITIVE)] = None
    """Most tokens in progress, of prompts and of the answers that are allowed; more are answered in the same way.
    Default: 16 times what the KV cache holds."""

    prefix_cache: Annotated[bool, Parameter(group=CAPACITY)] = True
    """Reuse the KV blocks of equal prompt beginnings."""

    speculation: Annotated[Mode, Parameter(group=CAPACITY)] = "auto"
    """What drafts tokens ahead for requests that do not say. "auto": Medusa heads where some are loaded, and prompt
    lookup; "medusa" and "ngram": one of them. Answers stay the same; nothing is drafted where it does not pay."""

    draft_tokens: Annotated[int | None, Parameter(group=CAPACITY, validator=validators.Number(gte=0, lte=63))] = None
    """Tokens to draft for each sequence and step, whether they pay or not; 0: none. Default: those that pay."""

    cuda_graphs: Annotated[bool, Parameter(group=OPERATION)] = True
    """Record decode steps at start and replay them. Costs some seconds and memory; a CPU has no use for it."""

    threads: Annotated[int | None, Parameter(group=OPERATION, validator=POSITIVE)] = None
    """Threads for the forward pass on a CPU. Default: OMP_NUM_THREADS, else the physical cores."""

    grace: Annotated[float, Parameter(group=OPERATION, validator=validators.Number(gte=0))] = 30.0
    """Seconds that running requests get to finish after SIGTERM or Ctrl-C."""

    default_timeout: Annotated[float | None, Parameter(group=OPERATION, validator=validators.Number(gt=0))] = None
    """Seconds after which a request that states no timeout of its own is ended. Default: never."""

    max_timeout: Annotated[float | None, Parameter(group=OPERATION, validator=validators.Number(gt=0))] = None
    """Longest timeout, seconds. Longer ones are shortened to it; requests without one get it. Default: no limit."""

    step_timeout: Annotated[float, Parameter(group=OPERATION, validator=validators.Number(gte=0))] = 60.0
    """Seconds that a step may take before the engine is taken for stuck and started again; thirty times as long
    while it starts. 0: for ever."""

    log_level: Annotated[Literal["debug", "info", "warning", "error"], Parameter(group=OPERATION)] = "info"
    """Least severity that is logged."""

    log_format: Annotated[Literal["human", "json"], Parameter(group=OPERATION)] = "human"
    """How log lines look."""

    trace_endpoint: Annotated[str | None, Parameter(group=OPERATION)] = None
    """Collector that OpenTelemetry traces are sent to (OTLP over gRPC), such as http://127.0.0.1:4317. Default: none.
    Needs the extra "tracing"."""

    trace_sample: Annotated[float, Parameter(group=OPERATION, validator=validators.Number(gte=0, lte=1))] = 0.01
    """Share of requests that are traced, of those whose client has not decided it (traceparent)."""

    log_prompts: Annotated[bool, Parameter(group=OPERATION)] = False
    """Write prompts and answers into the log line of each request. They are your users' private data: whoever reads the
    log reads them."""
