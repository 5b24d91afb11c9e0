"""A base has one name and one origin in every command: aliases, hub ids at a commit, links, .gguf files, changed files."""
import fnmatch, hashlib, json, os, shutil, types

import pytest, safetensors.torch, torch
from conftest import QUICK, command, in_hub_cache, one_line, save_tiny, write_task
from transformers import AutoModelForCausalLM

import eval as evaluation, export, port, train
from bases import (TOY, find_base, load_base, load_config, load_tokenizer, pretrained, recorded, refuse_twin,
                   reload_base, resolve, short_name, short_names, source_of, weight_files)
from bases.files import fingerprint
from bases.load import same
from exports.merge import files_of
from runtime.files import BadInput, read_json

A, B = "a" * 40, "b" * 40


def drift(folder, step=0.5):
    path = folder / "model.safetensors"
    tensors = {name: t + step if name.endswith("norm.weight") else t for name, t in safetensors.torch.load_file(path).items()}
    if path.is_symlink():                                                            # in a cache of the hub
        path.unlink()
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("spec, name, id", [
    ("qwen3-1.7b", "qwen3-1.7b", "Qwen/Qwen3-1.7B"), ("gemma-3-1b", "gemma-3-1b", "google/gemma-3-1b-pt"),
    ("Org/My.Model-7B@v1.0", "my.model-7b", "Org/My.Model-7B"), ("Org/x@refs/pr/1", "x", "Org/x"),
    ("toy-gemma", "toy-gemma", "toy-gemma"), ("./Some/Folder", "folder", "{here}/Some/Folder"),
    ("Some/../Folder/", "folder", "{here}/Some/../Folder"), (".", "{here_name}", "{here}"), ("sub/..", "{here_name}", "{here}"),
    ("a@b/c", "c", "{here}/a@b/c"), ("dir/Model.Q8_0.gguf", "model.q8_0", "{here}/dir/Model.Q8_0.gguf"), ("nope", "nope", "{here}/nope")])
def test_a_short_name_does_not_depend_on_what_exists(tmp_path, monkeypatch, spec, name, id):
    monkeypatch.chdir(tmp_path)
    source = source_of(spec)
    assert source.name == name.format(here_name=tmp_path.name.lower()) and source.id == id.format(here=tmp_path)
    assert source.on_hub == (not os.path.isabs(source.where)) and short_name(spec) == source.name


def test_a_link_has_its_own_name_in_every_command(world, capsys):
    (world / "mylink").symlink_to(world / "base-a")
    assert command(train, "--bases", "./mylink", *QUICK) == 0
    run, (p,) = world / "out" / "mylink", read_json(world / "out" / "mylink" / "portal.json")["bases"]
    assert p["base"] == "mylink" and p["id"] == str(world / "mylink")
    assert command(evaluation, "--bases", "./mylink", "--methods", "base") == 0
    for spec in ("mylink", world / "mylink", world / "base-a"):                      # the last is the very same folder
        assert command(export, "--to", spec, "--task", "one", "--out", world / "x", "--overwrite") == 0
    assert read_json(world / "x" / "adapter_config.json")["base_model_name_or_path"] == str(world / "mylink")
    write_task(world / "more", "four", 2, 1)
    assert command(train, "--add-task", "more/four", "--run", run, "--bases", "./mylink", "--epochs", 1) == 0
    capsys.readouterr()
    assert command(train, "--bases", "./mylink,./base-a", *QUICK) == 2
    one_line(capsys, ["./base-a", "./mylink", "two names of one base"])
    assert command(port, "--to", "./base-a", "--n", 4, "--epochs", 1) == 2           # no unseen base
    one_line(capsys, ["base-a has the weights of mylink"])


def test_another_base_of_the_same_short_name_is_another_base(trained, world, capsys):
    save_tiny(world / "other" / "base-a", seed=9)
    capsys.readouterr()
    for module, flags in ((evaluation, ["--bases", "other/base-a"]), (export, ["--to", "other/base-a", "--task", "one", "--out", "x"]),
                          (port, ["--to", "./other/base-a", "--overwrite"]), (evaluation, ["--bases", "/no/such/place/base-a"])):
        assert command(module, *flags) == 2
        one_line(capsys, ["base-a' is not the base base-a of", f"which is {world / 'base-a'}"])
    assert command(evaluation, "--bases", "base-z") == 2
    one_line(capsys, ["base 'base-z' is not in out/base-a+base-b; it holds base-a, base-b; python port.py --to NAME adds one"])


def test_a_base_that_the_run_holds_is_found_by_all_that_leads_to_it():
    held = {"gemma-3-1b": dict(base="gemma-3-1b", id="google/gemma-3-1b-pt", revision=A),
            "gemma-3-1b@8": dict(base="gemma-3-1b", id="google/gemma-3-1b-pt", revision=A),
            "x": dict(base="x", id="Org/X", revision=B, requested="v1.0")}
    for spec, tag in (("gemma-3-1b", "gemma-3-1b"), ("gemma-3-1b@8", "gemma-3-1b@8"), ("google/gemma-3-1b-pt", "gemma-3-1b"),
                      ("Gemma-3-1B", "gemma-3-1b"), (f"google/gemma-3-1b-pt@{A}", "gemma-3-1b"), ("google/gemma-3-1b-pt@main", "gemma-3-1b"),
                      ("Org/X", "x"), ("Org/X@v1.0", "x")):
        assert find_base(held, spec, "out/run") == tag
    for spec in (f"google/gemma-3-1b-pt@{B}", "Org/X@main", "Other/X", "./x", "Org/X@v1"):
        with pytest.raises(BadInput, match="is not"):
            find_base(held, spec, "out/run")
    with pytest.raises(BadInput, match=f"'Org/X@v1' is not the base x of out/run, which is Org/X@{B}"):
        find_base(held, "Org/X@v1", "out/run")


def test_two_paths_are_one_base_if_they_lead_to_one_file(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    (tmp_path / "link.gguf").symlink_to(tmp_path / "a.gguf"), (tmp_path / "here").symlink_to(tmp_path)
    a, b, link, other, gone = (source_of(str(tmp_path / name)) for name in ("a.gguf", "b.gguf", "link.gguf", "here/a.gguf", "gone"))
    assert same(a, link) and same(a, other) and same(gone, gone) and not same(a, b) and not same(a, gone)
    assert same(source_of("Org/X@v1"), source_of("Org/X")) and not same(source_of("Org/X"), source_of("Org/Y")) and not same(source_of("Org/X"), a)
    assert same(source_of("gemma-3-1b"), source_of("google/gemma-3-1b-pt")) and same(source_of("toy-gemma"), source_of(str(TOY["toy-gemma"])))


def test_a_base_is_loaded_again_under_the_name_that_the_run_gave_it(tmp_path):
    p = dict(base="other", id=str(save_tiny(tmp_path / "base")), revision="a branch of the artifact's", fingerprint=None)
    base = reload_base(p, "cpu", torch.bfloat16, recompute=True)
    assert base.name == "other" and base.model.dtype == torch.bfloat16 and base.provenance["id"] == p["id"]
    assert base.provenance["revision"] is None and hasattr(base.blocks[0].forward, "func")  # recomputed: a partial
    again = dict(p, fingerprint=base.provenance["fingerprint"])
    assert reload_base(again).provenance == base.provenance and not hasattr(reload_base(again).blocks[0].forward, "func")
    for part in ("weights", "config", "tokenizer"):
        changed = dict(p, fingerprint={**base.provenance["fingerprint"], part: "0"})
        with pytest.raises(BadInput, match=f"base other: {part} in {tmp_path}/base are not those"):
            reload_base(changed)
        assert reload_base(changed, allow_changed=True).name == "other"


def test_all_files_of_a_base_are_of_the_commit_asked_for(tmp_path, hub_cache, monkeypatch):
    """Commits differ in weights, config, tokenizer, EOS, adapter. The weights come with the model, after the rest."""
    folder, made = save_tiny(tmp_path / "base"), {}
    for commit, seed in ((A, 0), (B, 1)):                                            # B: the main branch
        save_tiny(folder, seed=seed)
        for name, change in (("config.json", dict(rms_norm_eps=1e-3 * (seed + 1))),
                             ("generation_config.json", dict(eos_token_id=[3, seed + 7]))):
            (folder / name).write_text(json.dumps({**read_json(folder / name), **change}))
        words = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(words.replace('"w7"', '"other7"') if seed else words)
        if seed:
            (folder / "adapter_config.json").write_text("{}")
        made[commit] = in_hub_cache(hub_cache, folder, "Org/Two", commit)
    assert load_config("Org/Two").rms_norm_eps == 2e-3 and load_config(f"Org/Two@{A}").rms_norm_eps == 1e-3
    assert load_tokenizer("Org/Two").limits.stops == [3, 8] and load_tokenizer(f"Org/Two@{A}").limits.stops == [3, 7]
    with pytest.raises(BadInput, match="base 'two' holds an adapter, too"):
        load_base("Org/Two")
    (made[A] / "model.safetensors").rename(tmp_path / "kept")
    def fetched(cls, source, **options):
        if cls is AutoModelForCausalLM:
            (tmp_path / "kept").rename(made[A] / "model.safetensors")
        return pretrained(cls, source, **options)
    monkeypatch.setattr("bases.load.pretrained", fetched)
    base = load_base(f"Org/Two@{A}")
    want = safetensors.torch.load_file(made[A] / "model.safetensors")
    assert all(torch.equal(want[name], t) for name, t in base.unpatch().state_dict().items())
    assert base.config.rms_norm_eps == 1e-3
    assert base.tokenizer("w7").input_ids == [11] and base.tokenizer.limits.stops == [3, 7]
    assert base.provenance == dict(id="Org/Two", revision=A, requested=A, quantize=None,
                                   fingerprint=fingerprint(made[A], weight_files(made[A])))
    def fetched_adapter(where, revision=None):                                       # it lies on the hub alone
        (made[revision] / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("bases.load.find_adapter_config_file", fetched_adapter)
    with pytest.raises(BadInput, match="base 'two' holds an adapter, too"):
        load_base(f"Org/Two@{A}")


def test_where_a_recorded_base_and_its_files_are(tmp_path, monkeypatch):
    """A commit is that of a hub id alone. Weights in other formats are not fetched from the hub."""
    folder = str(save_tiny(tmp_path / "base"))
    toy = str(TOY["toy-gemma"])
    for id, where, revision in ((folder, folder, None), ("Org/X", "Org/X", A), ("toy-gemma", toy, None)):
        p = dict(base="x", id=id, revision=A)
        assert recorded(p) == (p["base"], where, revision, None, p["id"])
        if p["id"] != "Org/X":
            assert str(files_of(p)) == where
    asked = []
    def fetch(*args, **options):
        asked.append((args, options))
        return folder
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert str(files_of(dict(base="x", id="Org/X", revision=A))) == folder
    patterns = asked[0][1].pop("ignore_patterns")
    assert asked == [(("Org/X",), dict(revision=A))]
    for name in ("model.safetensors", "model.safetensors.index.json", "tokenizer.model", "config.json"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    for name in ("pytorch_model.bin", "x.gguf", "onnx/model.onnx", "original/a.pth"):
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def test_one_set_of_weights_under_two_names_is_refused():
    """A base from an artifact has no fingerprint."""
    base = types.SimpleNamespace(name="a", provenance=dict(fingerprint=dict(weights="1", config="2")))
    same_weights, other = (dict(fingerprint=dict(weights=w, config=c)) for w, c in (("1", "3"), ("4", "2")))
    unknown = {}
    refuse_twin(base, {"a": same_weights, "b": other, "c": unknown})
    with pytest.raises(BadInput, match="base a has the weights of d, on which the core is trained"):
        refuse_twin(base, {"b": other, "c": unknown, "d": same_weights})


def test_the_commit_of_a_hub_id_is_recorded_and_loaded_again(world, hub_cache, capsys, monkeypatch):
    """The branch moves on after training; both commits are in the cache."""
    first = in_hub_cache(hub_cache, world / "base-a", "Org/Drift", A)
    assert command(train, "--bases", "Org/Drift", *QUICK) == 0
    run = world / "out" / "drift"
    second = in_hub_cache(hub_cache, world / "base-a", "Org/Drift", B)
    drift(second)
    assert (hub_cache / "models--Org--Drift" / "refs" / "main").read_text() == B
    (p,) = read_json(run / "portal.json")["bases"]
    assert (p["id"], p["revision"], p["requested"]) == ("Org/Drift", A, None) == tuple(
        read_json(run / "converters" / "drift.json")[key] for key in ("id", "revision", "requested"))
    state = reload_base(p).model.state_dict()
    assert torch.equal(state["model.norm.weight"], safetensors.torch.load_file(first / "model.safetensors")["model.norm.weight"])
    assert not torch.equal(load_base("Org/Drift").model.state_dict()["model.norm.weight"], state["model.norm.weight"])
    for spec in ("drift", "Org/Drift", f"Org/Drift@{A}"):
        assert command(evaluation, "--bases", spec, "--methods", "base,portal") == 0
    assert command(export, "--to", "Org/Drift", "--task", "one", "--out", world / "x") == 0
    config, card = read_json(world / "x" / "adapter_config.json"), (world / "x" / "README.md").read_text()
    assert (config["base_model_name_or_path"], config["revision"]) == ("Org/Drift", A) and card.count(A) == 2
    assert load_base("Org/Drift@main").provenance["requested"] == "main"
    assert command(export, "--to", "Org/Drift", "--task", "one", "--out", world / "merged", "--merge") == 0
    assert {p.name for p in (world / "merged").iterdir()} == {"README.md", *os.listdir(first)} == {"README.md", *os.listdir(files_of(p))}
    assert files_of(p) == first
    def unreachable(repo, local_files_only=False, **options):
        if not local_files_only:
            raise OSError("no network")
        return str(first)
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", unreachable)
        capsys.readouterr()
        assert files_of(p) == first and f"the hub is out of reach; its files are taken from {first}" in capsys.readouterr().out
    (second / "adapter_config.json").write_text("{}")
    assert load_base(f"Org/Drift@{A}").provenance["requested"] == A                   # the adapter is in the other commit
    with pytest.raises(BadInput, match="base 'drift' holds an adapter, too"):
        load_base("Org/Drift")
    shutil.rmtree(first)
    with pytest.raises(BadInput, match="base Org/Drift: its files could not be loaded from the hub"):
        files_of(p)
    with pytest.raises(BadInput, match="base Org/None could not be loaded from the hub"):
        load_base("Org/None")
    capsys.readouterr()
    assert command(evaluation, "--bases", "drift", "--methods", "base") == 2
    one_line(capsys, [f"base Org/Drift@{A} could not be loaded from the hub"])


def test_a_folder_with_the_name_of_a_hub_id_is_not_loaded_instead(world, monkeypatch):
    monkeypatch.setitem(__import__("bases").HUB, "alias", "Org/Name")
    assert resolve("alias").where == "Org/Name"
    save_tiny(world / "Org" / "Name")
    with pytest.raises(BadInput, match="a folder Org/Name is here, which has the name of its hub id"):
        resolve("alias")
    with pytest.raises(BadInput, match="Org/Name, a hub id, has the name of a folder here"):
        reload_base(dict(base="name", id="Org/Name", revision=A))


@pytest.mark.parametrize("what", ["weights", "config", "tokenizer"])
def test_other_files_than_those_of_the_fit_are_refused_unless_told(trained, world, capsys, what):
    """One number of one norm, one setting, or two words of the vocabulary that change places."""
    folder = world / "base-a"
    if what == "weights":
        drift(folder, 1e-3)
    elif what == "config":
        config = read_json(folder / "config.json")
        (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    else:
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"w7"', '"w?"').replace('"w8"', '"w7"').replace('"w?"', '"w8"'))
    saved = read_json(trained / "portal.json")                                       # --align takes the nearest base
    (trained / "portal.json").write_text(json.dumps({**saved, "bases": saved["bases"][:1]}))
    commands = [(evaluation, ["--bases", "base-a", "--methods", "base"]), (export, ["--to", "base-a", "--task", "one", "--out", "x"]),
                (port, ["--to", "./base-c", "--n", 4, "--epochs", 1, "--align"]),
                (train, ["--add-task", "more/four", "--run", trained, "--bases", "base-a", "--epochs", 1])]
    write_task(world / "more", "four", 2, 1)
    for module, flags in commands if what == "weights" else commands[:1]:
        capsys.readouterr()
        assert command(module, *flags) == 2
        one_line(capsys, [f"base base-a: {what} in {folder} are not those that its converter was fitted on", "--allow-changed-base"])
        assert command(module, *flags, "--allow-changed-base") == 0


def test_the_fingerprint_is_of_the_numbers_alone(tmp_path):
    """Not of the shards, the dtype that config.json proposes, or the version that wrote it."""
    folder = save_tiny(tmp_path / "base")
    load = load_base(str(folder))
    load.unpatch().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "shards")
    config = read_json(folder / "config.json")
    (tmp_path / "shards" / "config.json").write_text(json.dumps({**config, "dtype": "float16", "transformers_version": "4.0"}))
    one, many = ({**fingerprint(each, weight_files(each))} for each in (folder, tmp_path / "shards"))
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items()))))  # in another order
    assert fingerprint(folder, weight_files(folder)) == one
    assert one == many and one.keys() == {"weights", "config", "tokenizer"} and len(list((tmp_path / "shards").glob("*.safetensors"))) > 2


def test_a_fingerprint_sees_every_file_and_number(tmp_path):
    """Against digests made here, tensor by tensor."""
    folder = save_tiny(tmp_path / "base")
    found = fingerprint(folder, weight_files(folder))
    rows = [[name, "F32", list(t.shape), hashlib.sha256(t.numpy().tobytes()).hexdigest()]
            for name, t in safetensors.torch.load_file(folder / "model.safetensors").items()]
    assert found["weights"] == hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()
    tensors = sorted(safetensors.torch.load_file(folder / "model.safetensors").items())
    halves = [folder / f"{k}.safetensors" for k in range(2)]                         # every second tensor in each
    for k, path in enumerate(halves):
        safetensors.torch.save_file(dict(tensors[k::2]), path)
    assert fingerprint(folder, halves) == found
    (folder / "tokenizer.model").write_bytes(b"\xff\x00")                            # no text
    (folder / "README.md").write_text("is no part of it")
    more = fingerprint(folder, weight_files(folder))
    assert more["tokenizer"] != found["tokenizer"] and more["config"] == found["config"] and more["weights"] == found["weights"]
    settings = read_json(folder / "tokenizer_config.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ x }}"}))
    assert fingerprint(folder, weight_files(folder)) == more
    (folder / "x.gguf").write_bytes(b"GGUF")
    assert fingerprint(folder, [folder / "x.gguf"], "x.gguf") == {"weights": hashlib.sha256(b"GGUF").hexdigest()}


def test_short_names(tmp_path):
    folder = str(save_tiny(tmp_path / "base"))
    with pytest.raises(BadInput, match="same short name"):
        short_names([folder, str(save_tiny(tmp_path / "other" / "Base"))])
    (tmp_path / "link").symlink_to(folder)
    for names in ([folder, str(tmp_path / "link")], [str(tmp_path / "link"), folder]):
        with pytest.raises(BadInput, match="two names of one base"):
            short_names(names)
    assert short_names([folder, "toy-gemma"]) == ["base", "toy-gemma"]


def test_a_base_that_moved_is_the_one_with_its_fingerprint(trained, world, capsys):
    """Under any name; everything that loads it takes the new place, also beside a LoRA that was fitted before."""
    assert command(evaluation, "--bases", "base-a", "--methods", "base,lora") == 0
    lora = (trained / "baselines" / "lora" / "base-a.json").read_bytes()
    (world / "far").mkdir(), trained.rename(world / "far" / "run"), (world / "base-a").rename(world / "far" / "renamed")
    def fails(module, words, *argv):
        capsys.readouterr()
        assert command(module, "--run", "far/run", *argv) == 2
        one_line(capsys, words)
    fails(evaluation, [f"there is no base at {world / 'base-a'} any more", "--bases"], "--methods", "base")
    fails(evaluation, ["base './base-c' is not in far/run"], "--bases", "./base-c")
    assert command(evaluation, "--run", "far/run", "--bases", "far/renamed,base-b", "--methods", "base,lora,portal") == 0
    assert (world / "far" / "run" / "baselines" / "lora" / "base-a.json").read_bytes() == lora
    assert command(export, "--run", "far/run", "--to", "far/renamed", "--task", "one", "--merge", "--out", "x") == 0
    assert str(world / "far" / "renamed") in (world / "x" / "README.md").read_text()
    assert command(port, "--run", "far/run", "--to", "./base-c", "--n", 4, "--epochs", 1, "--teacher", "far/renamed") == 0
    (world / "far" / "renamed").rename(world / "far" / "base-a")
    drift(world / "far" / "base-a", 1e-3)
    fails(export, ["is not the base base-a of far/run", "its weights differ"], "--to", "far/base-a", "--task", "one", "--out", "y")


@pytest.mark.parametrize("broken", ["model.safetensors", "tokenizer.json", "config.json", "x.gguf"])
def test_a_file_that_is_not_there_in_truth_is_named_with_the_cause(world, capsys, broken):
    """A Git LFS pointer or a link to nowhere, in place of a file of the base; the folder itself; a name that names no file."""
    folder = world / "base-a"
    base = folder / broken if broken.endswith("gguf") else folder
    for make, words in ((lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "a Git LFS pointer, not the file itself"),
                        (lambda p: p.symlink_to("gone"), "a link to gone, where nothing is")):
        (folder / broken).unlink(missing_ok=True)
        make(folder / broken)
        assert command(train, "--bases", base, *QUICK) == 2
        one_line(capsys, [broken, words])
    (world / "link").symlink_to("nowhere"), (world / "base-b").rename(world / "win\\base")
    for spec, words in (("./link", "a link to nowhere, where nothing is"), ("./win\\base", "rename it: accepted is a name in UTF-8")):
        assert command(train, "--bases", spec, *QUICK) == 2
        one_line(capsys, [words])
