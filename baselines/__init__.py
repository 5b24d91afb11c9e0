"""The baselines of a run: other ways to adapt a base, fitted on the very rows that its converter was fitted on."""
from cli import remove, today, write_json
from dist import wait
from portal import save_adapters
from resume import forget
from train import fit, save_states


def fit_baseline(run, method, tag, base, rows, provenance, settings, generate, learners, **how):
    """Train `learners` on `rows` {task: (train, held out)} and save what `generate` then yields as baselines/<method>/<tag>.
    `provenance` is that of the base's converter, whose rows and seed these are, with the run's tasks that were `added`
    since; how: the rest for train.fit."""
    state = run / ".resume" / f"{method}-{tag}.safetensors"
    seconds = fit(f"{method} {tag}", [base], generate, learners, rows, seed=provenance["seed"], log=run / "log.jsonl",
                  state=state, **{k: settings[k] for k in ("epochs", "batch_size", "max_tokens")}, **how)
    path = run / "baselines" / method / f"{tag}.json"                                # written last: without it the baseline
    remove(path)                                                                     # counts as missing
    selected, last = (root / "baselines" / method / f"{tag}.safetensors" for root in (run, run / "final"))
    remove(last)
    save_states(learners, settings["epochs"],
                lambda final: save_adapters(last if final else selected, generate(base.name)))
    write_json(path, dict(
        {key: provenance[key] for key in ("base", "id", "revision", "n", "seed", "data", "added")}, settings=settings,
        epoch_selected={task: learner.epoch for learner in learners for task in learner.tasks},
        seconds=round(seconds, 1), date=today()))
    forget(state)
    wait()                                                                           # evaluation reads it in every process
