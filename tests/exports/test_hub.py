"""A run read from the hub's cache, laid out by hand, and uploaded to a server that speaks the calls of huggingface_hub."""
import base64, http.server, json, threading

import peft, pytest, torch
from conftest import command, fingerprint, in_hub_cache, one_line
from transformers import AutoModelForCausalLM

import eval as evaluation, export, port
from bases import load_base
from eval import adapters_of
from runtime.files import read_json
from tasks.rows import load_tasks

A, B = "a" * 40, "b" * 40
PORT = "--to ./base-c --n 4 --epochs 1 --batch-size 2".split()


def test_a_run_on_the_hub_is_ported_in_out(trained, world, hub_cache, capsys):
    """Its cache stays as it is. Once the branch has moved on, the copy is not taken for it."""
    trained.rename(world / "published")
    snapshot = in_hub_cache(hub_cache, world / "published", "Org/My.Run", A)
    before = fingerprint(snapshot)
    assert command(port, "--run", "Org/My.Run@main", *PORT) == 0
    run = world / "out" / "My.Run"
    assert (run / "converters" / "base-c.json").exists() and fingerprint(snapshot) == before
    assert read_json(run / "portal.json") == {**read_json(snapshot / "portal.json"), "hub": {"id": "Org/My.Run", "commit": A}}
    assert not any(path.is_symlink() for path in run.rglob("*"))
    in_hub_cache(hub_cache, world / "published", "Org/My.Run", B)
    def fails(spec, *words):
        capsys.readouterr()
        assert command(evaluation, "--run", spec, "--bases", "base-c", "--methods", "base,portal") == 2
        one_line(capsys, words)
    fails("Org/My.Run", f"out/My.Run is not Org/My.Run at {B} but at {A}", "--run out/My.Run goes on with it")
    fails("Other/My.Run", "Other/My.Run is no folder, and could not be loaded")
    for spec in (f"Org/My.Run@{A}", "out/My.Run"):                                   # with the port that it has there
        assert command(evaluation, "--run", spec, "--bases", "base-c", "--methods", "base,portal") == 0
    in_hub_cache(hub_cache, world / "base-a", "Org/model", A)
    fails("Org/model", "Org/model on the hub is neither a run", "nor a portallib artifact")
    (world / "published" / "portal.json").write_text("{}")
    in_hub_cache(hub_cache, world / "published", "Org/broken", A)
    fails("Org/broken", "not a PorTAL configuration")
    assert not (world / "out" / "broken").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories in memory: create, the card's check, the list of files, upload modes, a commit."""
    repos, protocol_version = {}, "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, value, code=200):
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.headers.get("Authorization") != "Bearer right":
            return self.reply({"error": "Invalid username or password."}, 401)
        files = self.repos["/".join(self.path.split("/")[3:5])]
        self.reply([dict(type="file", path=name, oid="0", size=len(text)) for name, text in files.items()])

    def do_POST(self):
        if "Content-Length" in self.headers:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        else:                                                                        # in chunks
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        url = f"http://{self.headers['Host']}/"
        if self.headers.get("Authorization") != "Bearer right":
            self.reply({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            sent = json.loads(body)
            name = f"{sent['organization']}/{sent['name']}"
            made = name not in self.repos
            assert sent.get("private") or sent["visibility"] == "private"
            self.repos.setdefault(name, {"converters/of-an-earlier-run.json": b"", "theirs.txt": b""})
            self.reply({"url": url + name}, 200 if made else 409)
        elif self.path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            self.reply({"files": [dict(path=file["path"], uploadMode="regular", shouldIgnore=False) for file in json.loads(body)["files"]]})
        elif "/commit/" in self.path:
            files = self.repos["/".join(self.path.split("/")[3:5])]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del files[line["value"]["path"]]
            self.reply({"success": True, "commitOid": A, "commitUrl": f"{url}x/y/commit/{A}", "hookOutput": ""})


@pytest.fixture
def hub(monkeypatch):
    """{repository: {path: bytes}} of a hub on 127.0.0.1."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "right")
    monkeypatch.setattr(Hub, "repos", {})
    yield Hub.repos
    server.shutdown()
    server.server_close()


def lay(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    return folder


def test_a_run_is_uploaded_and_read_again(trained, world, hub, capsys, monkeypatch):
    (trained / "notes.txt").write_text("mine"), (trained / ".git").mkdir(), (trained / ".resume").mkdir()
    (trained / ".resume" / "port.json").write_text("{}")
    assert command(export, "--push", "Org/run") == 0
    files = dict(hub["Org/run"])
    ours = {name: (trained / name).read_bytes() for name in fingerprint(trained) if name not in ("notes.txt", ".resume/port.json")}
    assert {name: text for name, text in files.items() if name != "README.md"} == {**ours, "theirs.txt": b""}
    card = files["README.md"].decode()
    assert "one, three, two" in card and "python port.py --run Org/run" in card and str(world) not in card
    assert "| base-a | a local folder | - | yes | 8 |" in card and "base_model" not in card
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world / "cache"))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        in_hub_cache(world / "cache", lay(world / "pushed", files), "Org/again", A)
        assert command(export, "--run", "Org/again", "--to", "base-b", "--task", "one", "--out", "x") == 0
    assert command(export, "--run", trained, "--to", "base-b", "--task", "one", "--out", "y") == 0
    assert (world / "x/adapter_model.safetensors").read_bytes() == (world / "y/adapter_model.safetensors").read_bytes()
    monkeypatch.setenv("HF_TOKEN", "wrong")
    capsys.readouterr()
    assert command(export, "--run", trained, "--push", "Org/other") == 2
    one_line(capsys, ["Org/other: not uploaded to the hub", "401", "hf auth login"])
    for flags, words in ((["--push", "run"], ["--push", "org/name"]), (["--push", "Org/x", "--out", "y"], ["--out does not go with --push"]),
                         (["--push", "Org/x", "--task", "one"], ["--task does not go with --push"])):
        assert command(export, "--run", trained, *flags) == 2
        one_line(capsys, words)


def test_peft_folders_are_uploaded(trained, world, hub):
    assert command(export, "--push", "Org/loras", "--to", "base-a") == 0
    assert command(export, "--push", "Org/lora", "--to", "base-a", "--task", "two") == 0
    lay(world / "loras", hub["Org/loras"]), lay(world / "lora", hub["Org/lora"])
    adapters, tasks = adapters_of(trained, "portal", "base-a", load_base("./base-a")), list(load_tasks(world / "data"))
    for task, folder in (("one", "loras/one"), ("two", "loras/two"), ("two", "lora")):
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "base-a"), world / folder)
        A = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj.lora_A.default").weight
        assert torch.equal(A, adapters.A["q"][tasks.index(task), 1])
    assert 'PeftModel.from_pretrained(base, "Org/lora")' in (world / "lora" / "README.md").read_text().replace(
        f"AutoModelForCausalLM.from_pretrained('{world / 'base-a'}')", "base")
    assert '"Org/loras", subfolder="one"' in (world / "loras" / "one" / "README.md").read_text()
    assert {name.split("/")[0] for name in hub["Org/loras"]} == {"one", "two", "three", "converters", "theirs.txt"}
