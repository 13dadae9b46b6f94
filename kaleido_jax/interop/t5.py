"""T5 weights in and out: Hugging Face state dictionaries and t5x checkpoints (version 3).

Our parameters bear t5x's names, so a t5x tree is read by identity. Hugging Face differs in names
and in the transposition of every linear layer and of the relative position table. Nothing is half
loaded: names that are missing, extra or of another shape are all listed in one UserError.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import tensorstore

from kaleido_jax.errors import UserError
from kaleido_jax.models.t5 import T5, T5Config

PARTS = ("encoder", "decoder")
T5X_VERSION = 3

# Hugging Face's feed_forward_proj: the gated "gelu" there is the tanh approximation ("gelu_new"),
# the only gelu that T5 checkpoints use.
_PROJECTIONS = {
    "relu": ("relu",),
    "silu": ("silu",),
    "gelu_new": ("gelu",),
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
    "gated-gelu": ("gelu", "linear"),
}
_ATTENTION = {"query": "q", "key": "k", "value": "v", "out": "o"}
# Blocks of a layer in Hugging Face's order: (t5x norm, t5x module, Hugging Face module).
_BLOCKS = {
    "encoder": (
        ("pre_attention_layer_norm", "attention", "SelfAttention"),
        ("pre_mlp_layer_norm", "mlp", "DenseReluDense"),
    ),
    "decoder": (
        ("pre_self_attention_layer_norm", "self_attention", "SelfAttention"),
        ("pre_cross_attention_layer_norm", "encoder_decoder_attention", "EncDecAttention"),
        ("pre_mlp_layer_norm", "mlp", "DenseReluDense"),
    ),
}
# Early Hugging Face checkpoints carry this table; no T5 code ever read it.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def expected_shapes(
    cfg: T5Config, parts: Sequence[str] = PARTS
) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shape of each parameter of T5 under its path, for the stacks in `parts` and the embedding."""
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    variables = jax.eval_shape(T5(cfg).init, jax.random.key(0), tokens, tokens)
    flat = flax.traverse_util.flatten_dict(nn.meta.unbox(variables["params"]))
    return {
        path: leaf.shape for path, leaf in flat.items() if path[0] in (*parts, "token_embedder")
    }


def check_params(
    params: Mapping[str, Any],
    cfg: T5Config,
    parts: Sequence[str] = PARTS,
    source: str = "T5 parameters",
) -> None:
    """Raises one UserError with every missing, extra or misshapen parameter of the tree
    `params`."""
    flat = flax.traverse_util.flatten_dict(dict(params))
    want = {"/".join(path): shape for path, shape in expected_shapes(cfg, parts).items()}
    _compare({"/".join(path): np.shape(leaf) for path, leaf in flat.items()}, want, source)


def _compare(
    got: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]], source: str
) -> None:
    problems = [f"missing {name}" for name in sorted(want.keys() - got.keys())]
    problems += [f"extra {name}" for name in sorted(got.keys() - want.keys())]
    problems += [
        f"{name} has shape {tuple(got[name])}, not {tuple(want[name])}"
        for name in sorted(want.keys() & got.keys())
        if tuple(got[name]) != tuple(want[name])
    ]
    if problems:
        raise UserError(f"{source}: {len(problems)} parameters do not fit: {'; '.join(problems)}")


# Hugging Face


def _huggingface_names(
    cfg: T5Config, parts: Sequence[str]
) -> dict[tuple[str, ...], tuple[str, bool]]:
    """t5x path -> (Hugging Face name, transposed)."""
    names: dict[tuple[str, ...], tuple[str, bool]] = {
        ("token_embedder", "embedding"): ("shared.weight", False)
    }
    gated = len(cfg.mlp_activations) > 1
    inputs = [f"wi_{i}" for i in range(len(cfg.mlp_activations))] if gated else ["wi"]
    counts = {"encoder": cfg.num_encoder_layers, "decoder": cfg.num_decoder_layers}
    for part in parts:
        names[part, f"{part}_norm", "scale"] = (f"{part}.final_layer_norm.weight", False)
        names[part, "relpos_bias", "rel_embedding"] = (
            f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            True,
        )
        for i in range(counts[part]):
            for j, (norm, module, theirs) in enumerate(_BLOCKS[part]):
                ours, prefix = (part, f"layers_{i}"), f"{part}.block.{i}.layer.{j}"
                names[(*ours, norm, "scale")] = (f"{prefix}.layer_norm.weight", False)
                kernels = {k: k for k in (*inputs, "wo")} if module == "mlp" else _ATTENTION
                for kernel, their_kernel in kernels.items():
                    name = f"{prefix}.{theirs}.{their_kernel}.weight"
                    names[(*ours, module, kernel, "kernel")] = (name, True)
    if "decoder" in parts and not cfg.logits_via_embedding:
        names["decoder", "logits_dense", "kernel"] = ("lm_head.weight", True)
    return names


def from_huggingface(
    state: Mapping[str, np.ndarray], cfg: T5Config, parts: Sequence[str] = PARTS
) -> dict[str, Any]:
    """Parameters in t5x's names from a Hugging Face T5 state dictionary of numpy arrays.

    Args:
      state: name -> array. Copies that Hugging Face saves of tied weights
      (`encoder.embed_tokens.weight`,
        a tied `lm_head.weight`) are accepted where they equal `shared.weight`.
      cfg: with scan_layers=False; stack the result with `stack_layers` for a scanned model.
      parts: which stacks to read; names of the others are passed over.

    Raises:
      UserError: with every missing, extra or misshapen name, or for a copy that differs.
    """
    _refuse_scanned(cfg)
    names = _huggingface_names(cfg, parts)
    shapes = expected_shapes(cfg, parts)
    want = {
        name: shapes[path][::-1] if transposed else shapes[path]
        for path, (name, transposed) in names.items()
    }
    state = _without_copies(state, want, cfg)
    skipped = tuple(f"{part}." for part in PARTS if part not in parts)
    if "decoder" not in parts:
        skipped = (*skipped, "lm_head.")
    got = {k: np.shape(v) for k, v in state.items() if not k.startswith(skipped or ("\0",))}
    _compare(got, want, "Hugging Face T5 state")
    flat = {
        path: np.asarray(state[name]).T if transposed else np.asarray(state[name])
        for path, (name, transposed) in names.items()
    }
    return flax.traverse_util.unflatten_dict(flat)


def _without_copies(
    state: Mapping[str, np.ndarray], want: Mapping[str, Any], cfg: T5Config
) -> dict[str, np.ndarray]:
    copies = [f"{part}.embed_tokens.weight" for part in PARTS]
    if cfg.logits_via_embedding:
        copies.append("lm_head.weight")
    state = dict(state)
    for name in copies:
        if name not in state:
            continue
        if "shared.weight" not in state:
            # safetensors keeps one name of a tied weight, and it need not be this one.
            state["shared.weight"] = state[name]
        elif not np.array_equal(state[name], state["shared.weight"]):
            raise UserError(f"Hugging Face T5 state: {name} differs from shared.weight")
        del state[name]
    if _UNUSED not in want:
        state.pop(_UNUSED, None)
    return state


def to_huggingface(
    params: Mapping[str, Any], cfg: T5Config, parts: Sequence[str] = PARTS
) -> dict[str, np.ndarray]:
    """The inverse of `from_huggingface`; raises UserError where `params` do not fit `cfg`."""
    _refuse_scanned(cfg)
    check_params(params, cfg, parts)
    flat = flax.traverse_util.flatten_dict(dict(params))
    return {
        name: np.ascontiguousarray(np.asarray(flat[path]).T if transposed else flat[path])
        for path, (name, transposed) in _huggingface_names(cfg, parts).items()
    }


def _refuse_scanned(cfg: T5Config) -> None:
    if cfg.scan_layers:
        raise UserError(
            "Hugging Face T5 has unscanned layers: convert with scan_layers=False, "
            "then stack_layers"
        )


def config_from_huggingface(config: Mapping[str, Any]) -> T5Config:
    """T5Config from a Hugging Face `config.json`; missing keys take Hugging Face's T5 defaults.

    Raises UserError for a feed_forward_proj that T5 does not have.
    """
    projection = config.get("feed_forward_proj", "relu")
    if projection not in _PROJECTIONS:
        raise UserError(
            f"Hugging Face T5 config: feed_forward_proj {projection!r} must be one of "
            f"{sorted(_PROJECTIONS)}"
        )
    num_layers = config.get("num_layers", 6)
    decoder_layers = config.get("num_decoder_layers")
    return T5Config(
        vocab_size=config.get("vocab_size", 32128),
        emb_dim=config.get("d_model", 512),
        num_heads=config.get("num_heads", 8),
        head_dim=config.get("d_kv", 64),
        mlp_dim=config.get("d_ff", 2048),
        num_encoder_layers=num_layers,
        num_decoder_layers=num_layers if decoder_layers is None else decoder_layers,
        mlp_activations=_PROJECTIONS[projection],
        logits_via_embedding=config.get("tie_word_embeddings", True),
        relpos_buckets=config.get("relative_attention_num_buckets", 32),
        relpos_max_distance=config.get("relative_attention_max_distance", 128),
        layer_norm_epsilon=config.get("layer_norm_epsilon", 1e-6),
    )


def config_to_huggingface(cfg: T5Config) -> dict[str, Any]:
    """The inverse of `config_from_huggingface`, for a `config.json`."""
    projections = {activations: name for name, activations in _PROJECTIONS.items()}
    if cfg.mlp_activations not in projections:
        raise UserError(f"Hugging Face T5 has no MLP with activations {list(cfg.mlp_activations)}")
    return {
        "model_type": "t5",
        "vocab_size": cfg.vocab_size,
        "d_model": cfg.emb_dim,
        "num_heads": cfg.num_heads,
        "d_kv": cfg.head_dim,
        "d_ff": cfg.mlp_dim,
        "num_layers": cfg.num_encoder_layers,
        "num_decoder_layers": cfg.num_decoder_layers,
        "feed_forward_proj": projections[cfg.mlp_activations],
        "tie_word_embeddings": cfg.logits_via_embedding,
        "relative_attention_num_buckets": cfg.relpos_buckets,
        "relative_attention_max_distance": cfg.relpos_max_distance,
        "layer_norm_epsilon": cfg.layer_norm_epsilon,
        "dropout_rate": cfg.dropout_rate,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
    }


# t5x


def read_t5x(folder: str | pathlib.Path) -> dict[str, Any]:
    """Parameters of a t5x checkpoint, as numpy arrays of the type that they have on disk.

    Args:
      folder: `checkpoint_N`, or a folder of such, of which the highest N is read. Leaves are inline
        arrays or TensorStore zarr arrays beside the `checkpoint` file.

    Raises:
      UserError: for a folder, file or entry that is missing, damaged, of another version or driver,
      or
        that points outside the folder. A missing chunk is an error, never zeros.
    """
    folder = _checkpoint_folder(pathlib.Path(folder))
    file = folder / "checkpoint"
    try:
        content = flax.serialization.msgpack_restore(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except Exception as error:  # msgpack raises its own, struct's and ValueError on damaged bytes
        raise UserError(f"{file}: not a t5x checkpoint: {error}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != T5X_VERSION:
        raise UserError(f"{file}: version is {version!r}, only version {T5X_VERSION} is read")
    optimizer = content.get("optimizer")
    target = optimizer.get("target") if isinstance(optimizer, dict) else None
    if not isinstance(target, dict):
        raise UserError(f"{file}: has no optimizer/target")

    flat = flax.traverse_util.flatten_dict(target, is_leaf=lambda _, node: _is_spec(node))
    # Every array is opened before the first is waited for: reads overlap.
    arrays, pending = {}, {}
    for path, leaf in flat.items():
        name = "/".join(path)
        if _is_spec(leaf):
            spec = _zarr_spec(leaf, folder, name)
            pending[path] = (spec, tensorstore.open(spec, open=True, read=True))
        elif isinstance(leaf, (np.ndarray, np.generic)):
            arrays[path] = np.asarray(leaf)
        else:
            raise UserError(f"{file}: {name} is neither an array nor a TensorStore spec")
    for path, (spec, future) in pending.items():
        try:
            arrays[path] = future.result().read().result()
        except ValueError as error:
            where = spec["kvstore"]["path"]
            raise UserError(f"{where}: cannot read {'/'.join(path)}: {error}") from error
    return flax.traverse_util.unflatten_dict(arrays)


def _checkpoint_folder(folder: pathlib.Path) -> pathlib.Path:
    if (folder / "checkpoint").is_file():
        return folder
    steps = {
        int(match[1]): child
        for child in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint_(\d+)", child.name))
        and (child / "checkpoint").is_file()
    }
    if not steps:
        raise UserError(f"{folder}: neither a t5x checkpoint folder nor a folder of checkpoint_N")
    return steps[max(steps)]


def _is_spec(node: Any) -> bool:
    return isinstance(node, dict) and isinstance(node.get("driver"), str)


def _zarr_spec(leaf: Mapping[str, Any], folder: pathlib.Path, name: str) -> dict[str, Any]:
    """A new spec with nothing of the checkpoint's own but the place, made safe.

    Copies from buckets name other key-value drivers, and old checkpoints put `path` at the top.
    """
    if leaf["driver"] != "zarr":
        raise UserError(f"{folder}: {name} has driver {leaf['driver']!r}, only zarr is read")
    store = leaf.get("kvstore")
    place = store.get("path") if isinstance(store, dict) else None
    place = leaf.get("path") if place is None else place
    if not isinstance(place, str) or not place.strip("/."):
        raise UserError(f"{folder}: {name} names no array folder: {place!r}")
    root = folder.resolve()
    array = (folder / place).resolve()
    if place.startswith("/") or ".." in re.split(r"[/\\]", place) or not _inside(array, root):
        raise UserError(f"{folder}: {name} points outside the checkpoint: {place!r}")
    if not (array / ".zarray").is_file():
        raise UserError(f"{folder}: {name} has no array at {place!r}")
    for entry in array.rglob("*"):
        if not _inside(entry.resolve(), root):
            raise UserError(f"{folder}: {name} holds a link out of the checkpoint: {entry.name!r}")
    return {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{array}/"},
        "fill_missing_data_reads": False,
    }


def _inside(path: pathlib.Path, root: pathlib.Path) -> bool:
    return path.is_relative_to(root) and path != root


def infer_config(params: Mapping[str, Any], **overrides: Any) -> T5Config:
    """T5Config of an unscanned T5 tree, from the shapes; `overrides` set what shapes do not tell.

    Two input kernels mean gated GELU (T5 1.1), one means ReLU; the maximal distance of relative
    positions, 128 in every T5, cannot be seen. Raises UserError where a stack is missing.
    """
    try:
        encoder, decoder = params["encoder"], params["decoder"]
        vocab_size, emb_dim = params["token_embedder"]["embedding"].shape
        num_heads, buckets = encoder["relpos_bias"]["rel_embedding"].shape
        layer = encoder["layers_0"]
        joined = layer["attention"]["query"]["kernel"].shape[1]
        mlp_dim = layer["mlp"]["wo"]["kernel"].shape[0]
    except (KeyError, ValueError) as error:
        raise UserError(f"not the parameters of an unscanned T5: {error}") from error
    cfg = T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=num_heads,
        head_dim=joined // num_heads,
        mlp_dim=mlp_dim,
        num_encoder_layers=_count(encoder),
        num_decoder_layers=_count(decoder),
        mlp_activations=("gelu", "linear") if "wi_0" in layer["mlp"] else ("relu",),
        logits_via_embedding="logits_dense" not in decoder,
        relpos_buckets=buckets,
    )
    cfg = dataclasses.replace(cfg, **overrides)
    check_params(params, cfg)
    return cfg


def _count(names: Iterable[str]) -> int:
    return sum(name.startswith("layers_") for name in names)
