"""The load generator, its report and the plots, against a server of a few lines that keeps to a timetable."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import plot
import serving
from serving_load import Answer, Level, Quantiles

FIRST, GAP = 0.05, 0.02
"""Seconds that the server takes for a first token and for each after it."""

SLACK = 3
"""Seconds by which a busy machine may be late."""


class Timetable(BaseHTTPRequestHandler):
    """Answers as MAX does, on time; prompts of 13 tokens with an error, of 14 within the stream, of 15 too short."""

    bodies: list[dict[str, Any]]
    running: int
    most_running: int
    lock = threading.Lock()

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.answer(200, json.dumps({"data": [{"id": "fake"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = type(self)
        with self.lock:
            server.bodies.append(body)
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        self.stream(body)
        with self.lock:
            server.running -= 1

    def stream(self, body: dict[str, Any]) -> None:
        length = len(body["prompt"])
        if length == 13:
            return self.answer(503, b"busy")
        self.answer(200, b"")
        count = body["max_tokens"] - (length == 15)
        for index in range(count):
            time.sleep(GAP if index else FIRST)
            self.event({"error": {"message": "x"}} if length == 14 else {"choices": [{"text": "x"}], "usage": None})
        self.event({"choices": [], "usage": {"completion_tokens": count}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, content: dict[str, Any]) -> None:
        data = f"data: {json.dumps(content)}\n\n".encode()
        self.wfile.write(data[:9])  # events may come in pieces
        self.wfile.flush()
        self.wfile.write(data[9:])
        self.wfile.flush()

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    Timetable.bodies, Timetable.running, Timetable.most_running = [], 0, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Timetable) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def forward(tmp_path: Path) -> Path:
    """A result of `forward.py` with a decode step of 16 ms for a batch of 3."""
    rows = [
        {"batch_size": size, "new_tokens": new, "seconds": {"median": seconds}}
        for size, new, seconds in ((1, 64, 9.0), (3, 1, 0.016), (8, 1, 0.1))
    ]
    path = tmp_path / "forward.json"
    path.write_text(json.dumps({"environment": {"command": "python forward.py mid"}, "results": rows}))
    return path


def test_a_run_reports_the_timetable_and_what_serving_costs(
    address: str, forward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "run.json", tmp_path / "run.png"
    options = [
        "--clients",
        "1,3",
        "--rounds",
        "2",
        "--least",
        "6",
        "--rates",
        "40",
        "--arrivals",
        "5",
        "--prompt-tokens",
        "6",
    ]
    options += ["--new-tokens", "4", "--token-ids", "50", "--forward", str(forward), "--server", "by hand"]
    serving.main([address, *options, "--json", str(file), "--plot", str(picture)])

    content = json.loads(file.read_text())
    assert (content["benchmark"], content["model"], content["server"]) == ("serving", "fake", "by hand")
    assert {"date", "command", "cpu", "versions"} <= content["environment"].keys()
    levels = content["levels"]
    assert [(level["clients"], level["rate"], level["requests"]) for level in levels] == [
        (1, None, 6),
        (3, None, 6),
        (None, 40.0, 5),
    ]
    for level in levels:
        assert level["errors"] == {}
        assert FIRST <= level["first_token"]["p50"] < FIRST + SLACK
        assert 0 < level["token_gap"]["p50"] < GAP + SLACK
        assert level["token_gap"]["count"] == 3 * level["requests"]
        assert 0 < level["per_token"]["p50"] <= level["per_token"]["p99"] <= level["per_token"]["maximum"]
        assert FIRST + 3 * GAP <= level["whole"]["p50"] < FIRST + 3 * GAP + SLACK
        assert level["tokens_per_second"] == pytest.approx(4 * level["requests"] / level["seconds"])
    assert 6 * (FIRST + 3 * GAP) <= levels[0]["seconds"] < 6 * (FIRST + 3 * GAP + SLACK)

    (overhead,) = content["overhead"]
    assert (overhead["clients"], overhead["step_seconds"]) == (3, 0.016)
    assert overhead["share"] == pytest.approx(levels[1]["token_gap"]["p50"] / 0.016 - 1)
    assert content["forward"] == "python forward.py mid"

    assert len(Timetable.bodies) == 6 * 1 + 1 + 2 * 3 + 3 + 5
    assert all(len(body["prompt"]) == 6 and max(body["prompt"]) < 50 for body in Timetable.bodies)
    assert len({tuple(body["prompt"]) for body in Timetable.bodies}) == len(Timetable.bodies)
    assert Timetable.most_running >= 3
    table = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in table[-7:-4]] == ["1 clients", "3 clients", "40 a second"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("length", "error"), [(13, "status 503"), (14, "error within the stream"), (15, "3 tokens of 4")]
)
def test_failed_requests_are_counted_by_what_was_wrong_and_end_the_run_with_status_1(
    address: str, length: int, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.json"
    options = ["--clients", "2", "--rounds", "1", "--least", "2", "--prompt-tokens", str(length), "--new-tokens", "4"]
    with pytest.raises(SystemExit) as exit_info:
        serving.main([address, *options, "--json", str(file), "--plot", str(file.with_suffix(".png"))])
    assert exit_info.value.code == 1
    (level,) = json.loads(file.read_text())["levels"]
    assert level["errors"] == {error: 2}
    assert (level["requests"], level["tokens_per_second"], level["first_token"]) == (2, 0.0, None)
    assert f"2 clients: 2 × {error}" in capsys.readouterr().out


def test_a_level_takes_its_times_from_whole_answers_only() -> None:
    answers = [
        Answer(due=10.0, arrivals=[11.0, 12.0, 15.0], tokens=3),
        Answer(due=10.5, arrivals=[12.5], tokens=1),
        Answer(due=0.0, arrivals=[90.0], error="status 500"),
    ]
    level = Level.of(answers, 2, None)
    assert (level.seconds, level.tokens_per_second, level.errors) == (5.0, 0.8, {"status 500": 1})
    assert level.first_token == Quantiles(1.5, 1.95, 1.99, 2.0, 2)
    assert level.per_token == Quantiles(2.0, 2.0, 2.0, 2.0, 1)
    assert level.token_gap is not None
    assert (level.token_gap.p50, level.token_gap.count) == (2.0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://127.0.0.1:9"], "ADDRESS: found no server at http://127.0.0.1:9"),
        (["nowhere"], "ADDRESS: found no server at nowhere"),
        (["{address}", "--clients", "0"], "argument --clients: found '0'"),
        (["{address}", "--rates", "-1"], "argument --rates: found '-1'"),
        (["{address}", "--forward", "{folder}/absent"], "--forward {folder}/absent: found no result of forward.py"),
        (["{address}", "--plot", "x.png"], "--plot: found no --json"),
    ],
)
def test_an_unusable_argument_is_one_line_and_status_2(
    arguments: list[str], message: str, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        serving.main([argument.format(address=address, folder=tmp_path) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("serving.py: error: " + message.format(folder=tmp_path))


def test_every_committed_result_can_be_drawn(tmp_path: Path) -> None:
    results = sorted(filter(plot.is_drawn, plot.RESULTS.glob("*.json")))
    assert results
    for source in results:
        target = tmp_path / f"{source.stem}.png"
        plot.draw(source, target)
        assert target.read_bytes().startswith(b"\x89PNG")


def test_drawing_goes_on_after_a_file_that_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"a": 1}')
    good = tmp_path / "good.json"
    good.write_bytes((plot.RESULTS / "forward-mid-cpu.json").read_bytes())
    assert plot.main([str(tmp_path / "broken.json"), str(tmp_path / "other.json"), str(good)]) == 1
    output = capsys.readouterr()
    assert output.out.splitlines() == [str(good.with_suffix(".png"))]
    broken, other = output.err.splitlines()
    assert broken.startswith(f"plot.py: error: {tmp_path}/broken.json: found no JSON")
    assert other.startswith(f"plot.py: error: {tmp_path}/other.json: found benchmark None, expected one of forward")
