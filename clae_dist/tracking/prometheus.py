"""Metrics of a run for Prometheus: text in its exposition format, served by rank 0 over HTTP from the standard library."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from clae_dist.errors import ConfigError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TIMEOUT_S = 10.0  # of a client that sends nothing


@dataclass(frozen=True)
class Family:
    """Samples of one name: label and value of each; one sample without a label has the key ""."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    samples: Mapping[str, float]
    label: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)  # of every sample


def exposition(families: Iterable[Family]) -> str:
    """The families that have samples, as text."""
    lines: list[str] = []
    for family in families:
        if not family.samples:
            continue
        lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}"]
        for key, value in family.samples.items():
            labels = {**family.labels, **({family.label: key} if family.label else {})}
            text = ",".join(f'{name}="{_escaped(label)}"' for name, label in labels.items())
            lines.append(f"{family.name}{{{text}}} {value!r}" if text else f"{family.name} {value!r}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


class MetricsServer:
    """Serves /metrics until it is closed. `families` is called by threads of the server, once for each request."""

    def __init__(self, host: str, port: int, families: Callable[[], Iterable[Family]]) -> None:
        """Raises ConfigError if the address cannot be used."""

        class Handler(BaseHTTPRequestHandler):
            timeout = _TIMEOUT_S

            def do_GET(self) -> None:
                if self.path.partition("?")[0] not in ("/", "/metrics"):
                    self.send_error(404)
                    return
                body = exposition(families()).encode()
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *values: object) -> None:
                """Requests are not the run's console."""

        try:
            self._server = _Server((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"tracking.prometheus is {port} and tracking.prometheus_host is {host!r}, where rank 0 cannot listen "
                f"({reason}); use another port, or 0 to switch it off."
            ) from None
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no concern of the run."""
