"""The metrics of a run for Prometheus, which reads them over HTTP.

    python -m pretrain ... --run.monitor.prometheus_port 9464
    curl -s http://127.0.0.1:9464/metrics

    priorclip_train_loss{run="rs5m-b32"} 3.21                  the name in metrics.jsonl, with _ for /
    priorclip_data_skipped_total{run=...,reason="image"} 4
    priorclip_rank_own_seconds{run=...,rank="5",host="node-b"} 0.31
    priorclip_record_timestamp_seconds{run=...} 1.76e9         does not change if the run hangs: worth an alert

Rank 0 serves the metrics of all ranks, so that a run has one address. A request computes nothing.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from priorclip.common.output import get_logger
from priorclip.training.config import MonitorConfig
from priorclip.training.monitoring.measure import RankMetrics

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

logger = get_logger(__name__)

SKIPPED = "data/skipped/"
BYTES_PER_GB = 1e9


def open_endpoint(monitor: MonitorConfig, run: str, serves: bool) -> Endpoint | None:
    """Opens the endpoint on the rank that serves it, if one is configured. A port in use does not end the run.

    Raises:
        ValueError: the library is not installed; raised on every rank
    """
    if monitor.prometheus_port is None:
        return None
    if find_spec("prometheus_client") is None:
        raise ValueError(
            "run.monitor.prometheus_port needs prometheus_client: pip install 'priorclip-pretraining[prometheus]', or"
            " set it to null"
        )
    if not serves:
        return None
    try:
        return Endpoint(monitor.prometheus_port, monitor.prometheus_address, run)
    except OSError as error:
        logger.warning(
            "no Prometheus endpoint: cannot listen on %s port %d (%s); the run continues without it. Set"
            " run.monitor.prometheus_port to a free port, or run.monitor.prometheus_address to an address of this host",
            monitor.prometheus_address, monitor.prometheus_port, error.strerror or error,
        )  # fmt: skip
        return None


class Endpoint:
    """A server in its own thread. Each record replaces its answer as a whole."""

    def __init__(self, port: int, address: str, run: str) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self.run = run
        self.values: dict[str, Any] = {}
        self.ranks: Sequence[RankMetrics] = ()
        self.updated = time.time()
        self.lock = threading.Lock()
        registry = CollectorRegistry()
        registry.register(self)  # type: ignore[arg-type]
        self.server, self.thread = start_http_server(port, address, registry)
        logger.info("Prometheus endpoint: http://%s:%d/metrics", address, self.server.server_port)

    def update(self, step: int, values: Mapping[str, Any], ranks: Sequence[RankMetrics]) -> None:
        """Sets the metrics of a step. Metrics that this record does not have keep their values."""
        with self.lock:
            self.values |= {"step": step, **values}
            self.ranks = ranks or self.ranks
            self.updated = time.time()

    def collect(self) -> Iterator[Metric]:
        """prometheus_client calls this at each scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        with self.lock:
            values, ranks, updated = dict(self.values), self.ranks, self.updated
        skipped = CounterMetricFamily("priorclip_data_skipped", "Bad samples by reason.", labels=["run", "reason"])
        for name, value in values.items():
            if not isinstance(value, int | float):
                continue
            if name.startswith(SKIPPED):
                skipped.add_metric([self.run, name.removeprefix(SKIPPED)], value)
            elif name != SKIPPED.rstrip("/"):
                yield self._gauge(GaugeMetricFamily, name, value)
        yield skipped
        yield self._gauge(GaugeMetricFamily, "record_timestamp_seconds", updated)
        for name, by_rank in rank_metrics(ranks).items():
            family = GaugeMetricFamily(
                f"priorclip_rank_{name}", f"{name} of each rank.", labels=["run", "rank", "host"]
            )
            for number, value in enumerate(by_rank):
                family.add_metric([self.run, str(number), ranks[number].host], value)
            yield family

    def _gauge(self, family: type, name: str, value: float) -> Any:
        gauge = family(f"priorclip_{prometheus_name(name)}", f"{name} of metrics.jsonl.", labels=["run"])
        gauge.add_metric([self.run], value if math.isfinite(value) else math.nan)
        return gauge

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def rank_metrics(ranks: Sequence[RankMetrics]) -> dict[str, list[float]]:
    """Metric name -> value of each rank."""
    if not ranks:
        return {}
    metrics = {
        "own_seconds": [rank.own_seconds for rank in ranks],
        "data_wait_seconds": [rank.wait_seconds for rank in ranks],
    }
    for name in ranks[0].memory:
        metrics[f"{name.removesuffix('_gb')}_bytes"] = [rank.memory[name] * BYTES_PER_GB for rank in ranks]
    return metrics


def prometheus_name(name: str) -> str:
    """``train/loss`` -> ``train_loss``."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", name)
