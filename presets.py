"""The commands' settings: those given as flags, else a preset's, TOY for the toy's bases and REAL for others."""
from bases import TOY as TOY_BASES
from data import most_rounds

# REAL: the write-up's numbers (appendix A) but for whiten and lr, which is that of sums (Portal.rates). TOY, whiten and
# lr: chosen on rows held out of train. An epoch is a pass over the largest task and has at least `least` rounds: on a
# few rows a single pass gives too few steps.
REAL = dict(n=2000, epochs=5, batch_size=4, lr=0.03, least=1, max_tokens=4096, sizes={},
            port=dict(n=1000, epochs=5, batch_size=4, lr=0.3, least=1, max_tokens=4096, whiten=0.1),
            lora=dict(epochs=5, batch_size=4, lr=3e-4, least=1, max_tokens=4096))
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
