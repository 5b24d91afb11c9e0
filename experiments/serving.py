"""Serves the tasks of a run by vLLM, all from one base at once, and compares the log-probabilities with our own.

    python -m experiments.serving --run out/smollm2-135m --to smollm2-135m --venv ~/.cache/portal-vllm

--venv is a Python environment of its own with vLLM in it; docs/inference.md says how it is made. The adapters are
exported as PEFT folders (export.py). Two OpenAI-compatible servers run there, one without LoRA and one with a slot a
task. Every choice of some evaluation rows is scored by score.score and by these two, all tasks at once, each row with
its task's adapter. It is for CPUs, on which vLLM has attention for head sizes 32, 64, 80, 96, 112, 128 and larger.
"""
import contextlib, json, os, pathlib, re, socket, statistics, subprocess, tempfile, time, urllib.request
from concurrent.futures import ThreadPoolExecutor

import torch

import export
from bases import encode, find_base, reload_base
from eval import adapters_of
from experiments.tables import markdown
from experiments.peers import about
from presets import REAL
from runtime.files import ROOT, BadInput, read_json, write_whole
from runtime.flags import parse, run_main
from runtime.run_folder import find_run
from runtime.saved import load_config, provenances
from score import score
from tasks.rows import load_run_tasks, sample

RANKS = 8, 16, 32, 64, 128, 256, 320, 512                   # those that vLLM has room for
WAIT = 900                                                  # seconds in which a server must have started
TOLERANCE = 1e-3                                            # of a choice's log-probability, in float32 on both sides
SETTINGS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind",          # as many threads as torch takes: OMP_NUM_THREADS or all
            "VLLM_CPU_KVCACHE_SPACE": "1",                  # GiB
            "VLLM_NO_USAGE_STATS": "1"}                     # reports nothing to anybody


# ---------------------------------------------------------------------------------------------- there
def reason(log):
    """Returns what a log says about why its process failed: the last line that names an exception, or the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
    named = [line for line in lines if re.search(r"\w(Error|Exception): ", line) and "root cause above" not in line]
    return f"vLLM: {(named or lines)[-1][-300:]} (all that it said: {log})"


@contextlib.contextmanager
def server(venv, name, arguments):
    """Yields (vLLM's version, function from requests (model's or adapter's name, prompt, continuation: token ids)
    to the continuations' log-probabilities) of an OpenAI-compatible server that is asked for all of them at once.
    Raises BadInput if it ends or refuses."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [venv / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server"]
    for key, value in dict(arguments, host="127.0.0.1", port=port).items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        command += [f"--{key.replace('_', '-')}", *map(str, values)]
    log = venv / f"{name}.log"
    def call(path, body=None):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", body and json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)
    def post(request):
        model, prompt, continuation = request
        body = dict(model=model, prompt=prompt + continuation, temperature=0, max_tokens=1, prompt_logprobs=0)
        log_p = call("v1/completions", body)["choices"][0]["prompt_logprobs"]
        return sum(log_p[len(prompt) + i][str(token)]["logprob"] for i, token in enumerate(continuation))
    def ask(requests):
        try:
            with ThreadPoolExecutor(len(requests)) as pool:
                return list(pool.map(post, requests))
        except OSError as error:
            raise BadInput(f"{error}; {reason(log)}")
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=venv,
                                   env={**SETTINGS, "VLLM_CACHE_ROOT": str(venv / "cache"), **os.environ})
    try:
        for _ in range(WAIT):
            with contextlib.suppress(OSError):
                version = call("version")["version"]
                break
            if process.poll() is not None:
                raise BadInput(reason(log))
            time.sleep(1)
        else:
            raise BadInput(f"vLLM has not started after {WAIT} s; {reason(log)}")
        yield version, ask
    finally:
        process.terminate()
        process.wait()


# ---------------------------------------------------------------------------------------------- here
def our_scores(run, spec, data, n):
    """Returns (tasks, items of n evaluation rows a task, the log-probabilities of all their choices: with each row's
    adapter, with none, with the next task's). Raises BadInput if these are too much alike to tell adapters apart."""
    (saved, cfg), held = load_config(run), provenances(run)
    tag = find_base(held, spec, run)
    data = load_run_tasks(saved, pathlib.Path(data or saved["data"] or ROOT / "data"))
    rows = [row for task in cfg.tasks for row in sum(sample(data[task]["eval"], n, 0), [])]
    base = reload_base(held[tag], "cpu", torch.float32)
    items, adapters = encode(base.tokenizer, rows, cfg.tasks)[0], adapters_of(run, "portal", tag, base)
    shifted = [item._replace(task=(item.task + 1) % len(cfg.tasks)) for item in items]
    own, bare, other = ([log_p for row in score(base, used, asked, REAL["max_tokens"]) for log_p in row]
                        for used, asked in ((adapters, items), (None, items), (adapters, shifted)))
    least = min([difference(own, bare), difference(own, other)][:len(cfg.tasks)])    # one task: there is no other
    if least < 10 * TOLERANCE:
        raise BadInput(f"{run}: another adapter or none changes the log-probabilities by {least:.1e} in the median, "
                       f"less than {10 * TOLERANCE}: to take one for another would not be noticed; train for longer")
    return cfg.tasks, items, own, bare, other


def difference(a, b):
    return statistics.median(abs(x - y) for x, y in zip(a, b, strict=True))


def compare(label, found, expected):
    """Returns a row of the table. Raises BadInput if a log-probability is further from ours than TOLERANCE."""
    apart = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    wrong = [x for x in apart if not x <= TOLERANCE]                                 # nan, too
    if wrong:
        raise BadInput(f"{label}: {len(wrong)} of {len(apart)} log-probabilities are further than {TOLERANCE} from "
                       f"ours, the first by {wrong[0]:.1e}")
    return {"served": label, "choices": len(found), "furthest from score.score": f"{max(apart):.1e}"}


def measure(venv, folder, tasks, items, own, bare):
    """Returns (vLLM's version, rows of the table) of the adapters in `folder`."""
    lora = read_json(folder / tasks[0] / "adapter_config.json")
    longest = max(len(item.prompt) + max(map(len, item.continuations)) for item in items) + 1
    common = dict(model=lora["base_model_name_or_path"], dtype="float32", max_model_len=longest,
                  no_enable_prefix_caching=True)                                     # all of a prompt is computed
    common |= {"revision": lora["revision"]} if lora["revision"] else {}
    rank = max([lora["r"], *lora.get("rank_pattern", {}).values()])
    # vLLM would give lm_head a LoRA, too, of zeros, and no log-probabilities of prompts go with it.
    slots = dict(enable_lora=True, max_loras=len(tasks),
                 max_lora_rank=min([r for r in RANKS if r >= rank], default=rank),
                 lora_target_modules=sorted({path.split(".")[-1] for path in lora["target_modules"]}),
                 lora_modules=[f"{task}={folder / task}" for task in tasks])
    asked = [(tasks[item.task], item.prompt, c) for item in items for c in item.continuations]
    bare_asked = [(common["model"], *rest) for _, *rest in asked]
    with server(venv, "bare", common) as (version, ask_plain), server(venv, "lora", common | slots) as (_, ask_lora):
        return version, [compare("bare base, server without LoRA", ask_plain(bare_asked), bare),
                         compare(f"{len(tasks)} adapters", ask_lora(asked), own)]


def main(argv=None):
    args = parse(__doc__, "run to data eval-rows venv out", argv,
                 to=dict(type=str, metavar="BASE", required=True, help="the base to serve, one that the run holds"),
                 data=dict(help="the folder of tasks (default: the one that the run was trained on)"),
                 eval_rows=dict(default=2, help="evaluation rows a task"),
                 venv=dict(type=pathlib.Path, default=pathlib.Path("~/.cache/portal-vllm"), metavar="DIR",
                           help="vLLM's Python environment, which also gets its cache and logs"),
                 out=dict(type=pathlib.Path, default=ROOT / "results", metavar="DIR", help="where the table goes"))
    run, venv = find_run(args.run), args.venv.expanduser().resolve()
    if not (venv / "bin" / "python").exists():
        raise BadInput(f"--venv: {venv} holds no Python environment; docs/inference.md says how one with vLLM is made")
    tasks, items, own, bare, other = our_scores(run, args.to, args.data, args.eval_rows)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder, "adapters")
        export.main(["--run", str(run), "--to", args.to, "--task", "all", "--out", str(folder)])
        version, same = measure(venv, folder, tasks, items, own, bare)
    text = ["# Adapters served by vLLM", "", *about("experiments.serving"),
            f"- {len(tasks)} adapters of {pathlib.Path(args.to).name}, vLLM {version}, float32", "",
            "Log-probabilities of choices, the rows of all tasks at once. Without an adapter they differ by "
            f"{difference(own, bare):.2f} in the median, with the next task's by {difference(own, other):.2f}.", "",
            *markdown(same), ""]
    write_whole(args.out / "serving.md", lambda path: path.write_text("\n".join(text)))
    print("\n".join(text), f"table: {args.out / 'serving.md'}", sep="\n")


if __name__ == "__main__":
    run_main(main)
