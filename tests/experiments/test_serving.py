"""experiments/serving.py without vLLM: a stand-in that holds PEFT's models, or a small HTTP server, answers as vLLM's does."""
import contextlib, os, sys, textwrap

import peft
import pytest
import torch
from conftest import command
from transformers import AutoModelForCausalLM

import export
from experiments import serving
from experiments.serving import compare
from runtime.files import BadInput
from runtime.saved import load_portal, save_portal


@pytest.fixture
def far(trained):
    """A run whose adapters differ from each other and from none by far more than rounding does."""
    portal = load_portal(trained, ["base-a"])
    torch.manual_seed(0)
    for p in [portal.z, *portal.core.parameters(), *portal.converters["base-a"].parameters()]:
        torch.nn.init.normal_(p, std=0.3)
    save_portal(trained, portal)
    return trained


@torch.no_grad()
def peft_log_p(folder, name, ids):
    """log p of each token of `ids` but the first, by PEFT with the exported adapter `name` (None: the bare base)."""
    model = AutoModelForCausalLM.from_pretrained("base-a")
    if name:
        model = peft.PeftModel.from_pretrained(model, os.path.join(folder, name))
    log_p = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(log_p[i, token]) for i, token in enumerate(ids[1:])]


def test_every_row_has_its_tasks_adapter(far, tmp_path):
    """Our scores, with each row's adapter, none, or another, against PEFT's with what export.py wrote."""
    assert command(export, "--run", far, "--to", "base-a", "--task", "all", "--out", tmp_path / "adapters") == 0
    tasks, items, own, bare, other = serving.our_scores(far, "base-a", None, 2)
    assert tasks == ["one", "three", "two"] and [item.task for item in items] == [0, 0, 1, 1, 2, 2]
    following = dict(zip(tasks, tasks[1:] + tasks[:1]), **{"": None})
    for name_of, expected in ((str, own), (lambda task: None, bare), (following.get, other)):
        found = [sum(peft_log_p(tmp_path / "adapters", name_of(tasks[item.task]), item.prompt + c)[len(item.prompt) - 1:])
                 for item in items for c in item.continuations]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_command(far, tmp_path, monkeypatch, capsys, wrong):
    @contextlib.contextmanager
    def server(venv, name, arguments):
        if name == "lora":
            assert arguments["enable_lora"] is True and arguments["max_loras"] == 3 and arguments["max_lora_rank"] == 8
            assert arguments["lora_target_modules"] == ["q_proj", "v_proj"]
        folders = dict(text.split("=") for text in arguments.get("lora_modules", ()))
        def answer(model, prompt, c):
            folder = folders[model] if model in folders else None                    # else the bare base
            assert folder or model == arguments["model"]
            folder = folder and (os.path.join(os.path.dirname(folder), "two") if wrong else folder)
            return sum(peft_log_p(*os.path.split(folder) if folder else (None, None), prompt + c)[len(prompt) - 1:])
        yield "1", lambda requests: [answer(*request) for request in requests]
    monkeypatch.setattr(serving, "server", server)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    assert command(serving, "--run", far, "--to", "base-a", "--venv", tmp_path / "venv") == 2        # no python there
    assert "docs/inference.md" in capsys.readouterr().err
    (tmp_path / "venv" / "bin" / "python").touch()
    code = command(serving, "--run", far, "--to", "base-a", "--venv", tmp_path / "venv", "--out", tmp_path / "tables")
    if wrong:
        assert code == 2 and "error: 3 adapters:" in capsys.readouterr().err
        assert not (tmp_path / "tables").exists()
        return
    text = (tmp_path / "tables" / "serving.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert code == 0 and rows == ["served", "bare base, server without LoRA", "3 adapters"]
    assert str(tmp_path) not in text


def test_adapters_too_much_alike_are_refused(trained):
    portal = load_portal(trained, ["base-a"])
    for P_out in portal.converters["base-a"].P_out.values():
        P_out.data.mul_(1e-4)
    save_portal(trained, portal)
    with pytest.raises(BadInput, match="would not be noticed"):
        serving.our_scores(trained, "base-a", None, 2)


def fake_python(venv, code):
    """A folder whose bin/python runs `code` whatever it is asked to run."""
    (venv / "bin").mkdir(parents=True)
    (venv / "code.py").write_text(textwrap.dedent(code))
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} {venv / "code.py"} "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    return venv


SERVER = """
    import http.server, json, sys
    flags = sys.argv
    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self, text):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())
        def do_GET(self):
            self.reply({"/version": '{"version": "9"}'}[self.path])
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            adapters = [text.split("=")[0] for text in flags[flags.index("--lora-modules") + 1:]]
            shift = 1000 * adapters.index(asked["model"])
            ids = asked["prompt"]
            assert asked["temperature"] == 0 and asked["prompt_logprobs"] == 0 and "--enable-lora" in flags
            log_p = [None] + [{str(t): {"logprob": shift + 10 * i + t}, "7": {}} for i, t in enumerate(ids)][1:]
            self.reply(json.dumps({"choices": [{"prompt_logprobs": log_p}]}))
    http.server.ThreadingHTTPServer(("127.0.0.1", int(flags[flags.index("--port") + 1])), Handler).serve_forever()
"""


def test_the_server_is_asked_for_each_rows_adapter(tmp_path):
    venv = fake_python(tmp_path / "venv", SERVER)
    arguments = dict(model="some/base", enable_lora=True, max_loras=2, lora_target_modules=["q_proj", "v_proj"],
                     lora_modules=["one=a", "two=b"])
    with serving.server(venv, "lora", arguments) as (version, ask):
        assert version == "9"
        assert ask([("two", [1, 2, 3], [4, 5]), ("one", [1], [6])]) == [1000 + 30 + 4 + 1000 + 40 + 5, 10 + 6]
    with pytest.raises(BadInput, match="refused"):                                   # the process has ended
        ask([("one", [1], [6])])


def test_a_process_that_ends_says_why(tmp_path):
    dies = "import sys; print('ValueError: head size 20', file=sys.stderr); print('more of it'); sys.exit(1)"
    with pytest.raises(BadInput, match="ValueError: head size 20"):
        with serving.server(fake_python(tmp_path / "venv", dies), "bare", {"model": "some/base"}):
            pass


def test_a_difference_is_refused():
    assert list(compare("x", [1.0, -2.0], [1.0, -2.0 + 1e-5]).values()) == ["x", 2, "1.0e-05"]
    for wrong in (-2.1, float("nan")):
        with pytest.raises(BadInput, match="^x: "):
            compare("x", [1.0, wrong], [1.0, -2.0])
    with pytest.raises(ValueError):
        compare("x", [1.0], [1.0, 2.0])
