"""The joint hypernet (sections 6.1 and 6.2): PorTAL's own generator, trained on one base alone with nothing frozen.

It asks what the portable parts cost and bring. The same network, with latents and core that have seen no base but this one:
beside a port it shows what was lost by freezing them, or gained by other bases having taken part.
"""
import dataclasses

import torch

from baselines import fit_baseline
from portal import Converter, Portal
from train import portal_learner


def fit_hypernet(run, tag, base, rows, provenance, settings, cfg):
    """Fit it on `rows` {task: (train, held out)} with a run's Config and save it as baselines/hypernet/<tag>."""
    torch.manual_seed(provenance["seed"])
    portal = Portal(dataclasses.replace(cfg, tasks=list(rows)))
    portal.converters[base.name] = Converter(cfg, base.layers, base.dims)
    portal.to(base.device)
    learner = portal_learner(portal, rows, *(settings[k] for k in ("epochs", "batch_size", "lr", "least")))
    fit_baseline(run, "hypernet", tag, base, rows, provenance, settings, portal.adapters, [learner], z=portal.z)
