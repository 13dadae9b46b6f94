"""The stages `text` and `bbox`: engines by string, models of the real classes, retries, vLLM."""

from __future__ import annotations

import base64
import json
import pickle
import sys
import types

import cv2
import numpy as np
import pytest

from kaleido_jax.annotate import prompts
from kaleido_jax.annotate.describe import dialect_of
from kaleido_jax.annotate.engines import ENGINES, make_engine
from kaleido_jax.annotate.language import LanguageEngine
from kaleido_jax.annotate.models import ModelSource
from kaleido_jax.annotate.protocols import Answer, Example, Result, seed_of
from kaleido_jax.annotate.vllm import requests, resized
from kaleido_jax.data import ShapesSource
from kaleido_jax.errors import UserError
from kaleido_jax.latents import blob
from tests import tiny_annotators as tiny

torch = pytest.importorskip("torch", reason="needs the extra `annotate`")
pytest.importorskip("transformers", reason="needs the extra `annotate`")
torch.set_num_threads(1)  # models this small only wait for each other's threads


def example(number: int = 0, size: int = 64, caption: str = "a dog", **how) -> Example:
    image = ShapesSource(9, seed=2, size=size)[number]["image"]
    return Example(f"k{number}", image, caption, **how)


DESCRIPTION = "A red shape lies left of a blue shape on a white background."
GROUNDED = 'A red shape.\n[{"bbox_2d": [7, 14, 28, 42], "label": "red shape"}]'


# ---- models of transformers ----------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def model(request, tmp_path_factory):
    return tiny.qwen(tmp_path_factory.mktemp("models") / request.param, request.param)


def test_random_models_answer_the_same_alone_and_in_a_batch(model):
    """Prompts of different lengths and pictures of different sizes: left padding at work."""
    examples = [example(0), example(1, 96, "a much longer caption of two dogs"), example(2)]
    for stage in ("text", "bbox"):
        engine = make_engine(stage, f"hf:{model}", {"max_new_tokens": 8, "batch_size": 3})
        engine = pickle.loads(pickle.dumps(engine))
        engine.setup()
        results = engine.annotate(examples, seed=0)
        assert [r.status for r in results] == ["rejected"] * 3 and all(r.raw for r in results)
        assert results == engine.annotate(examples, seed=0)
        alone = [engine.annotate([one], seed=0)[0] for one in examples]
        assert [r.raw for r in alone] == [r.raw for r in results]


def test_answers_drawn_with_a_seed(model):
    engine = make_engine("text", f"hf:{model}", {"max_new_tokens": 8})
    engine.setup()
    state = torch.random.get_rng_state()
    asked = ([example().image], ["say something"])
    first, again, other = (engine._model.describe(*asked, seed)[0].raw for seed in (1, 1, 2))
    assert first == again != other
    assert (torch.random.get_rng_state() == state).all()


@pytest.mark.parametrize(
    ("kind", "dialect", "said"),
    [
        # The 64 pixels are seen as 56 by Qwen2.5-VL here, whose boxes are in those pixels.
        ("qwen2_5_vl", "qwen2.5-vl", "A red shape (125, 250, 500, 750)."),
        ("qwen3_vl", "qwen3-vl", "A red shape (7, 14, 28, 42)."),
    ],
)
def test_a_taught_model_from_picture_to_latent(tmp_path, kind, dialect, said):
    one = example()
    folder = tiny.qwen(tmp_path / kind, kind)
    tiny.teach(folder, one.image, prompts.GROUNDING_JSON, GROUNDED)
    engine = make_engine("bbox", f"hf:{folder}", {"max_new_tokens": 90})
    assert engine.provenance["parameters"]["dialect"] == dialect
    engine.setup()
    result = engine.annotate([one], seed=0)[0]
    assert result == Result(said, "ok", (), GROUNDED)
    # Stopped early: the sentence is there, the box is not.
    short = make_engine("bbox", f"hf:{folder}", {"max_new_tokens": 40})
    assert short.annotate([one], seed=0)[0].status == "rejected"


def test_the_largest_picture_can_be_limited(tmp_path):
    folder = tiny.qwen(tmp_path / "model")
    sizes = []
    for limit in (0, 28 * 28):
        engine = make_engine("bbox", f"hf:{folder}", {"max_new_tokens": 2, "max_pixels": limit})
        engine.setup()
        sizes.append(engine._model.ground([example(0, 96).image], None)[0].size)
    assert sizes == [(84, 84), (28, 28)]


def test_models_that_cannot_be_asked(tmp_path):
    folder = tiny.qwen(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        make_engine("text", f"hf:{folder}").setup()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        make_engine("text", f"hf:{tmp_path / 'empty'}")
    siglip = tiny.backbone(tmp_path / "siglip")
    with pytest.raises(UserError, match="cannot be loaded"):
        make_engine("text", f"hf:{siglip}").setup()
    with pytest.raises(UserError, match="does not tell how it writes boxes"):
        make_engine("bbox", f"hf:{siglip}")
    with pytest.raises(UserError, match="no dtype 'float3'"):
        make_engine("text", f"hf:{tiny.qwen(tmp_path / 'm')}", {"dtype": "float3"}).setup()


def test_dialects_by_name_and_by_config(model):
    expected = {"qwen2_vl": "qwen2-vl", "qwen2_5_vl": "qwen2.5-vl", "qwen3_vl": "qwen3-vl"}
    assert dialect_of(ModelSource.parse("hf", str(model))) == expected[model.name]
    for name, dialect in (
        ("Qwen/Qwen2-VL-7B-Instruct", "qwen2-vl"),
        ("Qwen/Qwen2.5-VL-3B-Instruct@main", "qwen2.5-vl"),
        ("Qwen/Qwen3-VL-4B-Instruct", "qwen3-vl"),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", "qwen3-vl"),
    ):
        assert dialect_of(ModelSource.parse("hf", name)) == dialect
    assert dialect_of(ModelSource.parse("hf", "org/model"), "qwen2-vl") == "qwen2-vl"
    with pytest.raises(UserError, match="no dialect 'x'"):
        dialect_of(ModelSource.parse("hf", "org/model"), "x")


def test_provenance_follows_what_decides_the_answers(tmp_path):
    folder = tiny.qwen(tmp_path / "model")
    first = make_engine("text", f"hf:{folder}").provenance
    json.dumps(first)
    assert first["prompt_sha256"] == prompts.sha256(prompts.CAPTION, prompts.LABEL)
    (tmp_path / "elsewhere").mkdir()
    folder.rename(tmp_path / "elsewhere" / "model")
    moved = tmp_path / "elsewhere" / "model"
    assert make_engine("text", f"hf:{moved}").provenance == first
    others = [
        make_engine("text", f"hf:{moved}", {"max_new_tokens": 9}).provenance,
        make_engine("text", f"hf:{moved}", {"prompt": "label"}).provenance,
        make_engine("bbox", f"hf:{moved}").provenance,
        make_engine("text", "hf:Qwen/Qwen3-VL-4B-Instruct@abc").provenance,
    ]
    (moved / "model.safetensors").write_bytes(b"other")
    others.append(make_engine("text", f"hf:{moved}").provenance)
    assert first not in others and others[3]["revision"] == "abc"


# ---- what the stage makes of answers -------------------------------------------------------------


class Said:
    """A model that says what it is told, by the seed it is drawn with."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def describe(self, images, prompts, seed):
        self.asked.append((len(images), tuple(prompts), seed))
        if any((image == 7).all() for image in images):
            raise RuntimeError("out of\nmemory")
        return [Answer(self.answers[seed is not None])] * len(images)

    def ground(self, images, seed):
        return self.describe(images, [""] * len(images), seed)


def engine_of(stage, *answers, **how):
    said = Said(answers)
    return LanguageEngine(stage, lambda: said, "qwen-vl", {"engine": "said"}, **how), said


def test_another_script_is_asked_once_more_with_another_seed():
    engine, said = engine_of("text", "一只狗在草地上奔跑,天气很好", DESCRIPTION)
    result = engine.annotate([example()], seed=5)[0]
    assert (result.latent, result.status) == (DESCRIPTION, "repaired")
    assert "asked once more with another seed" in result.issues and result.raw == DESCRIPTION
    assert [seed for *_, seed in said.asked] == [None, seed_of(5, "retry text", "k0")]
    engine, said = engine_of("bbox", "<ref>狗</ref><box>(1,1),(99,99)</box>", "狗狗狗")
    assert engine.annotate([example()], seed=5)[0].status == "rejected"
    assert len(said.asked) == 2


def test_one_bad_picture_does_not_cost_the_others():
    engine, said = engine_of("text", DESCRIPTION, batch_size=3)
    bad = Example("bad", np.full((64, 64, 3), 7, np.uint8))
    results = engine.annotate([example(0), bad, example(1), example(2)], seed=0)
    assert [r.status for r in results] == ["ok", "failed", "ok", "ok"]
    assert results[1].issues == ("RuntimeError: out of memory",)
    assert [count for count, *_ in said.asked] == [3, 1, 1, 1, 1]


def test_captions_and_labels_choose_the_prompt():
    engine, said = engine_of("text", DESCRIPTION)
    engine.annotate([example(caption="a dog"), example(metadata={"label": "tench"})], seed=0)
    caption, label = said.asked[0][1]
    assert caption == prompts.CAPTION.format("a dog") and label == prompts.LABEL.format("tench")


def test_results_are_consistent():
    assert len(Result("", "rejected", raw="x" * 9999).raw) == 2000
    for latent, status in (("", "ok"), ("a", "empty"), ("a", "fine")):
        with pytest.raises(ValueError):
            Result(latent, status)


# ---- vLLM, without vLLM --------------------------------------------------------------------------


class Served:
    """What vllm.LLM offers of what is used: keeps its arguments, answers in its output classes."""

    def __init__(self, **arguments):
        self.arguments, self.calls = arguments, []

    def chat(self, conversations, sampling, use_tqdm):
        self.calls.append((conversations, sampling, use_tqdm))
        done = types.SimpleNamespace(text=GROUNDED + "<|im_end|>", finish_reason="stop")
        cut = types.SimpleNamespace(text=GROUNDED[:40], finish_reason="length")
        said = [cut if i % 2 else done for i in range(len(conversations))]
        return [types.SimpleNamespace(outputs=[one]) for one in said]


@pytest.fixture
def library(monkeypatch):
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = Served, lambda **how: how
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_vllm_in_pixels(library):
    engine = make_engine("bbox", "vllm:Qwen/Qwen2.5-VL-7B-Instruct@abc", {"max_model_len": 2048})
    engine = pickle.loads(pickle.dumps(engine))
    engine.setup()
    served = engine._model._model
    assert served.arguments["model"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert served.arguments["revision"] == "abc" and served.arguments["max_model_len"] == 2048
    assert served.arguments["mm_processor_kwargs"]["max_pixels"] == 1280 * 28 * 28
    whole, cut = engine.annotate([example(0, 256), example(1, 256)], seed=0)
    # 256 pixels are seen as 252.
    assert whole.latent == "A red shape (28, 56, 111, 167)."
    assert cut.status == "rejected" and cut.raw == GROUNDED[:40]
    conversations, sampling, _ = served.calls[0]
    assert sampling == {"max_tokens": 768, "skip_special_tokens": False, "temperature": 0.0}
    assert conversations[0][0]["content"][1] == {"type": "text", "text": prompts.GROUNDING_JSON}


def test_vllm_in_thousandths(library):
    engine = make_engine("bbox", "vllm:Qwen/Qwen3-VL-8B-Instruct")
    assert engine.annotate([example(0, 256)], seed=0)[0].latent == "A red shape (7, 14, 28, 42)."
    assert "mm_processor_kwargs" not in engine._model._model.arguments
    text = make_engine("text", "vllm:org/any-model")
    text.setup()
    text._model.describe([example().image], ["say"], 7)
    sampling = text._model._model.calls[0][1]
    assert sampling["seed"] == 7 and sampling["temperature"] > 0 and sampling["max_tokens"] == 256


def test_requests_carry_the_exact_picture():
    image = example().image
    (message,) = requests([image], ["say"])[0]
    address = message["content"][0]["image_url"]["url"]
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    assert (cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) == image).all()


def test_the_size_that_qwen2_5_sees_is_that_of_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    draw = np.random.default_rng(0)
    sides = [
        (int(w), int(h))
        for w, h in draw.integers(20, 3000, (300, 2))
        if max(w, h) < 150 * min(w, h)
    ]
    for width, height in [*sides, (28, 28), (14, 14), (256, 256), (1024, 1024)]:
        theirs = smart_resize(height, width, 28, 56 * 56, 28 * 28 * 1280)
        assert resized(width, height) == theirs[::-1]


def test_without_vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="pip install vllm"):
        make_engine("text", "vllm:Qwen/Qwen3-VL-8B-Instruct").setup()


# ---- Qwen-VL's own format ------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False])
def test_qwen_vl_with_its_own_code(tmp_path, monkeypatch, chat):
    """A stand-in for code that only old transformers run: code from the model's folder."""
    from transformers import dynamic_module_utils

    cache = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(sys, "path", [*sys.path, str(cache)])
    folder = tiny.remote_code(tmp_path / f"model{chat}", chat)
    with pytest.raises(UserError, match="trust_remote_code=True"):
        make_engine("bbox", f"qwen-vl:{folder}")
    options = {"trust_remote_code": True, "max_new_tokens": 6}
    engine = pickle.loads(pickle.dumps(make_engine("bbox", f"qwen-vl:{folder}", options)))
    engine.setup()
    answers = engine._model.ground([example().image], None)
    assert answers == engine._model.ground([example().image], None)
    assert answers[0].raw.startswith("ounding:|") == chat
    first, again, other = (
        engine._model.describe([example().image], ["Say: a"], s) for s in (1, 1, 2)
    )
    assert first == again != other
    assert engine.annotate([example()], seed=0)[0].status in ("rejected", "empty")


def test_answers_collected_elsewhere(tmp_path):
    raw = f"{prompts.GROUNDING}<ref>a dog</ref><box>(1,2),(300,400)</box><|endoftext|>"
    path = tmp_path / "answers.jsonl"
    path.write_text(
        json.dumps({"key": "k0", "raw": raw}) + "\n" + json.dumps({"key": "x", "raw": ""})
    )
    engine = pickle.loads(pickle.dumps(make_engine("bbox", f"qwen-vl:{path}")))
    engine.setup()
    found, missing = engine.annotate([example(0), example(1)], seed=0)
    assert (found.latent, found.status) == ("a dog (1, 2, 300, 400)", "repaired")
    assert missing.status == "failed" and "no answer for this key" in missing.issues[0]
    path.write_text(json.dumps({"key": "k0", "raw": DESCRIPTION}))
    assert make_engine("text", f"qwen-vl:{path}").annotate([example(0)], 0)[0].latent == DESCRIPTION
    path.write_text('{"key": "k0"}\n')
    with pytest.raises(UserError, match="line 1"):
        make_engine("text", f"qwen-vl:{path}").setup()
    with pytest.raises(UserError, match="cannot read"):
        make_engine("text", f"qwen-vl:{tmp_path / 'none'}.jsonl")


# ---- engines by string, the oracle ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "spec", "options", "words"),
    [
        ("texts", "oracle", {}, "no annotation stage 'texts'"),
        ("text", "oracel", {}, "did you mean oracle"),
        ("text", "zzz", {}, "there are oracle, hf"),
        ("voken", "oracle", {}, "cannot do voken; seed, kmeans, patch, fsq can"),
        ("text", "patch:default", {}, "cannot do text"),
        ("text", "oracle:x", {}, "takes no argument"),
        ("text", "oracle", {"max_object": 3}, "did you mean max_objects"),
        ("text", "oracle", {"max_objects": 0}, "at least 1"),
        ("text", "hf:", {}, "needs a model"),
        ("text", "hf:./nothing", {}, "no folder with a model"),
        (
            "text",
            "hf:org/model",
            {"batch_size": 0},
            "batch_size must be a whole number of at least 1",
        ),
        ("text", "hf:org/model", {"prompt": "short"}, "no prompt 'short'"),
        ("blob", "hf:", {}, "needs a model"),
        ("voken", "patch", {}, "needs a codebook"),
        ("voken", "kmeans", {}, "needs a codebook"),
        ("voken", "fsq", {}, "needs a codebook"),
        ("voken", "seed", {}, "needs the weights"),
    ],
)
def test_misuse_is_named(stage, spec, options, words):
    with pytest.raises(UserError, match=words) as caught:
        make_engine(stage, spec, options)
    assert "\n" not in str(caught.value)


def test_every_stage_has_an_engine_that_downloads_nothing():
    for stage, spec in (
        ("text", "oracle"),
        ("bbox", "oracle"),
        ("blob", "oracle"),
        ("voken", "patch:default"),
    ):
        engine = make_engine(stage, spec)
        assert engine.stage == stage and json.dumps(engine.provenance)
    assert {s for makers in ENGINES.values() for s in makers} == {"text", "bbox", "blob", "voken"}


def test_the_oracle_tells_the_truth_of_shapes():
    source = ShapesSource(5, seed=6, size=64)
    records = [source[i] for i in range(5)]
    for stage in ("text", "bbox", "blob"):
        engine = pickle.loads(pickle.dumps(make_engine(stage, "oracle")))
        engine.setup()
        examples = [Example(f"00000/{r['key']}", r["image"]) for r in records]
        expected = [r["latents"][stage] for r in records]
        assert [r.latent for r in engine.annotate(examples, seed=0)] == expected
        wrong = Example(records[0]["key"], records[1]["image"])
        assert engine.annotate([wrong], 0)[0].status == "failed"


def test_the_oracle_reads_a_shards_json():
    thing = {
        "label": "cup",
        "bbox_xyxy": [100, 200, 500, 600],
        "polygon": [100, 200, 500, 200, 500, 600, 100, 600],
    }
    image = np.zeros((64, 64, 3), np.uint8)
    said = {
        stage: make_engine(stage, "oracle").annotate(
            [Example("k", image, metadata={"objects": [thing]})], 0
        )[0]
        for stage in ("text", "bbox", "blob")
    }
    assert said["bbox"].latent == "cup (100, 200, 500, 600)"
    (seen,) = blob.parse(said["blob"].latent)
    assert (
        seen.phrase == "cup" and abs(seen.ellipses[0].xc - 300) + abs(seen.ellipses[0].yc - 400) < 4
    )
    assert "cup" in said["text"].latent
    engine = make_engine("bbox", "oracle")
    assert engine.annotate([Example("k", image)], 0)[0].status == "empty"
    broken = Example("k", image, metadata={"objects": [{"label": 3}]})
    assert engine.annotate([broken], 0)[0].status == "failed"
