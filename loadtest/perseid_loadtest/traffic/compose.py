"""From options to what a run needs: a target, a plan, limits."""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from perseid_loadtest.traffic.arrivals import Arrivals, Trace, parse_arrivals
from perseid_loadtest.traffic.driver import Limits
from perseid_loadtest.traffic.lengths import parse_lengths
from perseid_loadtest.traffic.options import LoadtestOptions
from perseid_loadtest.traffic.plan import BASE, Plan, name_of
from perseid_loadtest.traffic.popularity import parse_popularity
from perseid_loadtest.traffic.prompts import parse_prompts
from perseid_loadtest.traffic.target import Target
from perseid_loadtest.traffic.tls import context_of, pem_of
from perseid_server.errors import InvalidRequest

SEEDS = 2**31
ALL = "all"


def target_of(options: LoadtestOptions) -> Target:
    """Not yet connected."""
    assert options.target is not None
    if options.is_grpc:
        from perseid_loadtest.traffic.grpc_target import GrpcTarget  # noqa: PLC0415  grpc takes a while to import

        parts = urlsplit(options.target)
        pem = pem_of(options) if parts.scheme == "grpcs" else None
        return GrpcTarget(parts.netloc, api_key=options.api_key, stream=options.stream, tls=pem)
    from perseid_loadtest.traffic.http_target import HttpTarget  # noqa: PLC0415  needs aiohttp

    return HttpTarget(
        options.target,
        adapters=[name for name in (*_stated(options), *traced(arrivals_of(options))) if name not in {ALL, BASE, ""}],
        model=options.model,
        api_key=options.api_key,
        stream=options.stream,
        tls=context_of(options),
    )


def _stated(options: LoadtestOptions) -> list[str]:
    return [part for name in options.adapters for part in name.split(",")]


def adapters_of(options: LoadtestOptions, served: Sequence[str] | None) -> tuple[str, ...]:
    """Names to ask for, "" the base. InvalidRequest when the server tells what it has and one is not among them."""
    names: list[str] = []
    for name in _stated(options) or [BASE]:
        if name == ALL:
            if not served:
                raise InvalidRequest(f"--adapters all: {options.target} lists no adapter", field="adapters")
            names += served
        else:
            _check_served(options, "adapters", name_of(name), served)
            names.append(name_of(name))
    return tuple(dict.fromkeys(names))


def traced_adapters(options: LoadtestOptions, plan: Plan, served: Sequence[str] | None) -> frozenset[str]:
    """Names that a trace asks for, as `adapters_of` has those of --adapters."""
    names = traced(plan.arrivals)
    for name in names:
        _check_served(options, "arrivals", name, served)
    return frozenset(names)


def traced(arrivals: Arrivals | None) -> Sequence[str]:
    """Names in a trace, in order."""
    moments = arrivals.moments if isinstance(arrivals, Trace) else ()
    return tuple(dict.fromkeys(name_of(due.adapter) for due in moments if due.adapter is not None))


def _check_served(options: LoadtestOptions, field: str, name: str, served: Sequence[str] | None) -> None:
    if served is None or not name or name in served:
        return
    listed = ", ".join(served[:10]) + (f" and {len(served) - 10} more" if len(served) > 10 else "")
    option = f"--{field}" if field == "adapters" else f"--{field} {options.arrivals}"
    raise InvalidRequest(
        f"{option}: {options.target} has no adapter {name!r}; it lists {listed or 'none'}", field=field
    )


def check_plan(options: LoadtestOptions) -> None:
    """InvalidRequest for what can be told without a server: files and forms."""
    names = [name_of(name) for name in _stated(options) or [BASE]]
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
        warm_up_s=options.warm_up_s,
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


def metrics_key(options: LoadtestOptions) -> str | None:
    """What to show there."""
    return options.metrics_key or options.api_key


async def check_metrics(options: LoadtestOptions) -> None:
    """InvalidRequest when the server of --metrics has none to read: before the run rather than after it."""
    if options.metrics is None:
        return
    from perseid_loadtest.analysis.server_metrics import scrape  # noqa: PLC0415  only where it is wanted

    found = await asyncio.to_thread(scrape, options.metrics, metrics_key(options), context_of(options))
    if found.failure is not None:
        raise InvalidRequest(f"--metrics: {found.failure}", field="metrics")


def told(options: LoadtestOptions) -> dict[str, Any]:
    """Options for the report, with what their absence means."""
    limits = limits_of(options)
    stated = {**options.told(), "warm_up": limits.warm_up_s}
    if limits.concurrency is not None:
        stated["concurrency"] = limits.concurrency
        stated.pop("arrivals", None)
    if limits.duration_s is not None:
        stated["duration"] = limits.duration_s
    return stated
