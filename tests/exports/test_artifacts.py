"""portallib artifacts both ways, against the portallib package itself: same weights in, same LoRA factors out."""
import hashlib, json, pathlib, shutil

import filelock, pytest, torch
from conftest import command, fingerprint, in_hub_cache, one_line, save_tiny, tiny_model
from safetensors.torch import load_file, save_file
from test_export import TASKS, make_run
from test_sites import base_of, hybrid, save, unlike
from conftest import SIZES

import eval as evaluation, export, port
from bases import load_base
from eval import adapters_of
from portal import MODULES
from exports import portallib as ours
from runtime import run_folder
from runtime.files import BadInput, read_json, write_json
from runtime.saved import load_portal, provenances, save_converter

portallib = pytest.importorskip("portallib")


def save_artifact(folder, where, architecture, modules, shared=None, layer_path="model.layers", model=None, **changes):
    """A portallib artifact with random weights on the base in `where`; `shared`: another one's latents and core."""
    sizes = {**{theirs: SIZES[ours] for ours, theirs in ours.SIZES.items()}, "alpha": 6}
    config = portallib.PortalConfig.from_model(
        model or tiny_model(architecture), tasks=TASKS, base_model_name_or_path=str(where), modules=modules,
        layer_path=layer_path, allow_heterogeneous_targets=True, **{**sizes, **changes})
    model = portallib.PortalModel(config, torch.zeros(len(TASKS), config.d_z))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if shared is not None:
        model.task_latents.data = shared.task_latents.data.clone()
        model.core.load_state_dict(shared.core.state_dict())
    model.save_pretrained(folder)
    return model


def assert_same_factors(run, name, where, model):
    adapters = adapters_of(run, "portal", name, load_base(str(where)))
    base = load_base(str(where))
    sites = {(layer, m): (g, index) for m in model.config.modules for layer, g, index in base.sites_of(m)}
    assert adapters.scale == model.config.scaling and adapters.A.keys() == base.groups_of(model.config.modules).keys()
    for t, task in enumerate(model.config.tasks):
        generated = model.generate(task)
        assert generated.keys() == sites.keys()
        for key, (A, B) in generated.items():
            g, index = sites[key]
            torch.testing.assert_close(adapters.A[g][t, index], A, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(adapters.B[g][t, index], B, rtol=1e-6, atol=1e-6)
            assert A.abs().max() > 0.1 and B.abs().max() > 0.1


@pytest.mark.parametrize("modules", [("q", "v"), ("down", *MODULES[:-1])])           # the order is the artifact's
def test_two_artifacts_become_one_run_and_go_back_bit_for_bit(world, modules):
    torch.manual_seed(1)
    a = save_artifact(world / "A", world / "base-a", "qwen3", modules)
    c = save_artifact(world / "C", world / "base-c", "gemma3", modules, shared=a)
    assert command(export, "--artifact", "A", "--run", "R") == 0
    assert command(export, "--artifact", "C", "--run", "R", "--ported") == 0
    for name, model in (("base-a", a), ("base-c", c)):
        assert_same_factors(world / "R", name, world / name, model)
        assert command(export, "--run", "R", "--to", name, "--portallib", "--out", f"back/{name}") == 0
        assert portallib.PortalModel.from_pretrained(world / "back" / name).config == model.config
        folders = name[-1].upper(), f"back/{name}"
        before, after = (load_file(world / folder / "model.safetensors") for folder in folders)
        assert set(before) == set(after) and all(torch.equal(before[k], after[k]) for k in before)
    saved = read_json(world / "R" / "portal.json")
    assert [b["base"] for b in saved["bases"]] == ["base-a"] and read_json(world / "R/converters/base-c.json")["ported"]


@pytest.mark.parametrize("modules", [("q", "v"), MODULES])
@pytest.mark.parametrize("architecture,layer_path", [("llama", "model.layers"),
                                                     ("gemma3-multimodal", "model.language_model.layers")])
def test_a_run_becomes_an_artifact_and_comes_back(tmp_path, modules, architecture, layer_path):
    run, where = make_run(tmp_path, save_tiny(tmp_path / "tiny", architecture), modules, norm="none")
    assert command(export, "--run", run, "--to", "tiny", "--portallib", "--out", tmp_path / "artifact") == 0
    model = portallib.PortalModel.from_pretrained(tmp_path / "artifact")
    assert_same_factors(run, "tiny", where, model)
    sizes = {key: getattr(model.config, key) for key in ("rank", "alpha", "d_z", "d_layer", "hidden", "d_core")}
    assert model.config == portallib.PortalConfig.from_model(                        # what portallib finds in the base
        tiny_model(architecture), tasks=TASKS, base_model_name_or_path=str(where), modules=modules,
        layer_path=layer_path, **sizes)
    assert command(export, "--artifact", tmp_path / "artifact", "--run", tmp_path / "again") == 0
    first, second = load_portal(run, ["tiny"]), load_portal(tmp_path / "again", ["tiny"])
    for get in (lambda p: {"z": p.z}, lambda p: p.core.state_dict(), lambda p: p.converters["tiny"].state_dict()):
        one, two = get(first), get(second)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("modules", [("q", "v"), MODULES])
@pytest.mark.parametrize("make", [hybrid, unlike])
def test_layers_that_differ_both_ways(world, make, modules):
    """portallib shares P_in between groups of one width; what it wrote comes back bit for bit, but for the embeddings of
    layers that have no site, which nothing reads. Once P_in has been refitted a group, each is written."""
    save(world / "d", make())
    model = save_artifact(world / "D", world / "d", None, modules, model=make().unpatch())
    assert command(export, "--artifact", "D", "--run", "R") == 0
    assert_same_factors(world / "R", "d", world / "d", model)
    assert command(export, "--run", "R", "--to", "d", "--portallib", "--out", "back") == 0
    assert portallib.PortalModel.from_pretrained(world / "back").config == model.config
    before, after = (load_file(world / folder / "model.safetensors") for folder in ("D", "back"))
    e = "alignment.layer_embeddings.weight"
    layers = sorted({target.layer_index for target in model.config.projection_targets})
    assert torch.equal(before.pop(e)[layers], after.pop(e)[layers])
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    portal = load_portal(world / "R", ["d"])
    for P in portal.converters["d"].parameters():
        P.data += 0.1 * torch.randn_like(P)
    save_converter(world / "R", portal, "d", "d")
    assert command(export, "--run", "R", "--to", "d", "--portallib", "--out", "again") == 0
    assert_same_factors(world / "R", "d", world / "d", portallib.PortalModel.from_pretrained(world / "again"))


def test_fused_projections_cannot_be_written(world, capsys):
    save(world / "tiny", base_of("Phi3ForCausalLM", pad_token_id=0))
    run, _ = make_run(world, world / "tiny", ("q", "v"), norm="none")
    assert command(export, "--run", run, "--to", "tiny", "--portallib", "--out", "x") == 2
    one_line(capsys, ["model.layers.0.self_attn.qkv_proj", "fused"])
    assert not (world / "x").exists()


def test_a_published_artifact_is_ported_by_its_hub_id(world, hub_cache, monkeypatch, capsys):
    """One line: the artifact becomes a run, and its tasks are ported with train.py's seed and data folder."""
    model = save_artifact(world / "A", world / "base-a", "qwen3", ("q", "v"))
    in_hub_cache(hub_cache, world / "A", "Org/portal-base-a", "0" * 40)
    monkeypatch.setattr("port.ROOT", world)
    flags = "--to ./base-b --n 4 --epochs 1 --batch-size 2".split()
    assert command(port, "--run", "Org/portal-base-a", *flags) == 0
    run = world / "out" / "portal-base-a"
    assert_same_factors(run, "base-a", world / "base-a", model)
    p = read_json(run / "converters" / "base-b.json")
    assert (p["ported"], p["n"], p["seed"], p["data"]) == (True, 4, 0, str(world / "data"))
    assert command(evaluation, "--run", "Org/portal-base-a@main", "--bases", "base-b", "--methods", "base,portal") == 0
    capsys.readouterr()
    assert command(port, "--run", "Org/missing", *flags) == 2
    one_line(capsys, ["Org/missing is no folder, and could not be loaded from the hub"])
    assert command(port, "--run", "out/missing", *flags) == 2
    one_line(capsys, ["out/missing: not a run folder"])


def test_groups_may_have_any_name(world):
    model = save_artifact(world / "A", world / "base-a", "qwen3", ("q", "v"))
    def rename(config):
        for target in config["projection_targets"]:
            m = target["module_name"]
            target["input_group"], target["output_group"] = f"into_{m}", f"from_{m}"
    def move(tensors):
        for m in "qv":
            tensors[f"alignment.input.into_{m}"] = tensors.pop(f"alignment.input.{m}")
            tensors[f"alignment.output.from_{m}"] = tensors.pop(f"alignment.output.{m}")
    change(world / "A", rename, move)
    assert command(export, "--artifact", "A", "--run", "R") == 0
    assert_same_factors(world / "R", "base-a", world / "base-a", model)


def test_a_run_that_was_read_is_a_run(world, capsys):
    """It is exported, ported from and evaluated; what the artifact does not say is asked for where it is needed."""
    save_artifact(world / "A", world / "base-a", "qwen3", ("q", "v"))
    assert command(export, "--artifact", "A", "--run", "R") == 0
    assert command(export, "--run", "R", "--to", "base-a", "--task", "two", "--out", "two") == 0
    assert "| seed | not recorded |" in (world / "two" / "README.md").read_text()
    def fails(words, module, *argv):
        before = fingerprint(world / "R")
        capsys.readouterr()
        assert command(module, *argv) == 2
        one_line(capsys, words)
        assert fingerprint(world / "R") == before
    quick = ["--run", "R", "--epochs", "1", "--batch-size", "2"]
    fails(["export.py --artifact", "--n", "--seed", "--data"], evaluation, *quick)
    fails(["no tasks here"], port, *quick, "--to", "./base-b", "--n", "4", "--data", "base-a")
    fails(["already holds base-a", "--overwrite"], export, "--artifact", "A", "--run", "R")
    known = ["--n", "8", "--seed", "0", "--data", "data"]
    assert command(export, "--artifact", "A", "--run", "R", "--overwrite", *known) == 0
    assert command(port, *quick, "--to", "./base-b", "--n", "4") == 0
    assert command(evaluation, *quick) == 0
    rows = [json.loads(line) for line in (world / "R" / "results.jsonl").read_text().splitlines()]
    roles = {(r["base"], r["role"], r["n"]) for r in rows if r["method"] == "portal"}
    assert roles == {("base-a", "seen", 8), ("base-b", "unseen", 4)}
    assert command(export, "--run", "R", "--to", "base-b", "--task", "two", "--out", "two", "--overwrite") == 0
    assert "not measured" not in (world / "two" / "README.md").read_text()


def test_an_artifact_is_a_run(world, capsys):
    """--run ARTIFACT reads it into out/<its name>, once, and goes on with that."""
    save_artifact(world / "A", world / "base-a", "qwen3", ("q", "v"))
    known = "--data", "data", "--seed", "0"
    assert command(port, "--run", "A", "--to", "./base-c", "--n", "4", "--epochs", "1", *known) == 0
    assert "run: out/A" in capsys.readouterr().out
    before = fingerprint(world / "out" / "A")
    assert {"converters/base-a.safetensors", "converters/base-c.safetensors"} <= set(before)
    assert command(port, "--run", "A", "--to", "./base-b", "--n", "4", "--epochs", "1", *known) == 0
    after = fingerprint(world / "out" / "A")
    assert all(after[name] == before[name] for name in before if name != "log.jsonl")
    save_artifact(world / "elsewhere" / "A", world / "base-a", "qwen3", ("k", "v"))  # another one of the same name
    capsys.readouterr()
    assert command(port, "--run", "elsewhere/A", "--to", "./base-c", *known) == 2
    one_line(capsys, ["out/A has other", "export.py --artifact", "--run DIR"])
    assert fingerprint(world / "out" / "A") == after
    save_artifact(world / "out" / "B", world / "base-a", "qwen3", ("q", "v"))        # one that lies in out/
    assert command(port, "--run", "out/B", "--to", "./base-c", "--n", "4", "--epochs", "1", *known) == 0
    assert (world / "out" / "B-run" / "converters" / "base-c.safetensors").exists()
    (world / "C").mkdir()
    for text in ("[1]", "{}"):
        (world / "C" / "config.json").write_text(text)
        assert command(evaluation, "--run", "C") == 2
        assert "not a run folder" in capsys.readouterr().err


def test_the_command_that_reads_an_artifact_may_then_lock_the_run(world):
    save_artifact(world / "A", world / "base-a", "qwen3", ("q", "v"))
    with run_folder.LOCKS:
        export.import_artifact(world / "A", world / "R")
        run_folder.lock(world / "R")


def test_an_artifact_in_the_working_folder_has_that_folders_name(world, monkeypatch):
    save_artifact(world / "A", world / "base-a", "qwen3", ("q", "v"))
    monkeypatch.chdir(world / "A")
    assert export.run_of(pathlib.Path(".")) == pathlib.Path("out", "A")
    assert (world / "A" / "out" / "A" / "converters" / "base-a.json").exists()


def test_what_is_recorded_of_an_artifact(world, capsys):
    """Its base with what is known of the fit; a seed or data folder that the run has already stays the run's."""
    a = save_artifact(world / "A", world / "base-a", "qwen3", ("q", "v"))
    save_artifact(world / "C", world / "base-c", "gemma3", ("q", "v"), shared=a)
    change(world / "C", lambda config: config.update(base_model_revision="f" * 40))
    shutil.copytree(world / "data", world / "other")
    data = str(world / "other")
    def record(name, folder, **known):
        path = world / folder / "model.safetensors"
        fit = dict(revision=None, ported=False, n=None, seed=None, data=None, date=None)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return {**fit, "base": name, "id": str(world / name), "artifact": digest, **known}
    def recorded():
        saved = read_json(world / "R" / "portal.json")
        assert saved.keys() == {"config", "bases", "seed", "data", "trained"} and saved["trained"] == trained
        return saved["bases"], saved["seed"], saved["data"]
    first = record("base-a", "A")
    export.import_artifact(world / "A", world / "R")
    trained = read_json(world / "R" / "portal.json")["trained"]
    assert recorded() == ([first], None, None) and read_json(world / "R" / "converters" / "base-a.json") == first
    fit = ["--n", "8", "--seed", "3", "--data", "other"]
    assert command(export, "--artifact", "C", "--run", "R", "--ported", *fit) == 0
    second = record("base-c", "C", revision="f" * 40, ported=True, n=8, seed=3, data=data)
    assert recorded() == ([first], 3, data) and read_json(world / "R" / "converters" / "base-c.json") == second
    again = ["--artifact", "A", "--run", "R", "--overwrite", "--seed", "0", "--data", "data"]
    assert command(export, *again) == 0
    third = record("base-a", "A", seed=0, data=str(world / "data"))
    assert recorded() == ([third], 3, data) and read_json(world / "R" / "converters" / "base-a.json") == third
    before = fingerprint(world / "R")
    shutil.rmtree(world / "other" / "three")
    capsys.readouterr()
    assert command(export, *again[:-1], "other") == 2
    one_line(capsys, ["unknown task 'three'", "other holds one, two"])
    with pytest.raises(BadInput, match="R already holds base-a; --overwrite"):
        export.import_artifact(world / "A", world / "R")
    with filelock.FileLock(world / ".R.lock"), pytest.raises(BadInput, match="R: process .* is writing into it"):
        export.import_artifact(world / "A", world / "R", overwrite=True)
    change(world / "A", lambda config: config.update(tasks=["one", "two", "four"]))  # the same numbers for other tasks
    with pytest.raises(BadInput, match="R has other tasks, sizes, latents or core than .*A;"):
        export.import_artifact(world / "A", world / "R", overwrite=True)
    assert fingerprint(world / "R") == before


def test_the_last_epochs_converter_is_replaced_too(world, monkeypatch):
    """final/ holds another converter where train.py selected an earlier epoch; killed midway, a run lacks the base."""
    save_artifact(world / "A", world / "base-a", "qwen3", ("q", "v"))
    assert command(export, "--artifact", "A", "--run", "R") == 0
    for P in (portal := load_portal(world / "R", ["base-a"])).converters["base-a"].parameters():
        P.data += 1
    save_converter(world / "R", portal, "base-a", "base-a", final=True)
    save_converter(world / "R", portal, "base-a", "base-c", final=True)
    assert command(export, "--artifact", "A", "--run", "R", "--overwrite") == 0
    one, two = (load_portal(world / "R", ["base-a"], final).converters["base-a"].state_dict()
                for final in (False, True))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert [p.name for p in (world / "R" / "final" / "converters").iterdir()] == ["base-c.safetensors"]
    def killed(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(ours, "save_converter", killed)
    assert command(export, "--artifact", "A", "--run", "R", "--overwrite") == 130
    assert provenances(world / "R") == {}


def change(folder, config=None, tensors=None, metadata=None):
    """Edit an artifact in place."""
    c, t = read_json(folder / "config.json"), load_file(folder / "model.safetensors")
    (config or (lambda c: None))(c), (tensors or (lambda t: None))(t)
    write_json(folder / "config.json", c)
    save_file(t, folder / "model.safetensors", metadata or ours.METADATA)


BAD = {  # name: (what is changed in the artifact, words of the one line)
    "other metadata": (dict(metadata={"format": "pt"}), ["format", "'portallib' is accepted"]),
    "a later format": (dict(config=lambda c: c.update(format_version=2)), ["format_version 1"]),
    "no sizes": (dict(config=lambda c: c.pop("d_core")), ["config.json", "d_core"]),
    "size of zero": (dict(config=lambda c: c.update(rank=0)), ["config.json", "above 0"]),
    "a task outside": (dict(config=lambda c: c.update(tasks=["one", "two", "../x"])), ["'../x'", "folder"]),
    "unknown base": (dict(config=lambda c: c.update(base_model_name_or_path="qwen99")), ["unknown base 'qwen99'"]),
    "unlike layers": (dict(config=lambda c: c["projection_targets"][0].update(input_group="other")),
                      ["of q of one shape", "different alignment groups"]),
    "a layer twice": (dict(config=lambda c: c["projection_targets"].append(c["projection_targets"][0])), ["twice"]),
    "a layer too many": (dict(config=lambda c: c.update(n_layers=2)), ["a layer that is not there"]),
    "a shared group": (dict(config=lambda c: [t.update(input_group="q") for t in c["projection_targets"]],
                            tensors=lambda t: t.pop("alignment.input.v")), ["share an alignment group"]),
    "a tensor too few": (dict(tensors=lambda t: t.pop("core.l1.bias")), ["tensors", "not those of its config.json"]),
    "a tensor too many": (dict(tensors=lambda t: t.update(extra=torch.zeros(1))), ["tensors", "not those"]),
    "other sizes": (dict(config=lambda c: c.update(hidden=5)), ["tensors", "not those"]),
    "other latents": (dict(tensors=lambda t: t["task_latents"].mul_(2)),
                      ["R has other tasks, sizes, latents", "--run"]),
}


def test_bad_input(world, capsys):
    model = save_artifact(world / "A", world / "base-a", "qwen3", ("q", "v"))
    assert command(export, "--artifact", "A", "--run", "R") == 0
    def fails(words, *argv):
        before = fingerprint(world)
        capsys.readouterr()
        assert command(export, *argv) == 2
        one_line(capsys, words)
        assert fingerprint(world) == before
    for name, (edits, words) in BAD.items():
        save_artifact(world / "C", world / "base-c", "gemma3", ("q", "v"), shared=model)
        change(world / "C", **edits)
        fails(words, "--artifact", "C", "--run", "R" if name == "other latents" else "new")
    fails(["--artifact", "--out"], "--run", "R")
    fails(["--run DIR is needed"], "--artifact", "A")
    fails(["--to BASE is needed"], "--run", "R", "--out", "x")
    fails(["--task TASK is needed", "'all'", "--portallib"], "--run", "R", "--to", "base-a", "--out", "x")
    writes = ["--run", "R", "--to", "base-a", "--out", "x"]
    fails(["--out does not go with --artifact"], "--artifact", "A", *writes)
    fails(["--task does not go with --portallib"], *writes, "--portallib", "--task", "one")
    fails(["--method does not go with --portallib"], *writes, "--portallib", "--method", "lora")
    fails(["--seed does not go with --out"], *writes, "--task", "one", "--seed", "0")
    fails(["neither empty nor a run folder"], "--artifact", "A", "--run", "data")
    fails(["config.json", "not readable"], "--artifact", "data", "--run", "new")
    fails(["no tasks here"], "--artifact", "A", "--run", "new", "--data", "base-a")
    fails(["'base-b' is not in R; it holds base-a"], "--run", "R", "--to", "base-b", "--portallib", "--out", "x")
    run, _ = make_run(world / "layered", world / "base-a")
    write_json(run / "converters" / "base-a.json", read_json(run / "converters" / "tiny.json"))
    fails(["has LayerNorm", "'layer'", "--norm none"], "--run", run, "--to", "base-a", "--portallib", "--out", "x")
