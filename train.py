"""Source training: latents, core and one converter a base, learned together on frozen bases.

    python train.py                                        the embedded toy, CPU
    python train.py --bases qwen3-1.7b,qwen3-4b --data data
    python train.py --dry-run                              what that would take in memory and time
    python train.py --add-task DIR                         one more task for a run, core and converters frozen

One round is `batch_size` rows of every task on every base. Adapters are generated once a round; micro-batches that mix
the rows of all tasks leave their gradients on A and B; one backward pass takes those through the generator.
"""
import contextlib, datetime, resource, shutil, time
from types import SimpleNamespace

import torch, transformers
import torch.nn.functional as F
from tqdm import tqdm

from bases import load_base, reload_base, short_name, short_names
from cli import (OUT, ROOT, TOY_SEEN, TOY_UNSEEN, BadInput, append_jsonl, beside, find_run, lock, new_folder, occupied,
                 out_of_memory, parse, read_json, run_main, today, write_json, write_whole)
from data import Cycle, Item, collate, encode, load_tasks, micro_batches, sample, to_device
from dist import NO_BAR, RANK, share, total
from eval import evaluate, full_precision, macro
from portal import (Config, Converter, Portal, load_config, load_portal, load_tensors, provenances, save_portal,
                    save_tensors)
from resume import State, digest, forget, unbroken

# The write-up's numbers for real bases (appendix A); the toy's own, chosen on rows held out of its train split. An epoch is
# a pass over the largest task, and has `least` rounds at the least: on a few rows a pass alone would teach nothing.
REAL = dict(n=2000, epochs=5, batch_size=4, lr=1e-3, least=1, max_tokens=4096, sizes={},
            port=dict(n=1000, epochs=5, batch_size=4, lr=1e-3, least=1, max_tokens=4096),
            lora=dict(epochs=5, batch_size=4, lr=1e-4, least=1, max_tokens=4096))
TOY = dict(n=1000, epochs=4, batch_size=8, lr=1e-3, least=28, max_tokens=4096,
           sizes=dict(d_z=64, hidden=256, d_c=256, gain=1.0),
           port=dict(n=1000, epochs=6, batch_size=8, lr=3e-3, least=112, max_tokens=4096),
           lora=dict(epochs=2, batch_size=8, lr=3e-3, least=112, max_tokens=4096),
           lora_iso=dict(epochs=6, batch_size=8, lr=3e-3, least=112, max_tokens=4096))


def preset(names):
    """The settings for bases of these short names."""
    return TOY if set(names) <= {*TOY_SEEN, *TOY_UNSEEN} else REAL


def chosen(args, default):
    """The preset's settings, but for those that were given as flags."""
    return {k: getattr(args, k, None) or v for k, v in default.items() if not isinstance(v, dict)}


# ---------------------------------------------------------------------------------------------- one round
def task_gradients(base, adapters, items, max_tokens):
    """Losses and gradients of all tasks at once, on one base.

    The loss of task t is the NLL of the gold continuation, averaged over that task's answer tokens in `items`. A row
    touches only its own task's slice of A and B, so the sum over tasks is differentiated in one go and row t of each
    gradient is still task t's alone; what weighs a task is applied there, after the fact. Several processes (dist.py)
    share the rows; each counts the answer tokens of all of them, so the shares' losses and gradients are summands.

    -> losses [T], gradients of adapters.tensors() ([T, L, ...] each)
    """
    leaf = adapters.map(lambda a: a.detach().requires_grad_())
    tokens = torch.zeros(len(leaf.tensors()[0]))                                     # [T] answer tokens of each task
    for item in items:
        tokens[item.task] += len(item.continuations[0])
    assert all(len(item.continuations) == 1 for item in items), "training takes the gold continuation alone"
    tokens = to_device(tokens, base.device)
    losses = torch.zeros_like(tokens)
    for part in micro_batches(share(items), max_tokens):
        batch = collate(part, base.device)
        logits = full_precision(base.logits(batch, leaf))                            # [M, vocabulary]
        task = batch.task[batch.row]                                                 # [M]
        nll = F.cross_entropy(logits, batch.target, reduction="none") / tokens[task]
        nll.sum().backward()
        losses.index_add_(0, task, nll.detach().float())
    gradients = [torch.zeros_like(a) if a.grad is None else a.grad for a in leaf.tensors()]  # None: no row was left for us
    return total(losses), [total(g) for g in gradients]


def balance(gradients):
    """Rescale each base's gradient on z to the mean norm and add them up (section 4, multi-base training)."""
    norms = torch.stack([g.norm() for g in gradients])
    return sum(g * (norms.mean() / norm.clamp(min=1e-12)) for g, norm in zip(gradients, norms))


class EMA:
    """Running mean of each task's loss on one base, 0.9 / 0.1, the first value as it is; never below 1e-3 as a divisor."""

    def __init__(self):
        self.mean = None

    def weights(self, losses):
        """Take in this round's losses [T]; -> what each task's gradient is multiplied by, [T]."""
        self.mean = losses.clone() if self.mean is None else 0.9 * self.mean + 0.1 * losses
        return 1 / self.mean.clamp(min=1e-3)


# ---------------------------------------------------------------------------------------------- many rounds
class Learner:
    """Parameters that are optimised and selected together, and the tasks they learn from. PorTAL is one learner; T
    per-task LoRAs are T of them, which only share their forward passes. `groups`: [{"params", "lr"}], as in torch."""

    def __init__(self, groups, tasks, rounds, epochs):
        self.tasks, self.rounds, self.score, self.epoch, self.best = tasks, rounds, None, 0, None
        self.params = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        total = rounds * epochs
        warm = max(1, total // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(                           # 10% warm-up, then linear to zero
            self.optimizer, lambda k: min((k + 1) / warm, (total - k) / max(1, total - warm)))

    def step(self):
        torch.nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self.optimizer.step()
        self.schedule.step()

    def select(self, epoch, score):
        """Keep this epoch's parameters if its held-out score, (acc_norm, -log_loss), is the best so far; None: always."""
        if self.best is None or score is None or score > self.score:
            self.score, self.epoch, self.best = score, epoch, [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def load_best(self):
        for p, best in zip(self.params, self.best):
            p.copy_(best)

    def state(self):
        """-> ({name: tensor}, the rest), from which `restore` makes an equal learner."""
        tensors = {f"{k}.parameter": p for k, p in enumerate(self.params)}
        tensors.update({f"{k}.best": p for k, p in enumerate(self.best or [])})
        for k, p in enumerate(self.params):                                          # exp_avg, exp_avg_sq, step; before the
            own = self.optimizer.state.get(p, {})                                    # first step there are none
            tensors.update({f"{k}.{name}": t for name, t in own.items()})
        return tensors, dict(score=self.score, epoch=self.epoch, steps=self.schedule.last_epoch,
                             rates=[group["lr"] for group in self.optimizer.param_groups])

    @torch.no_grad()
    def restore(self, tensors, rest):
        self.epoch, self.schedule.last_epoch = rest["epoch"], rest["steps"]
        self.score = rest["score"] and tuple(rest["score"])
        for group, rate in zip(self.optimizer.param_groups, rest["rates"]):
            group["lr"] = rate
        for k, p in enumerate(self.params):
            own = {name.removeprefix(f"{k}."): t.to(p.device) for name, t in tensors.items() if name.startswith(f"{k}.")}
            p.copy_(own.pop("parameter"))
            best = own.pop("best", None)
            self.best = None if best is None else [*(self.best or []), best]
            if own:
                self.optimizer.state[p] = own


def save_states(learners, epochs, save):
    """save(final=True) the last epoch where another was selected for some learner, then save(final=False) the selected."""
    if any(learner.epoch < epochs for learner in learners):
        save(final=True)
    for learner in learners:
        learner.load_best()
    save(final=False)


def one_round(bases, generate, learners, items, max_tokens, running=None, z=None):
    """The gradients of all tasks on all bases, then a step of every learner. items {base name: its rows of this round};
    running {base name: EMA}, if losses are divided by their mean; z: see `fit`. -> losses [bases, T], on the device."""
    z_gradients, losses = [], []
    for base in bases:
        adapters = generate(base.name)
        found, gradients = task_gradients(base, adapters, items[base.name], max_tokens)
        losses.append(found)
        if running:
            weights = running[base.name].weights(found).view(-1, 1, 1, 1)            # [T, 1, 1, 1]
            gradients = [weights * g for g in gradients]
        torch.autograd.backward(adapters.tensors(), gradients)
        if z is not None:                                                            # each base's pull on z, apart
            z_gradients.append(z.grad)
            z.grad = None
    if z is not None:
        z.grad = balance(z_gradients)
    for learner in learners:
        learner.step()
    return torch.stack(losses)


def rounds_of(rows, batch_size, least=1):
    """Rounds of an epoch: a pass over a task's rows, and `least` at the least."""
    return max(least, -(-len(rows) // batch_size))


def identity(what, bases, learners, rows, frozen, settings):
    """A digest of all that the numbers of a fit follow from. Not of the micro-batches' size and the device, which change
    no more than rounding: a fit that ran out of memory may go on with a smaller --max-tokens."""
    facts = [[base.name, base.origin, base.revision, str(base.model.dtype)] for base in bases]
    facts += [[learner.tasks, learner.rounds, learner.schedule.base_lrs] for learner in learners]
    weights = [p for base in bases for p in base.model.parameters()]                 # a folder may hold another model now
    return digest([what, facts, rows, settings], [*weights, *frozen, *(p for learner in learners for p in learner.params)])


@contextlib.contextmanager
def naming_memory(what, bases, done):
    """Out of memory inside: one line that says where, and what to change."""
    for base in bases:
        base.batch = None
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        used = [base for base in bases if base.batch is not None]                    # the last one was at work
        if not out_of_memory(error) or not used:
            raise
        items, ids = used[-1].batch.items, used[-1].batch.ids
        raise BadInput(
            f"{what}: out of memory on base {used[-1].name}, round {done}, in a micro-batch of {ids.shape[0]} rows by "
            f"{ids.shape[1]} tokens of {', '.join(sorted({item.row.task for item in items}))}; try a smaller --max-tokens, "
            "--recompute or --dtype bfloat16; what was saved before is untouched")


def fit(what, bases, generate, learners, rows, *, epochs, batch_size, max_tokens, seed, log, z=None, ema=False, state=None,
        frozen=()):
    """Train `learners` for `epochs` on frozen `bases`; each then holds its last state and, in `best`, the selected one.

    generate(base name) -> Adapters with their graph; rows {task: (train rows, held-out rows)}; z: the parameter on
    which the bases' gradients are balanced, if it is learned; ema: divide each (base, task) loss by its running mean,
    as the write-up does (section 4). No command does: a solved task would then pull as hard as one that is not.
    log: path of log.jsonl. state: path of the file that a killed fit goes on from (resume.py), for the caller to remove;
    frozen: the tensors that `generate` takes and no learner has. -> seconds, those of a killed process included. Raises
    BadInput when a loss is not finite or the memory is full.
    """
    tasks = list(rows)
    cycles, held, cut = {}, {}, 0
    for base in bases:
        for task, (train, _) in rows.items():
            items, n_cut = encode(base.tokenizer, train, tasks, choices="gold")
            cycles[base.name, task], cut = Cycle(items, batch_size, f"{seed}/{base.name}/{task}"), cut + n_cut
        held[base.name] = encode(base.tokenizer, [row for _, h in rows.values() for row in h], tasks)[0]
    if cut:
        print(f"{cut} of {sum(len(c.items) for c in cycles.values())} training prompts were cut from the left")
    def check(losses, on, base, number):
        if not torch.isfinite(losses).all():
            bad = ", ".join(tasks[int(t)] for t in (~torch.isfinite(losses)).nonzero())
            raise BadInput(f"{what}: the {on}loss is not finite on base {base.name}, task {bad}, round {number}; "
                           "try a smaller --lr or --dtype float32, which starts over")

    running = {base.name: EMA() for base in bases} if ema else {}
    per_epoch = max(learner.rounds for learner in learners)
    # Where the fit stands: rounds done, lines of finished epochs; of this epoch: sums, and when (of `seconds`) it began.
    at = SimpleNamespace(done=0, lines=[], loss=0.0, tokens=0, began=0.0, seconds=0.0)
    settings = (epochs, batch_size, seed, ema)
    saved = State(state, what, identity(what, bases, learners, rows, frozen, settings), learners, running, at, log)
    saved.load()
    for learner in learners:
        for task in learner.tasks:
            for base in bases:
                for _ in range(learner.schedule.last_epoch):                         # take the rows that these steps took
                    cycles[base.name, task].next()
    start = time.time() - at.seconds
    bar = tqdm(total=epochs * per_epoch, initial=at.done, desc=what, unit="round", disable=NO_BAR)
    with bar, saved.saved_at_ctrl_c():
        for epoch in range(len(at.lines) + 1, epochs + 1):
            for k in range(at.done - (epoch - 1) * per_epoch, per_epoch):
                with unbroken(), naming_memory(what, bases, at.done + 1):
                    active = [learner for learner in learners if k < learner.rounds]
                    now = [task for learner in active for task in learner.tasks]
                    items = {base.name: [item for task in now for item in cycles[base.name, task].next()] for base in bases}
                    losses = one_round(bases, generate, active, items, max_tokens, running, z)
                    for learner in learners:
                        learner.optimizer.zero_grad()                                # tasks without rows, too: theirs are 0
                    losses = losses.cpu()                                            # [bases, T]; the wait for the device
                    for base, own in zip(bases, losses):
                        check(own, "", base, at.done + 1)
                    round_loss = float(losses.sum()) / len(now) / len(bases)
                    at.done, at.loss, at.seconds = at.done + 1, at.loss + round_loss, time.time() - start
                    at.tokens += sum(item.length() for base in bases for item in items[base.name])
                bar.update()
                bar.set_postfix(loss=f"{round_loss:.3f}", tok_s=int(at.tokens / (at.seconds - at.began)))
                if time.time() > saved.due:
                    saved.save()
            seconds, scores = at.seconds - at.began, {}
            for base in bases:
                with torch.no_grad(), naming_memory(what, bases, at.done):
                    cells = evaluate(base, generate(base.name), held[base.name], max_tokens)
                nll = [cells[t]["log_loss"] if t in cells else 0.0 for t in range(len(tasks))]
                check(torch.tensor(nll), "held-out ", base, at.done)
                scores.update({(base.name, tasks[t]): (cell["acc_norm"], -cell["log_loss"]) for t, cell in cells.items()})
            with unbroken():
                for learner in learners:
                    own = [score for (_, task), score in scores.items() if task in learner.tasks]
                    learner.select(epoch, macro(own) if own else None)
                acc, nll = macro(list(scores.values())) if scores else (None, None)
                record = dict(
                    event="epoch", what=what, bases=[b.name for b in bases], epoch=epoch, loss=at.loss / per_epoch,
                    held_acc_norm=acc, held_log_loss=nll and -nll, seconds=round(seconds, 2),
                    rounds=per_epoch, tokens=at.tokens, tokens_per_s=round(at.tokens / seconds),
                    peak_memory=peak_memory(bases[0].device), date=today())
                at.lines, at.loss, at.tokens, at.began = [*at.lines, record], 0.0, 0, time.time() - start
                at.seconds = at.began
                saved.save()                                                         # before the line: see resume.py
                append_jsonl(log, record)
            held_out = f"held-out acc_norm {acc:.3f}, log_loss {-nll:.3f}" if scores else "nothing held out"
            tqdm.write(f"{what} epoch {epoch}/{epochs}: loss {record['loss']:.3f}, {held_out}, {seconds:.0f} s, "
                       f"{record['tokens_per_s']} tokens/s")
    return at.seconds


def peak_memory(device):
    """Peak bytes: on a GPU since the last call, on a CPU of this process since it started."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------------------------------------- the command
def portal_learner(portal, rows, epochs, batch_size, lr, least=1):
    """One learner for everything that is not frozen: core and converters at lr, z at twice that (appendix A)."""
    modules = [portal.core, *portal.converters.values()]
    groups = [{"params": [p for m in modules for p in m.parameters() if p.requires_grad], "lr": lr}]
    if portal.z.requires_grad:
        groups.append({"params": [portal.z], "lr": 2 * lr})
    return Learner(groups, list(rows), max(rounds_of(train, batch_size, least) for train, _ in rows.values()), epochs)


def dry_run(what, bases, generate, learner, rows, seed, settings, z=None):
    """Say what `fit` would take, from a round of every task's longest rows (they need the most memory, and this warms up),
    the three rounds that `fit` starts with, and the first micro-batch of the held-out rows. Nothing is written."""
    tasks, batch_size, max_tokens, epochs = list(rows), *(settings[k] for k in ("batch_size", "max_tokens", "epochs"))
    def clock():
        if bases[0].device.type == "cuda":
            torch.cuda.synchronize()
        return time.time()

    items = {(base.name, task): encode(base.tokenizer, train, tasks, "gold")[0]
             for base in bases for task, (train, _) in rows.items()}
    cycles = {key: Cycle(own, batch_size, "/".join([str(seed), *key])) for key, own in items.items()}
    longest = {key: sorted(own, key=Item.length)[-batch_size:] for key, own in items.items()}
    times = []
    for k in range(4):
        batch = {key: cycle.next() if k else longest[key] for key, cycle in cycles.items()}
        start = clock()
        one_round(bases, generate, [learner], {base.name: [item for task in tasks for item in batch[base.name, task]]
                                               for base in bases}, max_tokens, None, z)
        learner.optimizer.zero_grad()
        times.append(clock() - start)
    scoring = 0.0
    for base in bases:
        held = encode(base.tokenizer, [row for _, h in rows.values() for row in h], tasks)[0]
        for part in micro_batches(held, max_tokens)[:1]:
            start = clock()
            with torch.no_grad():
                evaluate(base, generate(base.name), part, max_tokens)
            scoring += (clock() - start) * sum(map(Item.length, held)) / sum(map(Item.length, part))
    rounds, seconds = learner.rounds * epochs, sum(times[1:]) / 3
    total = datetime.timedelta(seconds=round(rounds * seconds + epochs * scoring))
    print(f"{what}, dry run: {rounds} rounds of {seconds:.2f} s and {epochs} evaluations of {scoring:.1f} s on held-out "
          f"rows, {total} in all; peak memory {peak_memory(bases[0].device) / 2 ** 30:.2f} GiB; nothing was written")


def add_task(args):
    """Learn one more task on bases of the run: a new latent, and nothing else. What decodes it is there already, on every
    base. Without --bases it is fitted on those that the core was trained on; ported ones then give no data for it.

    It starts at the mean of the latents that the core was trained with: the core has seen nothing but these, and their
    mean is a point among them. Nothing is drawn, so the start does not depend on the seed.
    """
    for flag in ("data", "tasks", "modules", "rank", "norm"):
        if getattr(args, flag):
            raise BadInput(f"--{flag} does not go with --add-task: the run has it already, and DIR is the task")
    run, folder = find_run(args.run), args.add_task.resolve()
    saved, cfg = load_config(run)
    task, added, seen = folder.name, saved.get("added", {}), {b["base"]: b for b in saved["bases"]}
    if not all((folder / f"{split}.jsonl").is_file() for split in ("train", "eval")):
        raise BadInput(f"--add-task: {args.add_task} is not a task, which is a folder with train.jsonl and eval.jsonl")
    if task in cfg.tasks and task not in added:
        raise BadInput(f"{run}: the core was trained with a task {task!r}; another one needs another name, its folder's")
    if task in added and not (args.overwrite or args.dry_run):
        raise BadInput(f"{run} has learned {task!r} already; --overwrite learns it again")
    held = seen | {tag: p for tag, p in provenances(run).items() if tag == p["base"]}  # not the smaller samples of a sweep
    names = list(dict.fromkeys(map(short_name, args.bases or seen)))
    if not names or not set(names) <= set(held):
        raise BadInput(f"--bases: {run} has converters of {', '.join(held) or 'none'}; a task is added on some of these")
    settings = chosen(args, preset(names))
    seed = (saved["seed"] or 0) if args.seed is None else args.seed
    rows = {task: sample(load_tasks(folder.parent, [task])[task]["train"], settings["n"], seed)}
    bases = [reload_base(held[name], args.device, args.dtype, args.recompute, args.device_map,
                         args.quantize or held[name].get("quantize")) for name in names]

    portal = load_portal(run, names).to(args.device)
    trained = portal.z[:len(cfg.tasks) - len(added)].detach()                        # [T before any was added, d_z]
    portal.z = torch.nn.Parameter(trained.mean(0, keepdim=True))                     # [1, d_z]
    frozen = [p.requires_grad_(False) for module in (portal.core, *portal.converters.values()) for p in module.parameters()]
    before = [p.clone() for p in frozen]
    learner = portal_learner(portal, rows, *(settings[k] for k in ("epochs", "batch_size", "lr", "least")))
    if args.dry_run:
        return dry_run(f"add {task}", bases, portal.adapters, learner, rows, seed, settings, portal.z)
    lock(run)
    state = run / ".resume" / f"add-{task}.safetensors"
    seconds = fit(f"add {task}", bases, portal.adapters, [learner], rows, seed=seed, log=run / "log.jsonl", z=portal.z,
                  state=state, frozen=frozen, **{k: settings[k] for k in ("epochs", "batch_size", "max_tokens")})
    assert all(torch.equal(p, b) for p, b in zip(frozen, before)), "the frozen core or converters changed"
    learner.load_best()

    tasks = cfg.tasks if task in added else [*cfg.tasks, task]
    t, new = tasks.index(task), portal.z.detach().cpu()
    for path in (run / "final" / "latents.safetensors", run / "latents.safetensors"):
        if path.exists():
            z = load_tensors(path)["z"]                                              # a row too many: load_portal
            save_tensors(path, {"z": torch.cat([z[:t], new, z[t + 1:len(cfg.tasks)]])})  # [T + 1, d_z], or [T, d_z] again
    write_json(run / "portal.json", {                                                # last: until then the run has T tasks
        **saved, "config": {**saved["config"], "tasks": tasks}, "added": {**added, task: dict(
            folder=str(folder), bases=names, n=settings["n"], seed=seed, epochs=settings["epochs"],
            epoch_selected=learner.epoch, seconds=round(seconds, 1), date=today())}})
    forget(state)
    print(f"{task}: epoch {learner.epoch} of {settings['epochs']} selected on held-out rows; added to {run}; "
          "python eval.py measures it on every base")


def main(argv=None):
    fixed = vars(Config(tasks=[]))                                                   # modules, rank, norm
    args = parse(__doc__, "bases data tasks add-task n modules rank norm epochs batch-size lr max-tokens recompute seed "
                          "device dtype device-map quantize run overwrite dry-run", argv, ({**fixed, **TOY}, {**fixed, **REAL}))
    if args.add_task:
        return add_task(args)
    specs = args.bases or TOY_SEEN
    names = short_names(specs)
    default = preset(names)
    settings = chosen(args, default)
    data = args.data or ROOT / ("toy/data" if default is TOY else "data")
    run = args.run or OUT / ("toy" if args.bases is None else "+".join(names))
    seed = args.seed or 0
    rows = {task: sample(splits["train"], settings["n"], seed) for task, splits in load_tasks(data, args.tasks).items()}
    cfg = Config(tasks=list(rows), **default["sizes"])
    cfg.modules, cfg.norm = args.modules or cfg.modules, args.norm or cfg.norm
    cfg.rank, cfg.alpha = args.rank or cfg.rank, 2 * (args.rank or cfg.rank)
    if occupied(run) and not (run / "portal.json").exists():
        raise BadInput(f"{run} is neither empty nor a run folder; --run DIR names another")
    if not args.dry_run:
        lock(run)
    if (run / "portal.json").exists() and not (args.overwrite or args.dry_run):
        same = read_json(run / "portal.json").get("config") == vars(cfg)
        raise BadInput(f"{run} already holds a trained run{'' if same else ' of another configuration'}; "
                       "--overwrite replaces it, --run DIR trains beside it")
    bases = [load_base(spec, args.device, args.dtype, args.recompute, args.device_map, args.quantize) for spec in specs]

    torch.manual_seed(seed)
    portal = Portal(cfg)
    for base in bases:
        portal.converters[base.name] = Converter(cfg, base.layers, base.dims)
    portal.to(args.device)
    learner = portal_learner(portal, rows, *(settings[k] for k in ("epochs", "batch_size", "lr", "least")))
    if args.dry_run:
        return dry_run("train", bases, portal.adapters, learner, rows, seed, settings, portal.z)
    part = beside(run, "part")                                                       # until the run is whole
    seconds = fit("train", bases, portal.adapters, [learner], rows, seed=seed, log=part / "log.jsonl", z=portal.z,
                  state=part / "train.safetensors", **{k: settings[k] for k in ("epochs", "batch_size", "max_tokens")})
    with new_folder(run) as folder:                                                  # becomes `run` when it is whole
        save_states([learner], settings["epochs"], lambda final: save_portal(folder, portal, final))
        provenance = [dict(base=b.name, id=b.origin, revision=b.revision, ported=False, n=settings["n"], seed=seed,
                           data=str(data.resolve()), quantize=b.quantize, epochs=settings["epochs"],
                           epoch_selected=learner.epoch, seconds=round(seconds, 1), date=today()) for b in bases]
        for p in provenance:
            write_json(folder / "converters" / f"{p['base']}.json", p)
        write_json(folder / "portal.json", dict(
            config=vars(cfg), bases=provenance, seed=seed, data=str(data.resolve()), trained=today(), **settings,
            versions=dict(torch=torch.__version__, transformers=transformers.__version__)))
        write_whole(folder / "log.jsonl", lambda p: shutil.copy(part / "log.jsonl", p))
    if RANK == 0:
        shutil.rmtree(part, ignore_errors=True)
    print(f"epoch {learner.epoch} of {settings['epochs']} selected on held-out rows; saved to {run}")


if __name__ == "__main__":
    run_main(main)
