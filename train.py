"""Source training: latents, core and one converter a base, learned together on frozen bases.

    python train.py                                        the embedded toy, CPU
    python train.py --bases qwen3-1.7b,qwen3-4b --data data
    python train.py --dry-run                              prints what that would take in memory and time
    python train.py --add-task DIR                         adds a task to a run; core and converters stay frozen

A round is `batch_size` rows of every task on every base. Adapters are generated once a round and base; micro-batches
that mix the rows of all tasks leave their gradients on A and B; one backward pass takes those through the generator.
"""
import importlib, shutil

import torch, transformers

from bases import TOY as TOY_BASES, TOY_SEEN, load_base, short_names
from checkpoints import refuse_twin
from data import Rounds, collate, load_tasks, micro_batches, print_fewer, sample, to_device
from learner import most_rounds, portal_learner, save_states
from portal import MODULES, Config, Converter, Portal
from runtime.distributed import RANK, all_sum, shard
from runtime.files import ROOT, BadInput, read_json, today, write_json, write_whole
from runtime.flags import parse, run_main, some_of
from runtime.job import DryRun, Job
from runtime.resume import digests_of
from runtime.run_folder import OUT, lock, new_folder, occupied, save_portal, sibling
from score import delta_ratio, evaluate

# REAL: the write-up's numbers (appendix A) but for whiten and lr, which is that of sums (Portal.rates). TOY, whiten and
# lr: chosen on rows held out of train. An epoch is a pass over the largest task and has at least `least` rounds: on a
# few rows a single pass gives too few steps.
REAL = dict(n=2000, epochs=5, batch_size=4, lr=0.015, least=1, max_tokens=4096, sizes={},
            port=dict(n=1000, epochs=5, batch_size=4, lr=0.3, least=1, max_tokens=4096, whiten=0.1),
            lora=dict(epochs=5, batch_size=4, lr=1e-4, least=1, max_tokens=4096))
TOY = dict(n=1000, epochs=2, batch_size=8, lr=0.3, least=28, max_tokens=4096,
           sizes=dict(d_z=64, hidden=256, d_c=32),
           port=dict(n=1000, epochs=1, batch_size=2, lr=0.5, least=448, max_tokens=4096, whiten=0.1),
           lora=dict(epochs=1, batch_size=2, lr=5e-3, least=448, max_tokens=4096),
           lora_iso=dict(epochs=6, batch_size=8, lr=3e-3, least=112, max_tokens=4096))
FEW = 24                                                                             # steps; see resolve_settings
WRITE_UP_LR = 1e-3                                                                   # the default with norm "none"


def preset(names):
    """The preset, TOY or REAL, for bases of these short names."""
    return TOY if set(names) <= TOY_BASES.keys() else REAL


def resolve_settings(args, default, norm=None, rows=None):
    """Returns the settings: those given as flags, else the preset's.

    Where a generator is trained: norm, and rows {task: (train, held out)}. Unless --lr is given, fewer than FEW steps
    then take sqrt(FEW / steps) times the preset's rate, which is too low for them (results/presets.md)."""
    written = dict(lr=WRITE_UP_LR, whiten=0) if norm == "none" else {}
    found = {k: getattr(args, k, None) or written.get(k, v) for k, v in default.items() if not isinstance(v, dict)}
    if rows and not args.lr and norm != "none":
        steps = most_rounds(rows, found["batch_size"], found["least"]) * found["epochs"]
        if steps < FEW:
            found["lr"] = float(f"{found['lr'] * (FEW / steps) ** 0.5:.3g}")
    return found


# ---------------------------------------------------------------------------------------------- one round
def task_gradients(base, adapters, items, max_tokens):
    """Returns losses [T] and the gradients of adapters.tensors() ([T, L, ...] each), of all tasks at once on one base.

    The loss of task t is the NLL of the gold continuation, averaged over that task's answer tokens in `items`; of an
    item with weights, that of all its continuations, each times its weight. A row uses only its own task's slice of A
    and B, so one backward pass of the sum over tasks gives each task's own gradient in row t; a weight of a task can be
    applied there afterwards. Several processes (runtime/distributed.py) share the rows; each divides by the answer
    tokens of all, so that their losses and gradients add up."""
    leaf = adapters.map(lambda a: a.detach().requires_grad_())
    tokens = torch.zeros(len(leaf.tensors()[0]), dtype=torch.float64)                # [T] answer tokens of each task
    for item in items:
        assert item.weights or len(item.continuations) == 1, "training takes the gold continuation alone"
        tokens[item.task] += sum(w * len(own) for w, own in zip(item.weights or (1,), item.continuations))
    if any(item.weights for item in items) and not base.packs:
        items = [one for item in items for one in item.rows()]
    tokens = to_device(tokens, base.device)
    losses = torch.zeros_like(tokens, dtype=torch.float32)
    for part in micro_batches(shard(items), max_tokens):
        batch = collate(part, base.device)
        task = batch.task[batch.row]                                                 # [M]
        weights = [float(w) for item in part for w in item.weights or (1,)]
        weight = to_device(torch.tensor(weights), base.device)[batch.owner] / tokens[task]  # [M]
        loss, nll = base.nll(batch, leaf, weight)
        loss.backward()
        losses.index_add_(0, task, (weight * nll).float())
    gradients = [torch.zeros_like(a) if a.grad is None else a.grad for a in leaf.tensors()]  # None: an empty shard
    return all_sum(losses), [all_sum(g) for g in gradients]


def balance(gradients):
    """Scales each base's whole gradient on z [T, d_z] to the mean of their norms and adds them up (section 4)."""
    norms = torch.stack([g.norm() for g in gradients])
    return sum(g * (norms.mean() / norm.clamp(min=1e-12)) for g, norm in zip(gradients, norms))


class EMA:
    """A `weigh` for one_round: divides each (base, task) loss by its running mean, 0.9 / 0.1, never by less than
    `floor` (section 4). Used in experiments/ alone: on the toy, dividing leaves some tasks under-fit
    (results/README.md, "Competition")."""

    def __init__(self, floor=1e-3):
        self.floor, self.means = floor, {}                                           # {base name: [T]}

    def __call__(self, base, losses, gradients):
        self.means[base] = 0.9 * self.means[base] + 0.1 * losses if base in self.means else losses.clone()
        weights = (1 / self.means[base].clamp(min=self.floor)).view(-1, 1, 1, 1)     # [T, 1, 1, 1]
        return [weights * g for g in gradients]


def one_round(bases, generate, learners, items, max_tokens, weigh=None, combine=balance):
    """One round: the gradients of all tasks on all bases, then a step of every learner. Returns losses [bases, T].

    generate(base name) -> Adapters with their autograd graph; items {base name: [Item]}; weigh(base name, losses [T],
    gradients) -> gradients, to change the tasks' shares; combine: how the bases' gradients on z become one."""
    z, z_gradients, losses = learners[0].z, [], []
    for learner in learners:
        learner.optimizer.zero_grad()
    for base in bases:
        adapters = generate(base.name)
        found, gradients = task_gradients(base, adapters, items[base.name], max_tokens)
        losses.append(found)
        if weigh:
            gradients = weigh(base.name, found, gradients)
        torch.autograd.backward(adapters.tensors(), gradients)
        if z is not None:                                                            # of each base on its own
            z_gradients.append(z.grad)
            z.grad = None
    if z is not None:
        z.grad = combine(z_gradients)
    for learner in learners:
        learner.step()
    return torch.stack(losses)


# ---------------------------------------------------------------------------------------------- many rounds
def fit(job, bases, generate, learners, rows, weigh=None, step=one_round):
    """Trains `learners` on frozen `bases`; each then holds its last epoch and, in `best`, the selected one.

    job: runtime.job.Job, which restores, saves, logs and refuses losses that are not finite; generate(base name) ->
    Adapters with their graph; rows {task: (train rows, held-out rows)}; weigh: see one_round; step: replaces
    one_round."""
    source = Rounds(bases, rows, job.batch_size, job.seed)
    with job.fit(bases, learners, rows, source, weigh):
        for epoch in job.epochs():
            for k in job.rounds(epoch):
                active = [learner for learner in learners if k < learner.rounds]  # others have done their epoch
                batch = source.take([task for learner in active for task in learner.tasks])
                losses = step(bases, generate, active, batch, job.max_tokens, weigh)
                job.record(losses, batch)
            for learner in learners:
                learner.optimizer.zero_grad()                                        # frees memory for the evaluation
            with torch.no_grad():
                adapters = {base.name: generate(base.name) for base in bases}
            scores = held_out_scores(bases, adapters, source, job.max_tokens)
            job.record_scores(scores, delta_ratios(bases, adapters, source))
            for learner in learners:
                learner.keep_best(epoch, scores)
        job.compare(lambda: held_out_scores(bases, {}, source, job.max_tokens))


def held_out_scores(bases, adapters, source, max_tokens):
    """{(base name, task): (acc_norm, -log_loss)} on the rows held out of train. adapters {base name: Adapters}; without
    them, the bare base's."""
    return {(base.name, source.tasks[t]): (cell["acc_norm"], -cell["log_loss"]) for base in bases
            for t, cell in evaluate(base, adapters.get(base.name), source.held[base.name], max_tokens).items()}


def delta_ratios(bases, adapters, source):
    """Returns score.delta_ratio of each base, on the first training row of every task."""
    return [delta_ratio(base, adapters[base.name], [source.cycles[base.name, task].items[0] for task in source.tasks])
            for base in bases]


# ---------------------------------------------------------------------------------------------- the command
def main(argv=None, sizes={}, change=lambda portal: None, weigh=None, step=one_round):
    """Trains a run. An ablation hands in sizes (of Config), change(portal) before the first step, weigh or step (see
    fit)."""
    fixed = vars(Config(tasks=[]))                                                   # modules, rank, norm
    args = parse(__doc__, "bases data tasks add-task n modules rank norm epochs batch-size lr max-tokens recompute "
                          "seed device dtype device-map quantize allow-changed-base run overwrite dry-run",
                 argv, ({**fixed, **TOY}, {**fixed, **REAL}), modules=dict(type=some_of(MODULES)))
    if args.add_task:                                                                # add_task.py imports this file
        return importlib.import_module("experiments.add_task").add_task(args)
    specs = args.bases or TOY_SEEN
    names = short_names(specs)
    default = preset(names)
    n, seed = args.n or default["n"], args.seed or 0
    data = args.data or ROOT / ("toy/data" if default is TOY else "data")
    run = args.run or OUT / ("toy" if args.bases is None else "+".join(names))
    found = load_tasks(data, args.tasks)
    print_fewer(found, n)
    rows = {task: sample(splits["train"], n, seed) for task, splits in found.items()}
    settings = resolve_settings(args, default, args.norm, rows)
    cfg = Config(tasks=list(rows), **{**default["sizes"], **sizes})
    cfg.modules, cfg.norm = args.modules or cfg.modules, args.norm or cfg.norm
    cfg.rank, cfg.alpha = args.rank or cfg.rank, 2 * (args.rank or cfg.rank)
    lock_for_training(run, cfg, args)
    bases = [load_base(spec, args.device, args.dtype, args.recompute, args.device_map, args.quantize) for spec in specs]

    torch.manual_seed(seed)
    portal = Portal(cfg)
    for base in bases:
        refuse_twin(base, {other.name: other.provenance for other in bases})
        portal.converters[base.name] = Converter(cfg, base.groups_of(cfg.modules))
    change(portal)
    portal.to(args.device)
    learner = portal_learner(portal, rows, settings)
    part = sibling(run, "part")                                                      # until the run is whole
    job = (DryRun if args.dry_run else Job)("train", settings, seed, part / "log.jsonl", part / "train.safetensors")
    fit(job, bases, portal.adapters, [learner], rows, weigh, step)
    if args.dry_run:
        return
    fitted = dict(n=settings["n"], seed=seed, data=str(data.resolve()), rows=digests_of(rows),
                  epochs=settings["epochs"], epoch_selected=learner.epoch, seconds=round(job.seconds, 1), date=today())
    save_run(run, portal, learner, bases, settings, fitted)
    print(f"epoch {learner.epoch} of {settings['epochs']} selected on held-out rows; saved to {run}")


def save_run(run, portal, learner, bases, settings, fitted):
    """Writes the run folder, whole or not at all; fitted: what the provenance of every converter says of the fit."""
    part = sibling(run, "part")
    with new_folder(run) as folder:                                                  # becomes `run` when it is whole
        save_states([learner], settings["epochs"], lambda final: save_portal(folder, portal, final))
        provenance = [dict(base=base.name, **base.provenance, ported=False, **fitted) for base in bases]
        for p in provenance:
            write_json(folder / "converters" / f"{p['base']}.json", p)
        write_json(folder / "portal.json", dict(
            config=vars(portal.cfg), bases=provenance, seed=fitted["seed"], data=fitted["data"], trained=today(),
            **settings, versions=dict(torch=torch.__version__, transformers=transformers.__version__)))
        write_whole(folder / "log.jsonl", lambda p: shutil.copy(part / "log.jsonl", p))
    if RANK == 0:
        shutil.rmtree(part, ignore_errors=True)


def lock_for_training(run, cfg, args):
    """Locks the run folder. Raises BadInput if it holds something that may not be replaced."""
    if occupied(run) and not (run / "portal.json").exists():
        raise BadInput(f"{run} is neither empty nor a run folder; --run DIR names another")
    if args.dry_run:
        return
    lock(run)
    if (run / "portal.json").exists() and not args.overwrite:
        same = read_json(run / "portal.json").get("config") == vars(cfg)
        raise BadInput(f"{run} already holds a trained run{'' if same else ' of another configuration'}; "
                       "--overwrite replaces it, --run DIR trains beside it")


if __name__ == "__main__":
    run_main(main)
