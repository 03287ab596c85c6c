"""Requests that a server's own OpenAPI allows, and many that it does not: whether it stays whole.

    python benchmarks/serving_fuzz.py MODEL --requests 10000

starts `fourfold serve MODEL` and sends it requests that schemathesis makes of `/openapi.json`: half of them of that
form, half not. Of each five one is then damaged as bytes, or its client hangs up in the middle. Several are on their
way at a time. Answers must be what the OpenAPI says; none may be a fault of the server. Every so often a greedy request
of known answer is among them, and must be answered as before. At the end no slot may be taken. What was found goes into
`benchmarks/results/serving_fuzz.json`; the script fails if anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks

RESULTS = Path(__file__).parent / "results" / "serving_fuzz.json"
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
# So many requests between two whose answer is known.
RHYTHM = 50
MOST_ON_THE_WAY = 4


class Fuzz:
    """Sends requests and notes what came of them.

    Args:
        url: The server's.
        models: Names of its models, one of which most requests are given, so that they reach the engine.
        concurrency: Requests on their way at a time.
    """

    def __init__(self, url: str, models: list[str], concurrency: int) -> None:
        self.url = url
        self.models = models
        self.concurrency = concurrency
        self.statuses: Counter[str] = Counter()
        self.failures: list[str] = []
        self.num_sent = 0
        self._lock = threading.Lock()
        self._own = threading.local()
        self._slots = threading.Semaphore(concurrency * MOST_ON_THE_WAY)
        self._known = self._control()

    def run(self, num_requests: int, chosen_seed: int = 0) -> None:
        """Send so many, spread over the endpoints and both kinds."""
        schema = schemathesis.openapi.from_url(f"{self.url}/openapi.json")
        modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        strategies = []
        for result in schema.get_all_operations():
            operation = result.ok()
            is_post = operation.method.upper() == "POST"
            for mode in modes:
                try:
                    strategy = operation.as_strategy(generation_mode=mode)
                    strategy.validate()
                except Exception:
                    continue  # there is nothing to be wrong about
                # Endpoints that answer without a body are asked less.
                strategies += [strategy] * (8 if is_post else 1)
        draw = random.Random(chosen_seed)
        with ThreadPoolExecutor(self.concurrency) as pool:

            @seed(chosen_seed)
            @settings(
                max_examples=num_requests,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=st.one_of(strategies))
            def send(case: schemathesis.Case) -> None:
                if self.num_sent >= num_requests:
                    return
                self.num_sent += 1
                if isinstance(case.body, dict) and draw.random() < 0.8:
                    case.body["model"] = draw.choice(self.models)
                self._slots.acquire()
                kind = draw.random()
                is_raw = kind < 0.2 and isinstance(case.body, (dict, list, str))
                task = self._send_damaged if is_raw else self._send
                pool.submit(self._noting, task, case, draw.getrandbits(32))
                if self.num_sent % RHYTHM == 0:
                    self._slots.acquire()
                    pool.submit(self._noting, self._check_control, None, 0)

            while self.num_sent < num_requests:
                send()

    def _noting(self, task: Any, case: Any, number: int) -> None:
        try:
            status = task(case, number)
            with self._lock:
                self.statuses[str(status)] += 1
        except BaseException as error:
            with self._lock:
                self.failures.append(f"{type(error).__name__}: {error}"[:2000])
        finally:
            self._slots.release()

    def _send(self, case: schemathesis.Case, _: int) -> int:
        if not hasattr(self._own, "session"):
            self._own.session = requests.Session()
        response = case.call(base_url=self.url, session=self._own.session, timeout=60)
        case.validate_response(response, checks=CHECKS)
        return response.status_code

    def _send_damaged(self, case: schemathesis.Case, number: int) -> str:
        """Bytes that are no JSON any more, or a client that is gone before it is answered."""
        draw = random.Random(number)
        try:
            body = bytearray(json.dumps(case.body).encode())
        except (TypeError, ValueError):
            return "not sent"
        leaves = draw.random() < 0.5
        for _ in range(0 if leaves else draw.randint(1, 8)):
            body[draw.randrange(len(body))] = draw.randrange(256)
        told = len(body) + draw.choice((0, 0, 0, 7))
        with socket.create_connection(("127.0.0.1", httpx2.URL(self.url).port), timeout=60) as connection:
            head = f"POST {case.operation.path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {told}\r\n"
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + bytes(body))
            if leaves or told > len(body):
                time.sleep(draw.random() * 0.05)
                return "left"
            status = int(connection.recv(12)[9:12])
            assert status < 500, f"{status} to {bytes(body)[:500]!r}"
            return str(status)

    def _control(self) -> str:
        body = {"model": self.models[0], "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        for _ in range(200):
            response = httpx2.post(f"{self.url}/v1/completions", json=body, timeout=60)
            if response.status_code != 429:
                break
            time.sleep(0.1)  # what many wait for is waited for by this, too
        assert response.status_code == 200, response.text
        text: str = response.json()["choices"][0]["text"]
        return text

    def _check_control(self, _: Any, __: int) -> str:
        text = self._control()
        assert text == self._known, f"{text!r} instead of {self._known!r}"
        return "known"

    def end(self) -> None:
        """Notes slots and places that are still taken after a while, and a server that does not answer as before."""
        deadline = time.monotonic() + 30
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if left:
            self.failures.append(f"still taken at the end: {left}")
        self._noting_control()

    def _noting_control(self) -> None:
        try:
            self._check_control(None, 0)
        except BaseException as error:
            self.failures.append(f"at the end: {error}")

    def _left(self) -> dict[str, float]:
        text = httpx2.get(f"{self.url}/metrics", timeout=60).text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        taken = {name: float(values[name]) for name in ("fourfold_running", "fourfold_waiting")}
        live = httpx2.get(f"{self.url}/health", timeout=60).json()["live"]
        return {name: value for name, value in (taken | {"live": live}).items() if value}


@contextmanager
def serving(model: str, *words: str) -> Iterator[tuple[str, list[str], int]]:
    """URL, models and process of a `fourfold serve` that ends with the block."""
    command = [sys.executable, "-m", "fourfold", "serve", model, "--port", "0", "--json", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        try:
            yield said["url"], said["models"], process.pid
        finally:
            process.terminate()
            process.wait(60)


def resident_bytes(process: int) -> int:
    pages = Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    limits = ("--max-length", "256", "--max-tokens", "16", "--max-choices", "4", "--max-waiting", "64")
    with serving(words.model, *limits) as (url, models, process):
        fuzz = Fuzz(url, models, words.concurrency)
        before, began = resident_bytes(process), time.monotonic()
        with contextlib.suppress(KeyboardInterrupt):  # what was sent until then is recorded
            fuzz.run(words.requests, words.seed)
        fuzz.end()
        seconds, after = time.monotonic() - began, resident_bytes(process)
    packages = ("fourfold", "torch", "transformers", "fastapi", "starlette", "uvicorn", "llguidance", "schemathesis")
    record = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/serving_fuzz.py MODEL --requests {words.requests} --seed {words.seed}",
        "model": Path(words.model).name,
        "versions": {name: version(name) for name in packages},
        "requests": fuzz.num_sent,
        "seed": words.seed,
        "concurrency": words.concurrency,
        "seconds": round(seconds, 1),
        "answers": dict(sorted(fuzz.statuses.items())),
        "failures": fuzz.failures[:20],
        "num_failures": len(fuzz.failures),
        "resident_mib": {"before": round(before / 2**20), "after": round(after / 2**20)},
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))
    if fuzz.failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
