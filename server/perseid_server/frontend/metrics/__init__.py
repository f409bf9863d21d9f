"""What Prometheus scrapes. One file per idea; `Metrics` puts them together."""

from perseid_server.frontend.metrics.adapter_labels import MAX_ADAPTER_LABELS
from perseid_server.frontend.metrics.metrics import CONTENT_TYPE, Metrics
from perseid_server.frontend.metrics.requests import RequestTimer

__all__ = ["CONTENT_TYPE", "MAX_ADAPTER_LABELS", "Metrics", "RequestTimer"]
