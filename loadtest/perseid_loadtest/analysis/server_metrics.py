"""What the server counted during a run: the difference of two scrapes of its /metrics.

Perseid's and vLLM's names are known. A metric that is not there is left out; a server without /metrics has no figures.
"""

import math
import os
import ssl
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit, urlunsplit

from prometheus_client.parser import text_string_to_metric_families

from perseid_loadtest.analysis.scraped import Difference, HistogramFigures, Scrape
from perseid_server.errors import InvalidRequest

TIMEOUT_S = 5.0
MAX_BYTES = 64 * 2**20
"""Of a scrape; more is not read."""
ABSENT = {404, 405, 410, 501}  # llama-server without --metrics answers 501


@dataclass(frozen=True, slots=True)
class ServerFigures:
    """By the server's own clock and counters, over the run; None: not told. Gauges are those at its end."""

    ttft: HistogramFigures | None = None  # arrival at the server to first token
    itl: HistogramFigures | None = None
    tpot: HistogramFigures | None = None
    e2e: HistogramFigures | None = None
    queue: HistogramFigures | None = None  # arrival in the engine to first scheduling
    prompt_tokens: float | None = None
    generation_tokens: float | None = None
    prefix_cache_hit_ratio: float | None = None  # prompt tokens found ÷ looked up
    lora_cache_hit_ratio: float | None = None  # requests whose adapter was on the device already
    draft_acceptance: float | None = None  # drafted tokens that came true ÷ drafted
    preemptions: float | None = None
    engine_restarts: float | None = None
    kv_usage: float | None = None  # 0 to 1, at the end
    running: float | None = None  # requests, at the end
    waiting: float | None = None  # requests, at the end


def scrape(url: str, api_key: str | None = None, tls: ssl.SSLContext | None = None) -> Scrape:
    """The samples of a server's /metrics, or why there are none.

    `url` is the server's (http://host:8000, with /v1 or without) or that of its /metrics. InvalidRequest where it is no
    HTTP URL. What is not finite is left out.
    """
    url = metrics_url(url)
    request = urllib.request.Request(url)  # noqa: S310  http or https, checked there
    if api_key is not None:
        request.add_unredirected_header("Authorization", f"Bearer {api_key}")  # not for whom a redirect names
    try:
        with _opener(tls).open(request, timeout=TIMEOUT_S) as answer:
            found = samples(answer.read(MAX_BYTES).decode())
    except HTTPError as error:
        error.close()
        wants = "; it wants a --metrics-key that may read them (an operator's)" if error.code in {401, 403} else ""
        return Scrape(failure=f"{url} answers HTTP {error.code}{wants}", is_absent=error.code in ABSENT)
    except ValueError:
        return Scrape(failure=f"{url} answers nothing in Prometheus' text format")
    except (OSError, HTTPException) as error:
        return Scrape(failure=f"{url}: {_reason(error)}")
    return Scrape(found) if found else Scrape(failure=f"{url} holds no metric", is_absent=True)


def _opener(tls: ssl.SSLContext | None) -> urllib.request.OpenerDirector:
    """Without the environment's proxies, as the traffic is."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls))


def _reason(error: Exception) -> str:
    """Why nothing came."""
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({cause.verify_message}); --ca names the certificates to trust"
    if isinstance(cause, ssl.SSLEOFError) or "CERTIFICATE_REQUIRED" in (getattr(cause, "reason", None) or ""):
        return "it ended the TLS connection; where it asks for a certificate, --client-cert names the one to show"
    if isinstance(cause, TimeoutError):
        return f"no answer within {TIMEOUT_S:g} s"
    if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ssl.SSLError):
        return os.strerror(cause.errno).lower()
    return str(cause) or type(cause).__name__


def metrics_url(url: str) -> str:
    """Where a server has its /metrics."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InvalidRequest(f"{url!r} is no URL to ask for metrics; expected http://HOST:PORT", field="metrics")
    path = parts.path.rstrip("/")
    if not path.endswith("/metrics"):
        path = path.removesuffix("/v1") + "/metrics"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))


def samples(text: str) -> dict[str, float]:
    """Prometheus' text format as name{labels} → value. ValueError on any other format."""
    return {
        _key(sample.name, sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if math.isfinite(sample.value)
    }


def server_figures(before: Mapping[str, float], after: Mapping[str, float]) -> ServerFigures:
    """All that both scrapes tell. Nothing where one of them failed: a difference to nothing would be since the start of
    the server, not of the run."""
    if not before or not after:
        return ServerFigures()
    told = Difference(before, after)
    return ServerFigures(
        ttft=told.histogram("time_to_first_token_seconds"),
        itl=told.histogram("inter_token_latency_seconds", "time_per_output_token_seconds"),  # the latter: older vLLM
        tpot=told.histogram("request_time_per_output_token_seconds"),
        e2e=told.histogram("e2e_request_latency_seconds"),
        queue=told.histogram("request_queue_time_seconds"),
        prompt_tokens=told.counter("prompt_tokens_total"),
        generation_tokens=told.counter("generation_tokens_total"),
        prefix_cache_hit_ratio=told.share("prefix_cache_hits_total", "prefix_cache_queries_total"),
        lora_cache_hit_ratio=told.share("lora_cache_hits_total", "lora_cache_lookups_total"),
        draft_acceptance=told.share("spec_decode_num_accepted_tokens_total", "spec_decode_num_draft_tokens_total"),
        preemptions=told.counter("num_preemptions_total"),
        engine_restarts=told.counter("engine_restarts_total"),
        kv_usage=told.gauge_mean("kv_cache_usage_perc", "gpu_cache_usage_perc"),
        running=told.gauge_sum("num_requests_running"),
        waiting=told.gauge_sum("num_requests_waiting"),
    )


def _key(name: str, labels: Mapping[str, str]) -> str:
    if not labels:
        return name
    escaped = {
        label: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for label, value in labels.items()
    }
    return name + "{" + ",".join(f'{label}="{value}"' for label, value in sorted(escaped.items())) + "}"
