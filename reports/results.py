"""What a run measured: reading results, drawing plots, naming the hardware and the commit."""
import contextlib, functools, os, pathlib, platform, re, subprocess

import numpy as np
import torch

from runtime.files import ROOT, each_line, first_line, read_json, write_whole


def pack(correct):
    """Returns a bool for each row as hex digits of four rows, the first row the highest bit, padded with zeros."""
    return np.packbits(np.array(correct, bool)).tobytes().hex()[:-(-len(correct) // 4)]


def unpack(text, rows):
    """Returns the list of bools that `pack` wrote as `text`. Raises ValueError if it did not."""
    octets = np.frombuffer(bytes.fromhex(text + "0" * (len(text) % 2)), np.uint8)
    correct = np.unpackbits(octets, count=rows).astype(bool).tolist()                # filled up with zeros
    if pack(correct) != text:
        raise ValueError(f"{text!r} is not {rows} rows")
    return correct


def fit_date(run, method, tag, task):
    """Returns when the adapters of a method on a base were fitted, and a task's latent that was added later, or None if
    the run does not say."""
    path = run / ("converters" if method == "portal" else f"baselines/{method}") / f"{tag}.json"
    saved = run / "portal.json"
    date = read_json(path).get("date") if path.exists() else None
    added = read_json(saved).get("added", {}) if method == "portal" and saved.exists() else {}
    return f"{date}, {added[task]['date']}" if task in added else date


def read_results(run):
    """Returns {(base, n, method, select): {task: row}} from results.jsonl; of a cell, the last line counts. What was
    measured on adapters that were fitted again since is left out. Raises BadInput for a line that holds no result."""
    found, dates = {}, functools.cache(functools.partial(fit_date, run))
    def add(row):
        if not (0 <= row["acc_norm"] <= 1 and row["log_loss"] > -1e-3 and row["rows"] > 0):
            raise ValueError(f"acc_norm {row['acc_norm']}, log_loss {row['log_loss']}, rows {row['rows']}")
        now = [dates(row["method"], tag, row["task"]) for tag in (row["base"], f"{row['base']}@{row['n']}")]
        if row.get("fitted") is None or row["fitted"] in now or now == [None, None]:
            found.setdefault((row["base"], row["n"], row["method"], row["select"]), {})[row["task"]] = row
    each_line(run / "results.jsonl", add, "a result row")
    return found


def hardware():
    """The processor, GPU and torch version, as one line."""
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)", info.read_text("utf-8", "replace"), re.M) if info.exists() else []
    cpu = names[0] if names else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{cpu}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


NO_COMMIT = "not a git checkout"


def commit():
    """The commit of this checkout, as `git describe --always --dirty` names it, or NO_COMMIT."""
    try:
        return subprocess.check_output(["git", "-C", ROOT, "describe", "--always", "--dirty"], text=True,
                                       stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return NO_COMMIT


@contextlib.contextmanager
def drawing(path, width, columns=1):
    """Yields matplotlib axes (or an array of `columns` axes), saved as a PNG at `path` afterwards. Any text is a label
    as it is."""
    os.environ["MPLBACKEND"] = "agg"                                                 # a notebook's may not be installed
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
        figure = Figure((width, 3.6), layout="tight")
        yield figure.subplots(ncols=columns)
        write_whole(path, lambda p: figure.savefig(p, format="png", dpi=110))


def draw(plot, path, *what):
    """Calls plot(path, *what), after the numbers are written. A plot that fails is a printed line."""
    try:
        plot(path, *what)
    except Exception as error:                                                       # of matplotlib, whatever it is
        print(f"{path}: not drawn ({first_line(error)}); the table is whole")


def plot(path, title, tasks, bars):
    """Draws bars {method: [a value for each task]} as a PNG."""
    with drawing(path, 2 + 0.8 * len(tasks)) as axes:
        for k, (method, values) in enumerate(bars.items()):
            axes.bar(np.arange(len(tasks)) + 0.8 * ((k + 0.5) / len(bars) - 0.5), values, 0.8 / len(bars), label=method)
        axes.set(ylim=(0, 1), ylabel="acc_norm", title=title)
        axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right")
        axes.legend(ncols=len(bars), loc="lower center", bbox_to_anchor=(0.5, 1.08), frameon=False)
