"""From options to what a run needs: a target, a plan, limits."""

import random
import ssl
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from perseid_loadtest.traffic.arrivals import Arrivals, parse_arrivals
from perseid_loadtest.traffic.driver import Limits
from perseid_loadtest.traffic.lengths import parse_lengths
from perseid_loadtest.traffic.options import LoadtestOptions
from perseid_loadtest.traffic.plan import Plan
from perseid_loadtest.traffic.popularity import parse_popularity
from perseid_loadtest.traffic.prompts import parse_prompts
from perseid_loadtest.traffic.target import Target
from perseid_server.errors import InvalidRequest

SEEDS = 2**31
ALL, BASE = "all", "base"


def target_of(options: LoadtestOptions) -> Target:
    """Not yet connected."""
    assert options.target is not None
    if options.is_grpc:
        from perseid_loadtest.traffic.grpc_target import GrpcTarget  # noqa: PLC0415  grpc takes a while to import

        parts = urlsplit(options.target)
        ca = options.ca.read_bytes() if options.ca is not None else None
        return GrpcTarget(
            parts.netloc, api_key=options.api_key, stream=options.stream, ca=ca, tls=parts.scheme == "grpcs"
        )
    from perseid_loadtest.traffic.http_target import HttpTarget  # noqa: PLC0415  needs aiohttp

    return HttpTarget(
        options.target,
        adapters=[name for name in _stated(options) if name not in {ALL, BASE}],
        model=options.model,
        api_key=options.api_key,
        stream=options.stream,
        ca=_trusted(options),
    )


def _trusted(options: LoadtestOptions) -> ssl.SSLContext | None:
    if options.ca is None:
        return None
    try:
        return ssl.create_default_context(cafile=options.ca)
    except (ssl.SSLError, OSError) as error:
        raise InvalidRequest(f"--ca {options.ca}: not a PEM file with certificates", field="ca") from error


def _stated(options: LoadtestOptions) -> list[str]:
    return [part for name in options.adapters for part in name.split(",")]


def adapters_of(options: LoadtestOptions, served: Sequence[str]) -> tuple[str, ...]:
    """Names to ask for, "" the base. InvalidRequest when the server lists adapters and one is not among them."""
    names: list[str] = []
    for name in _stated(options) or [BASE]:
        if name == ALL:
            if not served:
                raise InvalidRequest(f"--adapters all: {options.target} lists no adapter", field="adapters")
            names += served
        elif name == BASE:
            names.append("")
        elif served and name not in served:
            listed = ", ".join(served[:10]) + (f" and {len(served) - 10} more" if len(served) > 10 else "")
            raise InvalidRequest(f"--adapters: {options.target} has no {name!r}; it lists {listed}", field="adapters")
        else:
            names.append(name)
    return tuple(dict.fromkeys(names))


def check_plan(options: LoadtestOptions) -> None:
    """InvalidRequest for what can be told without a server: files and forms."""
    names = ["" if name == BASE else name for name in _stated(options) or [BASE]]
    if ALL in names:  # who is hot can be told only with the server's list
        names.append(options.popularity.partition(":")[2].partition("=")[0])
    plan_of(options, tuple(names), None)


def plan_of(options: LoadtestOptions, names: tuple[str, ...], vocabulary: Sequence[int] | None) -> Plan:
    """The plan of a run; a sweep gives it other arrivals each time."""
    seed = random.randrange(SEEDS) if options.seed is None else options.seed  # noqa: S311
    return Plan(
        seed,
        parse_popularity(options.popularity, names),
        parse_prompts(options.prompt_tokens, vocabulary, options.shared_prefix, seed),
        parse_lengths("output_tokens", options.output_tokens),
        arrivals_of(options),
    )


def arrivals_of(options: LoadtestOptions, rate: float | None = None) -> Arrivals | None:
    """None in a closed loop."""
    if rate is None and options.sweep:
        rate = options.rate or 1.0
    if rate is None and not options.is_open_loop:
        return None
    return parse_arrivals(options.arrivals, options.rate if rate is None else rate)


def limits_of(options: LoadtestOptions) -> Limits:
    """How long a run is."""
    limits = Limits(
        warm_up_s=options.warm_up,
        duration_s=options.duration_s,
        requests=options.requests,
        timeout_s=options.timeout,
        stop_on_errors=options.stop_on_errors,
    )
    if options.is_open_loop or options.sweep:
        return limits
    return replace(limits, concurrency=options.concurrency or 1)


def metrics_url(options: LoadtestOptions) -> str | None:
    """Whose /metrics to read."""
    return options.metrics or (None if options.is_grpc else options.target)


def told(options: LoadtestOptions) -> dict[str, Any]:
    """Options for the report, with what their absence means."""
    limits = limits_of(options)
    stated = dict(options.told())
    if limits.concurrency is not None:
        stated["concurrency"] = limits.concurrency
        stated.pop("arrivals", None)
    if limits.duration_s is not None:
        stated["duration"] = limits.duration_s
    return stated
