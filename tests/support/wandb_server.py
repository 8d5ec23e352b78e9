"""A stand-in for the W&B server, on the loopback interface, with faults on demand.

It answers only what the client of wandb 0.31 asks for when a run starts, logs, alerts
and finishes; what it does not know it notes in ``unknown`` and answers with an error.
"""

import contextlib
import gzip
import json
import re
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

_KEY = "0" * 40  # the client refuses shorter ones
_OPERATION = re.compile(r"\b(?:query|mutation)\s+(\w+)")
_STREAM = re.compile(r"/files/[^/]+/[^/]+/([^/]+)/file_stream")
_METRIC_FIELDS = {"name": "1", "glob": "2", "step_index": "5"}  # MetricRecord's numbers


@dataclass
class ServedRun:
    """What arrived of one run."""

    config: dict = field(default_factory=dict)
    files: dict = field(default_factory=lambda: defaultdict(dict))
    complete: bool = False

    def _lines(self, name):
        lines = self.files[name]
        return [json.loads(lines[n]) for n in sorted(lines)]

    @property
    def history(self):
        """The rows, in order."""
        return self._lines("wandb-history.jsonl")

    @property
    def summary(self):
        """The last summary."""
        return (self._lines("wandb-summary.json") or [{}])[-1]

    @property
    def metrics(self):
        """Defined metric or glob -> its step metric, or None."""
        raw = self.config.get("_wandb", {}).get("value", {}).get("m", [])
        found = [{k: m.get(n) for k, n in _METRIC_FIELDS.items()} for m in raw]
        names = [m["name"] or m["glob"] for m in found]
        return {
            name: names[m["step_index"] - 1] if m["step_index"] else None
            for name, m in zip(names, found, strict=True)
        }


class WandbServer:
    """Serves on a free port as long as the context lasts.

    Attributes:
        runs: Run id -> what arrived of it.
        alerts: The alerts that arrived, in order.
        uploads: Name of a file of a run -> its content.
        views: The saved views that arrived.
        unknown: What was asked for and is not known here.
    """

    def __init__(self):
        self.runs = defaultdict(ServedRun)
        self.alerts = []
        self.uploads = {}
        self.views = []
        self.unknown = []
        self._changed = threading.Condition()
        self._faults = {}
        self._healed = threading.Event()
        self._port = 0
        self._http = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc):
        self.stop()

    def start(self):
        """Serve; for a second time on the same port again."""
        handler = type("Handler", (_Handler,), {"server_of_wandb": self})
        self._http = _Quiet(("127.0.0.1", self._port), handler)
        self._port = self._http.server_address[1]
        threading.Thread(
            target=self._http.serve_forever, args=(0.02,), daemon=True
        ).start()

    def stop(self):
        """Refuse connections from now on."""
        self._healed.set()
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self):
        """The variables by which a client finds this server and no other."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": _KEY,
            "WANDB_MODE": "online",
            "WANDB_ERROR_REPORTING": "false",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def fail(self, how, *operations):
        """Answer with the HTTP status ``how``, or with nothing for ``"hang"``.

        Args:
            how: The status, or ``"hang"``.
            operations: GraphQL operations, ``file_stream`` or, if none, everything.
        """
        self._healed.clear()
        self._faults.update(dict.fromkeys(operations or ("*",), how))

    def heal(self):
        """Answer again, after :meth:`fail` or :meth:`stop`."""
        self._faults.clear()
        self._healed.set()
        if self._http is None:
            self.start()

    def wait_for(self, predicate, timeout=10.0):
        """Wait until ``predicate()`` holds; return what it returned last."""
        with self._changed:
            return self._changed.wait_for(predicate, timeout)

    def answer(self, method, path, body):
        """Return the status and the JSON for one request."""
        stream = _STREAM.fullmatch(path)
        if path == "/graphql":
            request = json.loads(body)
            operation = request.get("operationName")
            if not operation:
                operation = _OPERATION.search(request["query"])[1]
        else:
            operation = "file_stream" if stream else f"{method} {path}"
        if fault := self._faults.get(operation, self._faults.get("*")):
            if fault == "hang":
                self._healed.wait(60)
            return (503 if fault == "hang" else fault), {"error": "on demand"}
        with self._changed:
            self._changed.notify_all()
            if stream:
                self._take_files(stream[1], json.loads(body or b"{}"))
                return 200, {}
            if path.startswith("/upload/"):
                self.uploads[path.removeprefix("/upload/")] = body
                return 200, {}
            if path.startswith("/sdk/otel/"):  # telemetry
                return 200, {}
            reply = getattr(self, f"_{operation}", None)
            if reply is None:
                self.unknown.append(operation)
                # Not an empty "data": that ends the client with a segmentation fault.
                return 200, {"errors": [{"message": f"no {operation} here"}]}
            return 200, {"data": reply(request.get("variables") or {})}

    def _take_files(self, run_id, request):
        run = self.runs[run_id]
        for name, chunk in (request.get("files") or {}).items():
            for n, line in enumerate(chunk["content"], chunk["offset"]):
                run.files[name][n] = line
        run.complete |= bool(request.get("complete"))

    def _Viewer(self, asked):
        return {"viewer": {"entity": "me", "username": "me", "flags": "{}"}}

    def _ServerFeaturesQuery(self, asked):
        return {"serverInfo": {"features": []}}

    def _RunStoppedStatus(self, asked):
        return {"project": {"run": {"stopped": False}}}

    def _UpsertBucket(self, asked):
        name = asked.get("name") or asked["id"].removeprefix("id-")
        fresh = name not in self.runs
        if asked.get("config"):
            self.runs[name].config = json.loads(asked["config"])
        project = {"name": "project", "entity": {"name": "me"}}
        bucket = {"id": f"id-{name}", "name": name, "project": project}
        return {"upsertBucket": {"bucket": bucket, "inserted": fresh}}

    def _CreateRunFiles(self, asked):
        files = [
            {"name": n, "uploadUrl": f"{self.url}/upload/{n}"} for n in asked["files"]
        ]
        return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}

    def _UpsertView2(self, asked):
        self.views.append(asked)
        view = {"id": "id-view", "name": asked["name"]}
        return {"upsertView": {"view": view, "inserted": True}}

    def _NotifyScriptableRunAlert(self, asked):
        self.alerts.append(asked)
        return {"notifyScriptableRunAlert": {"success": True}}


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Say nothing of a client that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Say nothing."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        path = urlsplit(self.path).path
        status, answer = self.server_of_wandb.answer(self.command, path, body)
        data = json.dumps(answer).encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    do_GET = do_PUT = do_POST
