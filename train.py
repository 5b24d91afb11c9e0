"""Source training: latents, core and one converter a base, learned together on frozen bases.

    python train.py                                        the embedded toy, CPU
    python train.py --bases qwen3-1.7b,qwen3-4b --data data
    python train.py --dry-run                              prints what that would take in memory and time
    python train.py --bases A,B --teacher C --adapters DIR learns what LoRAs, PEFT folders DIR/<task>, answer on C
    python train.py --add-task DIR                         adds a task to a run; core and converters stay frozen

A round is `batch_size` rows of every task on every base. Adapters are generated once a round and base; micro-batches
that mix the rows of all tasks leave their gradients on A and B; one backward pass takes those through the generator.
"""
import torch

from bases import TOY_SEEN, load_base, refuse_twin, short_name, short_names
from data import Rounds, collate, micro_batches, most_rounds, to_device
from portal import MODULES, Config, Converter, Portal
from presets import REAL, TOY, preset, resolve_settings
from runtime.distributed import all_sum, shard
from runtime.files import ROOT, BadInput, today
from runtime.flags import parse, run_main, some_of
from runtime.job import DryRun, Job
from runtime.resume import digests_of
from runtime.run_folder import OUT, lock_for_training, sibling
from runtime.saved import save_run
from score import delta_ratio, evaluate, macro, task_spread
from starts.teacher import answers, of_peft, taught
from tasks.new_task import new_task
from tasks.rows import load_tasks, print_fewer, sample


# ---------------------------------------------------------------------------------------------- what is optimised
class Learner:
    """Parameters that are optimised together and whose epoch is chosen together, and the tasks they learn. PorTAL is
    one learner; T per-task LoRAs are T learners that share only their forward passes. groups: [{"params", "lr"}], as
    in torch; rounds: of an epoch; z: the parameter on which the bases' gradients are balanced, or None."""

    def __init__(self, groups, tasks, rounds, epochs, z=None):
        self.tasks, self.rounds, self.z, self.score, self.epoch, self.best = tasks, rounds, z, None, 0, None
        self.params = self.start = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        total = rounds * epochs
        warm = max(1, total // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(                           # 10% warm-up, then linear to zero
            self.optimizer, lambda k: min((k + 1) / warm, (total - k) / max(1, total - warm)))

    def step(self):
        torch.nn.utils.clip_grad_norm_(self.params, 1.0, foreach=True)
        self.optimizer.step()
        self.schedule.step()

    def keep_best(self, epoch, scores):
        """Keeps this epoch's parameters if the mean over the learner's tasks of scores {(base name, task): (acc_norm,
        -log_loss)} is the best so far, or if nothing is held out."""
        own = [score for (_, task), score in scores.items() if task in self.tasks]
        mean = macro(own) if own else None
        # The score is assigned last: a fit that Ctrl-C stops before that repeats the comparison, with the same end.
        if self.score is None or mean is None or mean > self.score:
            self.best, self.epoch, self.score = [p.detach().clone() for p in self.params], epoch, mean

    @torch.no_grad()
    def load_best(self):
        for p, best in zip(self.params, self.best):
            p.copy_(best)


def portal_learner(portal, rows, settings):
    """One learner for everything that is not frozen, at the rates of Portal.rates."""
    z = portal.z if portal.z.requires_grad else None
    rounds = most_rounds(rows, settings["batch_size"], settings["least"])
    return Learner(portal.rates(settings["lr"]), list(rows), rounds, settings["epochs"], z)


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
        loss, nll, _ = base.nll(batch, leaf, weight)
        loss.backward()
        losses.index_add_(0, task, (weight * nll).float())
    gradients = [torch.zeros_like(a) if a.grad is None else a.grad for a in leaf.tensors()]  # None: an empty shard
    return all_sum(losses), [all_sum(g) for g in gradients]


def balance(gradients):
    """Scales each base's whole gradient on z [T, d_z] to the mean of their norms and adds them up (section 4)."""
    norms = torch.stack([g.norm() for g in gradients])
    return sum(g * (norms.mean() / norm.clamp(min=1e-12)) for g, norm in zip(gradients, norms))


def one_round(bases, generate, learners, items, max_tokens, weigh=None):
    """One round: the gradients of all tasks on all bases, then a step of every learner. Returns losses [bases, T].

    generate(base name) -> Adapters with their autograd graph; items {base name: [Item]}; weigh(base name, losses [T],
    gradients) -> gradients: an experiment's change of the tasks' shares."""
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
        z.grad = balance(z_gradients)
    for learner in learners:
        learner.step()
    return torch.stack(losses)


# ---------------------------------------------------------------------------------------------- many rounds
def fit(job, bases, generate, learners, rows, step=one_round):
    """Trains `learners` on frozen `bases`; each then holds its last epoch and, in `best`, the selected one.

    job: runtime.job.Job, which restores, saves, logs and refuses losses that are not finite; generate(base name) ->
    Adapters with their graph; rows {task: (train rows, held-out rows)}; step: an experiment's own, for one_round."""
    source = Rounds(bases, rows, job.batch_size, job.seed)
    with job.fit(bases, learners, rows, source):
        for epoch in job.epochs():
            for k in job.rounds(epoch):
                active = [learner for learner in learners if k < learner.rounds]  # others have done their epoch
                batch = source.take([task for learner in active for task in learner.tasks])
                losses = step(bases, generate, active, batch, job.max_tokens)
                job.record(losses, batch)
            for learner in learners:
                learner.optimizer.zero_grad()                                        # frees memory for the evaluation
            with torch.no_grad():
                adapters = {base.name: generate(base.name) for base in bases}
            scores = held_out_scores(bases, adapters, source, job.max_tokens)
            job.record_scores(scores, delta_ratios(bases, adapters, source), [*map(task_spread, adapters.values())])
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
def new_run(args):
    """Returns a new run's (job, Portal, bases, rows, settings, save(learner)). args: the command's flags."""
    specs = args.bases or TOY_SEEN
    names = short_names(specs)
    default = preset(names)
    n, seed = args.n or default["n"], args.seed or 0
    data = args.data or ROOT / ("toy/data" if default is TOY else "data")
    run = args.run or OUT / ("toy" if args.bases is None else "+".join(names))
    found = load_tasks(data, args.tasks)
    print_fewer(found, n)
    rows = drawn = {task: sample(splits["train"], n, seed) for task, splits in found.items()}
    cfg = Config(tasks=list(drawn), **default["sizes"])
    cfg.modules, cfg.norm = args.modules or cfg.modules, args.norm or cfg.norm
    cfg.rank, cfg.alpha = args.rank or cfg.rank, 2 * (args.rank or cfg.rank)
    lock_for_training(run, cfg, args)
    if args.teacher:
        rows = taught(drawn, answers(*of_peft(args, cfg.tasks), cfg.tasks, found, n, seed,
                                     args.max_tokens or default["max_tokens"]))
    settings = resolve_settings(args, default, args.norm, rows)
    bases = [load_base(spec, args.device, args.dtype, args.recompute, args.device_map, args.quantize) for spec in specs]

    torch.manual_seed(seed)
    portal = Portal(cfg)
    for base in bases:
        refuse_twin(base, {other.name: other.provenance for other in bases})
        portal.converters[base.name] = Converter(cfg, base.groups_of(cfg.modules))
    portal.to(args.device)
    part = sibling(run, "part")                                                      # until the run is whole
    job = (DryRun if args.dry_run else Job)("train", settings, seed, part / "log.jsonl", part / "train.safetensors")
    def save(learner):
        fitted = dict(n=settings["n"], seed=seed, data=str(data.resolve()), rows=digests_of(drawn),
                      epochs=settings["epochs"], epoch_selected=learner.epoch, seconds=round(job.seconds, 1),
                      teacher=args.teacher and short_name(args.teacher),
                      adapters=args.adapters and str(args.adapters.resolve()), date=today())
        save_run(run, portal, learner, bases, settings, fitted)
        print(f"epoch {learner.epoch} of {settings['epochs']} selected on held-out rows; saved to {run}")
    return job, portal, bases, rows, settings, save


def main(argv=None):
    fixed = vars(Config(tasks=[]))                                                   # modules, rank, norm
    args = parse(__doc__, "bases data tasks add-task n modules rank norm teacher adapters epochs batch-size lr "
                          "max-tokens recompute seed device dtype device-map quantize allow-changed-base run overwrite "
                          "dry-run", argv, ({**fixed, **TOY}, {**fixed, **REAL}),
                 modules=dict(type=some_of(MODULES)))
    if bool(args.teacher) != bool(args.adapters) or args.add_task and args.teacher:
        raise BadInput("--teacher BASE and --adapters DIR are accepted together, and without --add-task: a new run "
                       "holds no adapters that a teacher could have")
    job, portal, bases, rows, settings, save = (new_task if args.add_task else new_run)(args)
    learner = portal_learner(portal, rows, settings)
    fit(job, bases, portal.adapters, [learner], rows)
    if not args.dry_run:
        save(learner)


if __name__ == "__main__":
    run_main(main)
