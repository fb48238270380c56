"""`tip-exp push` against a stand-in of the hub's HTTP API: a repository, its files, and what is refused."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import HfApi, constants
from tests import synthetic_runs

from tip_exp.config.parse import load
from tip_exp.config.schema import RunConfig
from tip_exp.launch.push import push
from tip_exp.records.folder import RunFolder
from tip_exp.records.result import model_card

Printed = pytest.CaptureFixture[str]
TOKEN = "hf_write"


class Hub:
    """Repositories by name, each file -> content; `fields`: the header of the last card that was checked."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: list[str] = []
        self.fields: dict[str, Any] = {}

    def answer(self, path: str, token: str | None, body: bytes) -> tuple[int, Any]:
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization'] or 'me'}/{asked['name']}"
            if repo in self.repos:
                return 409, {"error": "You already created this model repo", "url": self.address(repo)}
            self.repos[repo] = {}
            self.private += [repo] if asked.get("visibility") == "private" else []
            return 200, {"url": self.address(repo), "name": repo}
        if path == "/api/validate-yaml":
            self.fields = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return 200, {"errors": [], "warnings": []}
        repo, _, action = path.removeprefix("/api/models/").partition("/main")[0].rpartition("/")
        if action == "preupload":
            files = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        assert action == "commit", path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return 200, {"commitUrl": self.address(repo) + "/commit/0", "commitOid": "0", "success": True}

    def address(self, repo: str) -> str:
        return f"{constants.ENDPOINT}/{repo}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, answer = hub.answer(self.path, self.headers.get("Authorization"), body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=address))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(tmp_path: Path, compose_run: Callable[..., RunConfig]) -> RunFolder:
    """A finished run beside the run on all tokens, with a model of two small files."""
    for selector in ("full", "q3"):
        config, root = compose_run(f"selector={selector}", f"name={selector}"), tmp_path / "sweep" / selector
        synthetic_runs.write_config(config, root)
        synthetic_runs.finish(config, root, 0.8 if selector == "full" else 0.7)
    run = RunFolder(root)
    (run.model / "adapter").mkdir(parents=True)
    (run.model / "config.json").write_text("{}")
    (run.model / "adapter" / "weights.safetensors").write_bytes(bytes(range(256)))
    run.card.write_text(model_card(config, json.loads(run.result.read_text())))
    return run


def refused(capsys: Printed, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        push(list(arguments))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_run_is_pushed_as_one_commit_with_its_row_of_the_table(hub: Hub, run: RunFolder, capsys: Printed) -> None:
    push([str(run.root), "org/q3", "--private"])
    assert f"is at {hub.address('org/q3')}" in capsys.readouterr().out
    files = hub.repos["org/q3"]
    assert hub.private == ["org/q3"] and sorted(files) == ["README.md", "adapter/weights.safetensors", "config.json"]
    assert files["adapter/weights.safetensors"] == bytes(range(256))
    text = files["README.md"].decode()
    (row,) = [line for line in text.splitlines() if line.startswith("| q3 ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["q3", "10 %"] and "70.0" in row and "-10.0 [" in row  # 70 % against 80 % on all tokens
    assert "retention: 0.1" in text and "torch 2.13.0" in text
    assert f"Config digest {json.loads(run.result.read_text())['digest']}" in text
    assert hub.fields == {"library_name": "transformers", "tags": ["on-policy-distillation", "tip_exp"]}


def test_an_existing_repository_is_left_alone_unless_told(hub: Hub, run: RunFolder, capsys: Printed) -> None:
    push([str(run.root)])
    assert list(hub.repos) == ["me/q3"]
    before = dict(hub.repos["me/q3"])
    (run.model / "config.json").write_text('{"new": 1}')
    assert "q3 exists on the hub; name another repository, or add --update" in refused(capsys, str(run.root))
    assert hub.repos["me/q3"] == before
    push([str(run.root), "--update"])
    assert hub.repos["me/q3"]["config.json"] == b'{"new": 1}'


def test_what_cannot_be_pushed_says_why(
    hub: Hub, run: RunFolder, capsys: Printed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    assert "q3: the token may not write there: " in refused(capsys, str(run.root))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    assert "set HF_TOKEN, or run `hf auth login`" in refused(capsys, str(run.root))
    full = run.root.parent / "full"
    assert "full has no trained model" in refused(capsys, str(full))
    (full / "result.json").unlink()
    assert "full holds no finished run (result.json)" in refused(capsys, str(full))
    assert hub.repos == {}


def test_dry_prints_the_card_and_uploads_nothing(hub: Hub, run: RunFolder, capsys: Printed) -> None:
    config, twin = load(run.config), run.root.parent / "a_twin"  # of the same seed, and found first
    synthetic_runs.write_config(config, twin)
    synthetic_runs.finish(config, twin, 0.1)
    push([str(run.root), "--dry"])
    assert "| q3 " in capsys.readouterr().out and hub.repos == {}


def test_the_base_model_stays_in_the_card_if_the_hub_has_it(hub: Hub, run: RunFolder) -> None:
    path = run.model / "README.md"
    path.write_text(path.read_text().replace("base_model: package:tiny/student", "base_model: Qwen/Qwen3-4B"))
    push([str(run.root)])
    assert hub.fields["base_model"] == "Qwen/Qwen3-4B"
