"""Two scrapes: what counters and histograms took on between them, and servers that have none."""

import http.server
import socket
import ssl
import threading
from contextlib import contextmanager
from urllib.error import URLError

import pytest
import trustme

from perseid_loadtest.analysis import server_metrics
from perseid_loadtest.analysis.scraped import Scrape, quantile, untold
from perseid_loadtest.analysis.server_metrics import ServerFigures, metrics_url, samples, scrape, server_figures
from perseid_server.errors import InvalidRequest

TEXT = """# TYPE perseid_num_preemptions counter
perseid_num_preemptions_total 3
# TYPE perseid_info gauge
perseid_info{b="x",a="say \\"le\\", {now}"} 1
perseid_broken NaN
"""


def histogram(name, counts, total, labels=""):
    told = {f'{name}_bucket{{{labels}le="{upper}"}}': float(count) for upper, count in counts.items()}
    return told | {f"{name}_sum{{{labels.rstrip(',')}}}" if labels else f"{name}_sum": total}


@contextmanager
def server(answer, status=200, tls: ssl.SSLContext | None = None):
    """Answers everything with the text; keeps paths and headers."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    listening = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        listening.socket = tls.wrap_socket(listening.socket, server_side=True)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{listening.server_port}", seen
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


def test_a_scrape_is_its_samples():
    with server(TEXT.encode()) as (url, seen):
        found = scrape(f"{url}/v1", "secret")
    assert found == Scrape({"perseid_num_preemptions_total": 3.0, 'perseid_info{a="say \\"le\\", {now}",b="x"}': 1.0})
    assert seen == [("/metrics", "Bearer secret")]


@pytest.mark.parametrize("answer", [b"<html>no</html>", b"\xff\xfe"])
def test_another_answer_is_no_figures_and_says_so(answer):
    with server(answer) as (url, _):
        found = scrape(url)
    assert found == Scrape(failure=f"{url}/metrics answers nothing in Prometheus' text format")


@pytest.mark.parametrize("status", [404, 501])
def test_no_such_route_is_a_server_without_metrics(status):
    with server(TEXT.encode(), status=status) as (url, _):
        found = scrape(url)
    assert found == Scrape(failure=f"{url}/metrics answers HTTP {status}", is_absent=True)


def test_nothing_to_read_is_a_server_without_metrics():
    with server(b"") as (url, _):
        assert scrape(url).is_absent


@pytest.mark.parametrize("status", [401, 403])
def test_metrics_that_want_another_key_say_so(status):
    with server(b"", status=status) as (url, _):
        found = scrape(url, "secret")
    assert (found.samples, found.is_absent) == ({}, False)
    assert f"HTTP {status}; it wants a --metrics-key that may read them" in (found.failure or "")


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{unused_tcp_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr("urllib.request._opener", None)  # which would keep what the environment said before
    with server(TEXT.encode()) as (url, _):
        assert scrape(url).failure is None


def test_no_server_is_told(unused_tcp_port: int):
    url = f"http://127.0.0.1:{unused_tcp_port}"
    assert scrape(url) == Scrape(failure=f"{url}/metrics: connection refused")


def test_no_answer_in_time_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_metrics, "TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        found = scrape(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert (found.failure or "").endswith("/metrics: no answer within 0.05 s")


def test_a_private_authority_is_trusted_where_it_is_named():
    authority, serving = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(serving)
    trusting = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    with server(TEXT.encode(), tls=serving) as (url, _):
        found, refused = scrape(url, tls=trusting), scrape(url)
    assert found.samples["perseid_num_preemptions_total"] == 3.0
    assert "its certificate is not trusted" in (refused.failure or "")
    assert "--ca" in (refused.failure or "")


def test_an_end_for_want_of_a_certificate_names_the_option():
    alert = ssl.SSLError(1, "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required")
    alert.reason = "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    for error in (alert, URLError(alert), ssl.SSLEOFError(8, "EOF occurred in violation of protocol")):
        assert "--client-cert names the one to show" in server_metrics._reason(error)


READ, NONE, FAILED = Scrape({"a": 1.0}), Scrape(failure="404", is_absent=True), Scrape(failure="timeout")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (Scrape(), Scrape(), None), (READ, READ, None), (NONE, NONE, None), (FAILED, READ, "timeout"),
        (READ, FAILED, "timeout"), (NONE, FAILED, "404"), (READ, NONE, "404"),
    ],
)  # fmt: skip
def test_figures_that_fail_say_why_and_those_that_are_not_there_do_not(before, after, said):
    assert untold(before, after) == said


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:1", "http://h:1/metrics"),
        ("http://h:1/v1/", "http://h:1/metrics"),
        ("https://h/behind/v1", "https://h/behind/metrics"),
        ("http://h:1/metrics", "http://h:1/metrics"),
    ],
)
def test_where_metrics_are(url, expected):
    assert metrics_url(url) == expected


@pytest.mark.parametrize("url", ["file:///etc/passwd", "grpc://h:1", "h:1", ""])
def test_what_is_no_http_url_is_refused(url):
    with pytest.raises(InvalidRequest, match="expected http://HOST:PORT"):
        scrape(url)


@pytest.mark.parametrize("prefix", ["perseid_", "vllm:"])
def test_differences_of_both_servers_names(prefix):
    before = {f"{prefix}prefix_cache_hits_total": 10.0, f"{prefix}prefix_cache_queries_total": 100.0}
    after = {
        f"{prefix}prefix_cache_hits_total": 40.0,
        f"{prefix}prefix_cache_queries_total": 150.0,
        f"{prefix}num_preemptions_total": 2.0,
        f'{prefix}kv_cache_usage_perc{{engine="0"}}': 0.2,
        f'{prefix}kv_cache_usage_perc{{engine="1"}}': 0.6,
        f'{prefix}num_requests_running{{engine="0"}}': 3.0,
        f'{prefix}num_requests_running{{engine="1"}}': 4.0,
    }
    found = server_figures(before, after)
    assert (found.prefix_cache_hit_ratio, found.preemptions, found.running) == (0.6, 2.0, 7.0)
    assert found.kv_usage == pytest.approx(0.4)
    assert (found.waiting, found.ttft, found.lora_cache_hit_ratio) == (None, None, None)


def test_a_histogram_is_of_the_run_alone():
    name = "perseid_time_to_first_token_seconds"
    before = histogram(name, {"0.1": 50, "0.5": 50, "+Inf": 50}, 5.0)
    after = histogram(name, {"0.1": 50, "0.5": 58, "+Inf": 60}, 9.0)
    found = server_figures(before, after).ttft
    assert (found.count, found.mean) == (10, pytest.approx(0.4))
    assert found.p50 == pytest.approx(0.1 + 0.4 * 5 / 8)
    assert (found.p90, found.p99) == (0.5, 0.5)  # beyond the last bound


def test_histograms_are_summed_over_labels_and_older_names_are_known():
    name = "vllm:time_per_output_token_seconds"
    one = histogram(name, {"0.1": 4, "+Inf": 4}, 0.2, 'engine="0",')
    other = histogram(name, {"0.1": 0, "+Inf": 4}, 0.6, 'engine="1",')
    found = server_figures({"x": 1.0}, one | other).itl
    assert (found.count, found.mean) == (8, pytest.approx(0.1))
    assert found.p50 == pytest.approx(0.1)


def test_a_restart_sets_counters_back():
    found = server_figures({"perseid_num_preemptions_total": 9.0}, {"perseid_num_preemptions_total": 2.0})
    assert found.preemptions == 2.0


def test_nothing_observed_and_one_scrape_alone_tell_nothing():
    name = "perseid_time_to_first_token_seconds"
    same = histogram(name, {"0.1": 5, "+Inf": 5}, 5.0)
    assert server_figures(same, same).ttft is None
    assert server_figures({}, same) == server_figures(same, {}) == ServerFigures()


def test_a_quantile_beyond_every_bound_of_one_bucket_is_none():
    assert quantile([(float("inf"), 3.0)], 0.5) is None


def test_a_label_cannot_pass_for_a_bound():
    text = 'perseid_time_to_first_token_seconds_bucket{adapter=",le=\\"9\\"",le="0.5"} 4\n'
    found = server_figures({"x": 1.0}, samples(text)).ttft
    assert found.p50 == pytest.approx(0.25)
