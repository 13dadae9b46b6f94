"""T5 weights in and out: Hugging Face state dictionaries, and what they share with t5x's.

Our parameters bear t5x's names, so a t5x tree (interop/t5x.py) is read by identity. Hugging Face
differs in names and in the transposition of every linear layer and of the relative position table.
Nothing is half loaded: names that are missing, extra or of another shape are all listed in one
UserError, before any of them is read.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from kaleido_jax.errors import UserError
from kaleido_jax.models.t5 import T5, T5Config
from kaleido_jax.tensor_files import Tensor, Tensors, as_tensor

PARTS = ("encoder", "decoder")
# New rows of a vocabulary stray from the mean by this share of the old rows' deviation: near
# enough to the mean that no new token is likely at first, and no two of them are alike.
SPREAD = 0.1
Path = tuple[str, ...]

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
    tensors = huggingface_tensors(state, cfg, parts)
    return flax.traverse_util.unflatten_dict({k: np.asarray(v) for k, v in tensors.items()})


def huggingface_tensors(
    state: Tensors, cfg: T5Config, parts: Sequence[str] = PARTS
) -> dict[Path, Tensor]:
    """What `from_huggingface` gives by path, none of it read but tied weights' copies."""
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
    found = {}
    for path, (name, transposed) in names.items():
        tensor = as_tensor(state[name])
        found[path] = tensor.changed(shapes[path], np.transpose) if transposed else tensor
    return found


def _without_copies(state: Tensors, want: Mapping[str, Any], cfg: T5Config) -> dict[str, Any]:
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
    tensors = to_huggingface_tensors(params, cfg, parts)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def to_huggingface_tensors(
    params: Mapping[str, Any], cfg: T5Config, parts: Sequence[str] = PARTS
) -> dict[str, Tensor]:
    """What `to_huggingface` gives, none of it copied yet."""
    _refuse_scanned(cfg)
    check_params(params, cfg, parts)
    flat = flax.traverse_util.flatten_dict(dict(params))
    found = {}
    for path, (name, transposed) in _huggingface_names(cfg, parts).items():
        tensor = as_tensor(flat[path])
        found[name] = tensor.changed(tensor.shape[::-1], np.transpose) if transposed else tensor
    return found


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


# Sizes


def resize_vocabulary(
    tensors: Mapping[Path, Tensor], rows: int, seed: int = 0
) -> dict[Path, Tensor]:
    """The same tensors with `rows` tokens in the embedding and in the head.

    Old rows stay as they are. New ones are drawn around the mean of the old ones, SPREAD times
    their deviation in each dimension, from (seed, the tensor's name, the row).

    Raises:
      UserError: fewer rows than there are.
    """
    result = dict(tensors)
    for path, axis in (
        (("token_embedder", "embedding"), 0),
        (("decoder", "logits_dense", "kernel"), 1),
    ):
        if path not in tensors:
            continue
        old = tensors[path]
        if rows < old.shape[axis]:
            raise UserError(
                f"{'/'.join(path)} has {old.shape[axis]} tokens; a vocabulary of {rows} is smaller"
            )
        shape = (rows, old.shape[1]) if axis == 0 else (old.shape[0], rows)
        key = [seed, zlib.crc32("/".join(path).encode())]
        result[path] = old.changed(shape, _Grow(rows, axis, key)) if rows > old.shape[axis] else old
    return result


@dataclasses.dataclass(frozen=True)
class _Grow:
    rows: int
    axis: int
    key: list[int]

    def __call__(self, table: np.ndarray) -> np.ndarray:
        count, width = table.shape[self.axis], table.shape[1 - self.axis]
        mean = table.mean(self.axis, np.float64, keepdims=True)
        squares = sum(
            np.square(part.astype(np.float64) - mean).sum(self.axis, keepdims=True)
            for part in np.array_split(table, 16, self.axis)
        )
        spread = SPREAD * np.sqrt(squares / count)
        shape = [self.rows, self.rows]
        shape[1 - self.axis] = width
        out = np.empty(shape, table.dtype)
        old, new = [slice(None)] * 2, [slice(None)] * 2
        old[self.axis], new[self.axis] = slice(count), slice(count, None)
        out[tuple(old)] = table
        # Row by row, so that row n is the same whatever their number is.
        noise = np.random.default_rng(self.key).standard_normal((self.rows - count, width))
        out[tuple(new)] = mean + spread * (noise if self.axis == 0 else noise.T)
        return out


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
        head_dim = joined // num_heads
    except (KeyError, ValueError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        raise UserError(f"not the parameters of an unscanned T5: {error}") from error
    cfg = T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=num_heads,
        head_dim=head_dim,
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
