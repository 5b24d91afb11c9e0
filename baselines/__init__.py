"""Other ways to adapt a base, fitted on the rows that the base's converter was fitted on."""
from runtime.distributed import barrier
from runtime.files import remove, today, write_json
from runtime.job import Job
from runtime.resume import forget, state_file
from runtime.saved import save_adapters, save_states
from train import fit


def fit_baseline(run, method, base, rows, provenance, settings, generate, learners):
    """Trains `learners` on `rows` {task: (train, held out)} and saves generate(base name) as baselines/<method>/<tag>.
    provenance: that of the base's converter, with its `tag` and the tasks `added` to the run since."""
    tag, name = provenance["tag"], f"baselines/{method}/{provenance['tag']}"
    state = state_file(run, f"{method}-{tag}")
    job = Job(f"{method} {tag}", settings, provenance["seed"], run / "log.jsonl", state)
    fit(job, [base], generate, learners, rows)
    path, selected, last = (run / file for file in (f"{name}.json", f"{name}.safetensors", f"final/{name}.safetensors"))
    remove(path)                                             # written last: without it the baseline counts as missing
    remove(last)
    save_states(learners, settings["epochs"],
                lambda final: save_adapters(last if final else selected, generate(base.name)))
    write_json(path, dict(
        {key: provenance.get(key) for key in "base id revision fingerprint quantize n seed data rows added".split()},
        settings=settings,
        epoch_selected={task: learner.epoch for learner in learners for task in learner.tasks},
        seconds=round(job.seconds, 1), date=today()))
    forget(state)
    barrier()                                                                        # every process reads it next
