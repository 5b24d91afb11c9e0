"""The joint hypernet (sections 6.1 and 6.2): PorTAL's generator trained on one base alone, with nothing frozen.

Its latents and core have seen no other base. Beside a port, the difference is what freezing latents and core costs,
or what training on other bases brings."""
import dataclasses

import torch

from baselines import fit_baseline
from portal import Converter, Portal
from train import portal_learner


def fit_hypernet(run, base, rows, provenance, settings, cfg):
    """Fits it on `rows` {task: (train, held out)} with a run's Config and saves it as baselines/hypernet/<tag>."""
    torch.manual_seed(provenance["seed"])
    portal = Portal(dataclasses.replace(cfg, tasks=list(rows)))
    portal.converters[base.name] = Converter(cfg, base.groups_of(cfg.modules))
    portal.to(base.device)
    learner = portal_learner(portal, rows, settings)
    fit_baseline(run, "hypernet", base, rows, provenance, settings, portal.adapters, [learner])
