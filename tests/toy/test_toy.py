"""The toy on disk: build.py writes the same tasks, and the bases do every skill by name and no task."""
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bases import load_base
from runtime.files import ROOT
from toy import build
from tasks.rows import load_tasks


@pytest.fixture(scope="module")
def tasks():
    return load_tasks(ROOT / "toy" / "data")


def test_fourteen_tasks_and_two_kept_aside(tasks):
    aside = load_tasks(ROOT / "toy" / "data_aside")
    assert len(tasks) == 14 and sorted(aside) == sorted(build.ASIDE) and set(tasks) | set(aside) == set(build.SKILLS)
    for task, splits in {**tasks, **aside}.items():
        assert len(splits["train"]) == 1000 and len(splits["eval"]) == 200
        assert not {r.prompt for r in splits["train"]} & {r.prompt for r in splits["eval"]}
        for row in splits["train"][:50] + splits["eval"]:
            words = row.prompt.removeprefix("Words: ").removesuffix("\nAnswer:").split(", ")
            assert row.choices[row.gold] == " " + build.SKILLS[task](words) and len(set(row.choices)) == 4
            assert all(c[1:] in words for c in row.choices) and task not in row.prompt


def test_the_tasks_on_disk_are_those_that_the_builder_writes(tmp_path):
    build.write_tasks({task: tmp_path / task for task in ("largest", "fourth")})
    for path in tmp_path.glob("*/*"):
        folder = ROOT / "toy" / ("data_aside" if path.parent.name in build.ASIDE else "data")
        assert path.read_bytes() == (folder / path.parent.name / path.name).read_bytes()
    assert len(list(tmp_path.glob("*/*"))) == 4


@pytest.mark.parametrize("name", build.BASES)
def test_a_base_knows_the_skills_and_not_the_tasks(name, tasks):
    assert (build.HERE / name / "model.safetensors").stat().st_size < 1_000_000
    base, n = load_base(str(build.HERE / name)), 20 if name == "toy-hybrid" else 25   # it is the slowest by far
    accuracy = build.accuracy(base, [row for skill in build.SKILLS for row in build.questions(skill, n)])
    assert len(accuracy) == 16 and min(accuracy.values()) >= 0.95, accuracy
    rows = [row for splits in tasks.values() for row in splits["eval"][:n // 2]]
    assert sum(build.accuracy(base, rows).values()) / 14 <= 0.45  # refuses a prompt that is cut


def test_the_bases_are_unlike():
    small, medium, large, gemma, hybrid = bases = [load_base(str(build.HERE / name)) for name in build.BASES]
    assert len({base.groups["q"][2:] for base in bases}) == len(bases) == 5
    assert len(large.blocks) > len(medium.blocks) and large.groups["q"].d_in > medium.groups["q"].d_in
    qwen_ids, gemma_ids = (base.tokenizer("Words: red, cat\nAnswer:").input_ids for base in (small, gemma))
    assert qwen_ids != gemma_ids and gemma_ids[0] == gemma.tokenizer.bos_token_id
    assert small.tokenizer.bos_token_id is None
    assert "sliding_attention" in gemma.config.layer_types


def test_the_hybrid_by_plain_forward_passes():
    """One unpadded prompt a pass, without Base, batches or masks, which have to get a recurrent model right."""
    folder = build.HERE / "toy-hybrid"
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()) and model.config.model_type == "qwen3_5_text" and model.config.head_dim == 32
    kinds = model.config.layer_types
    assert 2 <= kinds.count("full_attention") < kinds.count("linear_attention") == sum(
        hasattr(layer, "linear_attn") for layer in model.model.layers)
    attention = model.model.layers[kinds.index("full_attention")].self_attn
    assert attention.q_proj.out_features == 2 * attention.o_proj.in_features  # a query and its gate
    tok = AutoTokenizer.from_pretrained(folder)
    for skill in build.SKILLS:
        rows = build.questions(skill, 10)
        with torch.no_grad():
            said = [model(torch.tensor([tok(row.prompt).input_ids])).logits[0, -1].argmax() for row in rows]
        assert [tok(row.choices[0]).input_ids for row in rows] == [[token] for token in said], skill
