"""Visual tokens: SEED against plain arithmetic, features with k-means, patches, FSQ."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from kaleido_jax.annotate.engines import make_engine
from kaleido_jax.annotate.protocols import Example
from kaleido_jax.data import ShapesSource
from kaleido_jax.errors import UserError
from kaleido_jax.latents import voken
from kaleido_jax.models import voken_tokenizer
from tests import tiny_annotators as tiny

torch = pytest.importorskip("torch", reason="needs the extra `annotate`")
pytest.importorskip("transformers", reason="needs the extra `annotate`")
torch.set_num_threads(1)  # models this small only wait for each other\'s threads
pytest.importorskip("sklearn", reason="needs the extra `annotate`")

from kaleido_jax.annotate import features, fsq, seed  # noqa: E402


def pictures(count: int, size: int = 32) -> np.ndarray:
    source = ShapesSource(count, seed=5, size=size)
    return np.stack([source[i]["image"] for i in range(count)])


def examples(images) -> list[Example]:
    return [Example(f"k{i}", image) for i, image in enumerate(images)]


def check(engine, images, num_codes: int) -> np.ndarray:
    """Runs an engine as a worker does; its ids, the same whatever the batch."""
    engine = pickle.loads(pickle.dumps(engine))
    engine.setup()
    results = engine.annotate(examples(images), seed=0)
    assert [r.status for r in results] == ["ok"] * len(images)
    ids = np.array([voken.parse(r.latent, num_codes) for r in results])
    alone = [engine.annotate([example], seed=1)[0].latent for example in examples(images)]
    assert alone == [r.latent for r in results]
    return ids


# ---- SEED ----------------------------------------------------------------------------------------


def reference(weights, vision, image, vision_heads: int, query_heads: int):
    """SEED's encoder from its description, in plain tensors of one picture: [32, width]."""

    def norm(x, name, eps, tensors=weights):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def attend(q, k, v, heads, mask=None):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k, v))
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)

    def linear(x, name, tensors=weights):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    gelu = torch.nn.functional.gelu
    pixels = seed.prepare(image, 28)
    kernel = vision["patch_embed.proj.weight"]
    patches = pixels.unfold(1, 14, 14).unfold(2, 14, 14).permute(1, 2, 0, 3, 4).reshape(4, -1)
    x = patches @ kernel.flatten(1).T + vision["patch_embed.proj.bias"]
    x = torch.cat([vision["cls_token"][0], x]) + vision["pos_embed"][0]
    for n in range(2):
        block = f"blocks.{n}"
        q_bias, v_bias = (vision[f"{block}.attn.{k}_bias"] for k in "qv")
        bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        normed = norm(x, f"{block}.norm1", 1e-6, vision)
        q, k, v = (normed @ vision[f"{block}.attn.qkv.weight"].T + bias).chunk(3, -1)
        x = x + linear(attend(q, k, v, vision_heads), f"{block}.attn.proj", vision)
        normed = norm(x, f"{block}.norm2", 1e-6, vision)
        hidden = gelu(linear(normed, f"{block}.mlp.fc1", vision))
        x = x + linear(hidden, f"{block}.mlp.fc2", vision)
    seen = norm(x, "ln_vision", 1e-5)
    causal = torch.ones(32, 32).tril().bool()
    h = norm(weights["query_tokens"][0], "Qformer.bert.embeddings.LayerNorm", 1e-12)
    for n in range(2):
        layer = f"Qformer.bert.encoder.layer.{n}"
        for kind in ("attention", "crossattention")[: 2 - n % 2]:
            source = h if kind == "attention" else seen
            q = linear(h, f"{layer}.{kind}.self.query")
            k, v = (linear(source, f"{layer}.{kind}.self.{name}") for name in ("key", "value"))
            mask = causal if kind == "attention" else None
            out = linear(attend(q, k, v, query_heads, mask), f"{layer}.{kind}.output.dense")
            h = norm(out + h, f"{layer}.{kind}.output.LayerNorm", 1e-12)
        out = linear(
            gelu(linear(h, f"{layer}.intermediate_query.dense")), f"{layer}.output_query.dense"
        )
        h = norm(out + h, f"{layer}.output_query.LayerNorm", 1e-12)
    return linear(torch.tanh(linear(h, "encode_task_layer.0")), "encode_task_layer.2")


@pytest.fixture(scope="module")
def seed_tensors():
    return tiny.seed_weights()


def test_seed_is_what_its_description_says(seed_tensors):
    weights, vision = seed_tensors
    tokenizer = seed.SeedTokenizer(weights, vision, vision_heads=2, query_heads=3)
    images = pictures(4)
    with torch.inference_mode():
        ours = tokenizer.embed(images)
    for image, rows, ids in zip(images, ours, tokenizer.encode(images), strict=True):
        expected = reference(weights, vision, image, 2, 3)
        assert torch.allclose(rows, expected, atol=2e-5)
        distances = (expected[:, None] - weights["quantize.embedding.weight"]).pow(2).sum(-1)
        assert ids.tolist() == distances.argmin(-1).tolist()


def test_the_mask_of_seed_is_causal(seed_tensors):
    weights, vision = seed_tensors
    images = pictures(1)
    before = seed.SeedTokenizer(weights, vision, 2, 3)
    changed = {**weights, "query_tokens": weights["query_tokens"].clone()}
    changed["query_tokens"][0, 20, 0] += 1
    after = seed.SeedTokenizer(changed, vision, 2, 3)
    with torch.inference_mode():
        moved = (before.embed(images) - after.embed(images)).abs().amax(-1)[0] > 1e-6
    assert not moved[:20].any() and moved[20:].all()


def test_the_seed_engine_reads_both_files(tmp_path):
    # 16 and 12 heads are SEED's own: widths that they divide.
    weights, vision = tiny.seed_weights(width=32, hidden=24)
    for name, tensors in ((seed.QUANTIZER, weights), (seed.VISION, vision)):
        torch.save(tensors, tmp_path / name)
    engine = make_engine("voken", f"seed:{tmp_path}")
    assert {"sha256", "vision_sha256"} <= set(engine.provenance)
    ids = check(engine, pictures(3), 50)
    together = {**weights, **{f"visual_encoder.{k}": v for k, v in vision.items()}}
    torch.save({"model": together}, tmp_path / "whole.pt")
    assert (check(make_engine("voken", f"seed:{tmp_path}/whole.pt"), pictures(3), 50) == ids).all()


def test_seed_refuses_pickled_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"query_tokens": Evil()}, tmp_path / seed.QUANTIZER)
    engine = make_engine("voken", f"seed:{tmp_path}")
    with pytest.raises(UserError, match="refused"):
        engine.setup()
    assert not (tmp_path / "ran").exists()


def test_seed_names_what_is_missing(seed_tensors, tmp_path):
    weights, vision = seed_tensors
    with pytest.raises(UserError, match="cannot read"):
        make_engine("voken", f"seed:{tmp_path}")
    torch.save(weights, tmp_path / seed.QUANTIZER)
    with pytest.raises(UserError, match=r"put eva_vit_g\.pth beside"):
        make_engine("voken", f"seed:{tmp_path}").setup()
    lacking = {k: v for k, v in weights.items() if k != "ln_vision.bias"}
    with pytest.raises(UserError, match=r"lack the tensor 'ln_vision\.bias'"):
        seed.SeedTokenizer(lacking, vision, 2, 3)
    with pytest.raises(UserError, match="do not fit together"):
        seed.SeedTokenizer({**weights, "ln_vision.bias": torch.zeros(3)}, vision, 2, 3)


# ---- features and k-means ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["siglip", "dinov2"])
def test_features_are_pooled_row_by_row(tmp_path, kind):
    folder = tiny.backbone(tmp_path / kind, kind)
    found = features.Features(features.Backbone(str(folder), size=32))
    image = np.zeros((1, 64, 64, 3), np.uint8)
    changed = image.copy()
    changed[:, 48:, :8] = 255  # cell of the last row and first column
    before, after = found(image)[0], found(changed)[0]
    assert before.shape == (32, 16)
    # Attention carries a little of it everywhere; most stays where it is.
    moved = np.abs(after - before).sum(1)
    assert moved.argmax() == 24
    assert moved[24] > 2 * np.sort(moved)[-2]


def test_kmeans_fits_saves_and_encodes(tmp_path):
    folder = tiny.backbone(tmp_path / "siglip")
    backbone = features.Backbone.parse(str(folder), size=32)
    images = pictures(40)
    book = features.fit(backbone, [images[:25], images[25:]], num_codes=20, components=6, seed=0)
    book.save(tmp_path / "book.npz")
    again = features.fit(backbone, [images], num_codes=20, components=6, seed=0)
    assert np.allclose(book.centres, again.centres, atol=1e-4)
    engine = make_engine("voken", f"kmeans:{tmp_path / 'book.npz'}")
    ids = check(engine, images, 20)
    assert (ids == book.encode(images)).all()
    assert len(np.unique(ids)) > 10
    # The nearest centre, by plain distances.
    rows = (book._features(images[:1])[0] - book.mean) @ book.basis.T
    plain = np.linalg.norm(rows[:, None] - book.centres, axis=-1).argmin(1)
    assert ids[0].tolist() == plain.tolist()


def test_a_codebook_follows_a_backbone_that_moved(tmp_path):
    folder = tiny.backbone(tmp_path / "siglip")
    images = pictures(8)
    features.fit(features.Backbone.parse(str(folder), 32), [images], 20, 6).save(tmp_path / "b.npz")
    first = make_engine("voken", f"kmeans:{tmp_path / 'b.npz'}")
    ids = check(first, images, 20)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no folder with a model"):
        make_engine("voken", f"kmeans:{tmp_path / 'b.npz'}")
    options = {"model": str(tmp_path / "elsewhere")}
    moved = make_engine("voken", f"kmeans:{tmp_path / 'b.npz'}", options)
    assert (check(moved, images, 20) == ids).all()
    assert moved.provenance["sha256"] == first.provenance["sha256"]


def test_bad_codebooks_are_named(tmp_path):
    np.savez(tmp_path / "pickled.npz", mean=np.array([{}], object))
    (tmp_path / "text.npz").write_text("no codebook")
    (tmp_path / "zip.npz").write_bytes(b"PK\x03\x04 no archive behind the mark of one")
    book = features.KMeansTokenizer(
        features.Backbone("m", "main"), np.zeros(4), np.eye(4)[:2], np.zeros((3, 2))
    )
    book.save(tmp_path / "fine.npz")
    fine = (tmp_path / "fine.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(fine[: len(fine) // 2])
    # Two bytes of a compressed array, over which zlib trips.
    (tmp_path / "flipped.npz").write_bytes(fine[:60] + b"\xff\xff" + fine[62:])
    for name in ("pickled", "text", "zip", "cut", "flipped", "missing"):
        for engine in ("kmeans", "fsq", "patch"):
            with pytest.raises(UserError, match=f"{name}.npz"):
                make_engine("voken", f"{engine}:{tmp_path / name}.npz")
    for about in ("[]", '{"name": 1, "revision": "", "size": 2}', "[" * 100_000):
        arrays = {name: getattr(book, name) for name in ("mean", "basis", "centres")}
        np.savez(tmp_path / "about.npz", about=np.frombuffer(about.encode(), np.uint8), **arrays)
        with pytest.raises(UserError, match=r"about\.npz is not a codebook of features"):
            features.KMeansTokenizer.load(tmp_path / "about.npz")
    np.savez(tmp_path / "levels.npz", mean=1, basis=1, scale=1, levels=np.array(3))
    with pytest.raises(UserError, match="'levels' must be whole numbers"):
        fsq.FsqTokenizer.load(tmp_path / "levels.npz")
    with pytest.raises(UserError, match="do not fit together"):
        features.KMeansTokenizer(book.backbone, np.zeros(4), np.eye(3), np.zeros((3, 3)))
    with pytest.raises(UserError, match="4 features, the model has 5"):
        book.nearest(np.zeros((1, 32, 5)))
    provenance = make_engine("voken", f"kmeans:{tmp_path / 'fine.npz'}").provenance
    assert (provenance["model"], provenance["revision"]) == ("m", "main")


def test_too_few_pictures_for_the_codes(tmp_path):
    folder = tiny.backbone(tmp_path / "dinov2", "dinov2")
    with pytest.raises(UserError, match="2 pictures give 64 features; 100 codes need more"):
        features.fit(features.Backbone(str(folder), size=32), [pictures(2)], num_codes=100)


# ---- patches and FSQ -----------------------------------------------------------------------------


def test_the_patch_engine_is_the_shipped_tokenizer(tmp_path):
    images = pictures(5, 64)
    ids = check(make_engine("voken", "patch:default"), images, 1000)
    assert (ids == voken_tokenizer.PatchTokenizer.default().encode(images)).all()
    own = voken_tokenizer.fit(pictures(60), num_codes=50)
    own.save(tmp_path / "own.npz")
    other = make_engine("voken", f"patch:{tmp_path / 'own.npz'}")
    assert check(other, images, 50).max() < 50
    assert other.provenance["sha256"] != make_engine("voken", "patch:default").provenance["sha256"]


def test_fsq_uses_its_levels(tmp_path):
    images = pictures(100)
    tokenizer = fsq.fit(images)
    assert tokenizer.num_codes == 8192
    tokenizer.save(tmp_path / "fsq.npz")
    ids = check(make_engine("voken", f"fsq:{tmp_path / 'fsq.npz'}"), images, 8192)
    assert len(np.unique(ids)) > 50
    # A digit per component: adding to one component moves its digit alone.
    rows = (voken_tokenizer.all_patches(images) - tokenizer.mean) @ tokenizer.basis.T
    digits = ids.reshape(-1) // 16 % 8
    order = np.argsort(rows[:, 1])
    assert (np.diff(digits[order]) >= 0).all() and digits.min() <= 1 and digits.max() >= 6
    with pytest.raises(UserError, match="too many codes"):
        fsq.fit(images, levels=(64, 64, 64))


def test_one_bad_picture_does_not_cost_the_others(tmp_path):
    engine = make_engine("voken", "patch:default")
    bad = Example("bad", np.zeros((0, 0, 3), np.uint8))
    results = engine.annotate([*examples(pictures(2)), bad], seed=0)
    assert [r.status for r in results] == ["ok", "ok", "failed"]
    assert results[2].issues[0]
