"""All options of `perseid loadtest`. Nothing here needs aiohttp."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from cyclopts import Group, Parameter, validators

from perseid_server.errors import InvalidRequest

TARGET = Group("Target", sort_key=1)
TRAFFIC = Group("Traffic", sort_key=2)
REQUESTS = Group("Requests", sort_key=3)
LENGTH = Group("Length of the run", sort_key=4)
CHURN = Group("Adapters that come and go", sort_key=5)
REPORT = Group("Report", sort_key=6)
OTHER = Group("Instead of a run", sort_key=7)

POSITIVE = validators.Number(gte=1)
MORE_THAN_0 = validators.Number(gt=0)
NOT_NEGATIVE = validators.Number(gte=0)
SHARE = validators.Number(gt=0, lte=1)

HTTP_SCHEMES, GRPC_SCHEMES = ("http", "https"), ("grpc", "grpcs")
DEFAULT_DURATION_S = 30.0
DEFAULT_WARM_UP_S = 3.0
LEAST_RATE, MOST_RATE = 1e-6, 100_000.0
"""Requests a second. More than one load generator can send; beyond either, gaps are no numbers any more."""
_UNTOLD = {
    *("api_key", "metrics_key", "ca", "client_cert", "client_key"),
    *("target", "json", "html", "compare", "own_cost"),
}
"""Not part of what a run measured, or nobody's business."""


@dataclass(frozen=True, kw_only=True)
class LoadtestOptions:
    """All options of `perseid loadtest`."""

    target: Annotated[str | None, Parameter(group=TARGET, show_default=False)] = None
    """Server to drive: http://HOST:PORT of any OpenAI-compatible server, or grpc://HOST:PORT of Perseid (https:// and
    grpcs:// with TLS). Default: none, it must be given."""

    api_key: Annotated[str | None, Parameter(group=TARGET, show_default=False)] = None
    """Key that the server wants; it is not written into reports. Default: none."""

    ca: Annotated[Path | None, Parameter(group=TARGET, metavar="FILE", show_default=False)] = None
    """PEM file with the certificates to trust, for https:// and grpcs://. Default: those of the system."""

    client_cert: Annotated[Path | None, Parameter(group=TARGET, metavar="FILE", show_default=False)] = None
    """Certificate, PEM, to show to a server that asks for one. Default: none."""

    client_key: Annotated[Path | None, Parameter(group=TARGET, metavar="FILE", show_default=False)] = None
    """Its private key, PEM. Default: none."""

    model: Annotated[str | None, Parameter(group=TARGET, show_default=False)] = None
    """What an HTTP server calls its base. Default: the first model that it lists."""

    metrics: Annotated[str | None, Parameter(group=TARGET, metavar="URL", show_default=False)] = None
    """Server whose /metrics stand beside the figures. Default: the target, where it is HTTP."""

    metrics_key: Annotated[str | None, Parameter(group=TARGET, show_default=False)] = None
    """Key that /metrics wants, of Perseid an operator's; it is not written into reports. Others on this machine can see
    command lines: PERSEID_METRICS_KEY is better. Default: that of --api-key."""

    rate: Annotated[float | None, Parameter(group=TRAFFIC, validator=MORE_THAN_0, show_default=False)] = None
    """Open loop: requests a second, sent when they are due, whatever has been answered. Default: a closed loop."""

    concurrency: Annotated[int | None, Parameter(group=TRAFFIC, validator=POSITIVE, show_default=False)] = None
    """Closed loop: clients, each with one request at a time. Default: 1, without --rate and a trace."""

    arrivals: Annotated[str, Parameter(group=TRAFFIC, metavar="KIND")] = "poisson"
    """When requests of an open loop are due: poisson, gamma:BURSTINESS (1 is poisson, less comes in bursts), or
    trace:FILE with a moment in seconds, or an object {"at", "adapter", "prompt_tokens", "output_tokens"}, a line."""

    adapters: Annotated[
        tuple[str, ...], Parameter(group=TRAFFIC, negative=(), consume_multiple=True, show_default=False)
    ] = ()
    """Adapters to ask for, the most popular first; "base" is the base, "all" what the server lists. Default: the
    base."""

    popularity: Annotated[str, Parameter(group=TRAFFIC, metavar="KIND")] = "zipf:1.0"
    """How requests spread over adapters: zipf:S, uniform, round-robin, hot:NAME (nine in ten) or hot:NAME=SHARE."""

    prompt_tokens: Annotated[str, Parameter(group=REQUESTS, metavar="LENGTH")] = "64"
    """Tokens of a prompt: N, LO..HI, or a file with a length, or {"prompt": text or tokens}, a line. Without prompts of
    a file each is random, so that no prefix cache knows it."""

    shared_prefix: Annotated[int, Parameter(group=REQUESTS, validator=NOT_NEGATIVE)] = 0
    """Tokens at the beginning that all prompts share, for the prefix cache to find."""

    output_tokens: Annotated[str, Parameter(group=REQUESTS, metavar="LENGTH")] = "64"
    """Tokens of an answer: N, LO..HI, or a file with a length a line. Servers are asked to go on after an end token."""

    stream: Annotated[bool, Parameter(group=REQUESTS)] = True
    """Ask for answers token by token; otherwise whole."""

    timeout: Annotated[float, Parameter(group=REQUESTS, validator=MORE_THAN_0)] = 120.0
    """Seconds that an answer may take; then it is an error."""

    seed: Annotated[int | None, Parameter(group=REQUESTS, validator=NOT_NEGATIVE, show_default=False)] = None
    """Repeats a run, the same requests at the same moments. A server that kept them in its prefix cache is faster the
    second time. Default: another one each time, which the report tells."""

    warm_up: Annotated[float | None, Parameter(group=LENGTH, validator=NOT_NEGATIVE, show_default=False)] = None
    """Seconds of traffic before measuring begins. Default: 3; 0 of a trace, which counts from its beginning."""

    duration: Annotated[float | None, Parameter(group=LENGTH, validator=MORE_THAN_0, show_default=False)] = None
    """Seconds to measure. Default: 30, without --requests; of a trace, all of it."""

    requests: Annotated[int | None, Parameter(group=LENGTH, validator=POSITIVE, show_default=False)] = None
    """Requests to measure. Default: as many as --duration brings."""

    stop_on_errors: Annotated[float, Parameter(group=LENGTH, validator=SHARE)] = 0.5
    """Ends the run when more than this share of the last 100 requests failed; 1: never."""

    churn: Annotated[
        tuple[str, ...],
        Parameter(group=CHURN, negative=(), consume_multiple=True, metavar="NAME=SOURCE", show_default=False),
    ] = ()
    """Adapters to load, replace and unload in turn while traffic runs, as `perseid adapters load` names them. One that
    --adapters names is only replaced, by each of its sources in turn. Default: none."""

    churn_every: Annotated[float, Parameter(group=CHURN, validator=MORE_THAN_0)] = 1.0
    """Seconds from the end of one change to the next."""

    slo: Annotated[str | None, Parameter(group=REPORT, metavar="LIMITS", show_default=False)] = None
    """What makes an answer good, such as ttft=500ms,itl=100ms,e2e=10s; also tpot. Default: no limits."""

    json: Annotated[Path | None, Parameter(group=REPORT, metavar="FILE", show_default=False)] = None
    """File for the figures and all records. Default: none."""

    html: Annotated[Path | None, Parameter(group=REPORT, metavar="FILE", show_default=False)] = None
    """File for a page with plots. Default: none."""

    sweep: Annotated[bool, Parameter(group=OTHER, negative=())] = False
    """Find the highest rate at which the limits of --slo hold, beginning with --rate, or 1 a second."""

    slo_share: Annotated[float, Parameter(group=OTHER, validator=SHARE)] = 0.99
    """Share of the requests that must meet the limits for a rate to count in a sweep."""

    compare: Annotated[
        tuple[Path, Path] | None, Parameter(group=OTHER, negative=(), metavar="FILE", show_default=False)
    ] = None
    """Two files of --json, to lay side by side; --html writes the page. Default: none."""

    own_cost: Annotated[bool, Parameter(group=OTHER, negative=())] = False
    """Measure what the load generator itself can do, against a server that does nothing."""

    @property
    def is_grpc(self) -> bool:
        """Whether the target speaks gRPC."""
        return urlsplit(self.target or "").scheme in GRPC_SCHEMES

    @property
    def is_trace(self) -> bool:
        """Whether a file says when requests are due."""
        return self.arrivals.startswith("trace:")

    @property
    def is_open_loop(self) -> bool:
        """Whether requests are sent when they are due."""
        return self.rate is not None or self.is_trace

    @property
    def warm_up_s(self) -> float:
        """Seconds before measuring."""
        if self.warm_up is not None:
            return self.warm_up
        return 0.0 if self.is_trace else DEFAULT_WARM_UP_S

    @property
    def duration_s(self) -> float | None:
        """Seconds to measure; None: a number of requests, or all of a trace."""
        if self.duration is not None or self.requests is not None or self.is_trace:
            return self.duration
        return DEFAULT_DURATION_S

    def told(self) -> Mapping[str, Any]:
        """For the report: what was asked for."""
        stated = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in _UNTOLD}
        return {name: value for name, value in stated.items() if value not in (None, (), False)}


def check(options: LoadtestOptions) -> None:
    """InvalidRequest, with the option and how to mend it, when options contradict each other or cannot be."""
    for one in fields(options):
        value = getattr(options, one.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise _error(one.name, f"expected a finite number, got {value}")
    _check_files(options)
    if options.compare is not None or options.own_cost:
        _check_alone(options)
        return
    _check_target(options)
    _check_traffic(options)
    if options.sweep:
        _check_sweep(options)


def _check_files(options: LoadtestOptions) -> None:
    if options.json is not None and options.json == options.html:
        raise _error("html", f"{options.html} is --json's file too; expected another one")


def _check_alone(options: LoadtestOptions) -> None:
    name = "compare" if options.compare is not None else "own_cost"
    if options.target is not None or options.sweep or (options.compare is not None and options.own_cost):
        raise _error(name, "makes no run; leave out --target, --sweep and the like")


def _check_target(options: LoadtestOptions) -> None:
    wanted = "expected http://HOST:PORT or grpc://HOST:PORT (https:// and grpcs:// with TLS)"
    if options.target is None:
        raise _error("target", wanted)
    try:
        parts = urlsplit(options.target)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _error("target", f"{options.target!r}: {wanted}") from error
    if parts.scheme not in (*HTTP_SCHEMES, *GRPC_SCHEMES) or not host:
        raise _error("target", f"{options.target!r}: {wanted}")
    if options.is_grpc and (port is None or parts.path.strip("/")):
        raise _error("target", f"{options.target!r}: expected grpc://HOST:PORT and nothing behind it")
    _check_certificates(options, parts.scheme)
    for name in ("api_key", "metrics_key"):
        key = getattr(options, name) or ""
        if not (key.isascii() and key.isprintable()):
            raise _error(name, "expected printable ASCII characters")
    if options.metrics is not None and urlsplit(options.metrics).scheme not in HTTP_SCHEMES:
        raise _error("metrics", f"{options.metrics!r}: expected http://HOST:PORT")


def _check_certificates(options: LoadtestOptions, scheme: str) -> None:
    if (options.client_cert is None) != (options.client_key is None):
        raise InvalidRequest("expected --client-cert and --client-key together", field="client_cert")
    encrypted = scheme in {"https", "grpcs"} or urlsplit(options.metrics or "").scheme == "https"
    for name in ("ca", "client_cert", "client_key"):
        path = getattr(options, name)
        if path is not None and not encrypted:
            raise _error(name, "allowed with https:// and grpcs:// only")
        if path is not None and not path.is_file():
            raise _error(name, f"{path}: no such file")


def _check_traffic(options: LoadtestOptions) -> None:
    if options.rate is not None and options.concurrency is not None:
        raise _error("concurrency", "allowed without --rate only: an open loop has no clients that wait")
    if options.rate is not None and not LEAST_RATE <= options.rate <= MOST_RATE:
        wanted = f"expected from {LEAST_RATE:f} to {MOST_RATE:,.0f} requests a second"
        raise _error("rate", f"{wanted}, got {options.rate:g}; run several load generators for more")
    if options.is_trace and options.concurrency is not None:
        raise _error("concurrency", "allowed without --arrivals trace:FILE only, which says when requests are due")
    if options.arrivals != "poisson" and not options.is_open_loop and not options.sweep:
        raise _error("arrivals", "needs --rate, requests a second; a closed loop has no arrivals")
    if options.duration is not None and options.requests is not None:
        raise _error("requests", "allowed without --duration only: one of them ends the run")
    for name in options.adapters:
        if not name or any(not part for part in name.split(",")):
            raise _error("adapters", f"{name!r}: expected names with commas or blanks between them")


def _check_sweep(options: LoadtestOptions) -> None:
    if options.slo is None:
        raise _error("sweep", "needs --slo, the limits that the rate is to keep, such as --slo ttft=500ms,itl=100ms")
    if options.concurrency is not None:
        raise _error("concurrency", "allowed without --sweep only, which looks for a rate")
    if options.is_trace:
        raise _error("arrivals", "a sweep sets the rate itself; expected poisson or gamma:BURSTINESS")


def _error(field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"--{field.replace('_', '-')}: {what}", field=field)
