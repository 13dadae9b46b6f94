"""Parity of T5 with Hugging Face (`t5_*.npz`) and with t5x (folders `t5x_*`).

Each check reads everything from its file and returns {output: (ours, reference)}, unpadded
positions only.
"""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from kaleido_jax.interop import t5 as interop
from kaleido_jax.interop.t5x import read_t5x
from kaleido_jax.models.t5 import T5, T5Config
from tests.carried import carry
from tests.reference_rule import weights_of

IGNORED_LABEL = -100
EOS = 1


def check_t5(path: str | pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Encoder states, decoder states, logits, mean loss and greedy ids of a Hugging Face T5."""
    with np.load(path) as file:
        data = {name: file[name] for name in file.files}
    cfg = interop.config_from_huggingface(json.loads(str(data["config_json"])))
    state = {
        # The reference scales these up, as the rule's would hardly move the attention.
        name: weight * (3 if "relative_attention_bias" in name else 1)
        for name, weight in weights_of(data).items()
    }
    params = carry(interop.from_huggingface(state, cfg))
    params = interop.from_huggingface(interop.to_huggingface(params, cfg), cfg)
    tokens = jnp.asarray(data["input/input_ids"], jnp.int32)
    mask = jnp.asarray(data["input/attention_mask"]) != 0
    inputs = jnp.asarray(data["input/decoder_input_ids"], jnp.int32)
    labels = data["input/labels"]
    real = labels != IGNORED_LABEL

    states, hidden, logits = _forward(cfg, params, tokens, mask, inputs)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    of_labels = np.take_along_axis(log_probs, np.where(real, labels, 0)[..., None], -1)[..., 0]
    greedy = data["output/greedy_ids"]
    key_mask = np.asarray(mask)
    return {
        "encoder_states": (states[key_mask], data["output/encoder_states"][key_mask]),
        "decoder_states": (hidden[real], data["output/decoder_states"][real]),
        "logits": (logits[real], data["output/logits"][real]),
        "loss": (-of_labels[real].mean(), data["output/loss_mean_over_unmasked"]),
        "greedy_ids": (_greedy(cfg, params, states, mask, greedy), greedy),
    }


def check_t5x(folder: str | pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Encoder states, decoder states and logits with the checkpoint beside the golden numbers.

    Raises ValueError where a parameter as read from disk is not the golden one to the bit.
    """
    folder = pathlib.Path(folder)
    with np.load(folder / "golden.npz") as file:
        data = {name: file[name] for name in file.files}
    params = carry(read_t5x(folder))
    cfg = _t5x_config(folder, params)
    interop.check_params(params, cfg, source=str(folder))
    _require_equal(params, data)
    encoder_tokens = jnp.asarray(data["encoder_input_tokens"], jnp.int32)
    decoder_tokens = jnp.asarray(data["decoder_input_tokens"], jnp.int32)
    mask, real = data["encoder_input_tokens"] > 0, data["decoder_target_tokens"] > 0
    outputs = _forward(cfg, params, encoder_tokens, jnp.asarray(mask), decoder_tokens, real)
    states, hidden, logits = outputs
    return {
        "encoder_states": (states[mask], data["encoder_states"][mask]),
        "decoder_hidden": (hidden[real], data["decoder_hidden"][real]),
        "logits": (logits[real], data["logits"][real]),
    }


def _t5x_config(folder: pathlib.Path, params: dict) -> T5Config:
    file = folder / "config.json"
    if not file.is_file():
        return interop.infer_config(params)
    known = T5Config.__dataclass_fields__
    # The file also names the versions that wrote it; dropout plays no part here.
    values = {k: v for k, v in json.loads(file.read_text()).items() if k in known}
    return T5Config.from_dict({**values, "dtype": "float32", "dropout_rate": 0.0})


def _require_equal(params: dict, data: dict[str, np.ndarray]) -> None:
    flat = {
        "params/" + "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    golden = {name for name in data if name.startswith("params/")}
    wrong = sorted(golden ^ flat.keys())
    wrong += [
        name for name in sorted(golden & flat.keys()) if not np.array_equal(flat[name], data[name])
    ]
    if wrong:
        raise ValueError(f"parameters differ from those on disk: {', '.join(wrong)}")


def _forward(cfg, params, tokens, mask, inputs, input_mask=None):
    """Encoder states, decoder states and logits as numpy arrays."""

    @jax.jit
    def run(params):
        model = T5(cfg).bind({"params": params})
        states = model.encode(tokens, mask)
        return states, *model.decode(inputs, states, mask, input_mask)

    return tuple(np.asarray(x) for x in run(params))


def _greedy(cfg, params, states, mask, like: np.ndarray) -> np.ndarray:
    """Ids as many as `like`, from its start tokens, through the cached decoder; 0 after EOS."""
    model, states = T5(cfg), jnp.asarray(states)
    batch, length = like.shape

    def step(token, cache):
        variables = {"params": params, **cache}
        return model.apply(
            variables, token, states, mask, decode=True, mutable=["cache"], method="decode"
        )

    @jax.jit
    def run():
        _, cache = step(jnp.zeros((batch, length), jnp.int32), {})

        def body(carry, _):
            token, cache, done = carry
            (_, logits), cache = step(token[:, None], cache)
            token = jnp.where(done, 0, jnp.argmax(logits[:, 0], -1))
            return (token, cache, done | (token == EOS)), token

        start = jnp.asarray(like[:, 0], jnp.int32)
        carry = (start, cache, jnp.zeros((batch,), bool))
        _, tokens = jax.lax.scan(body, carry, length=length - 1)
        return jnp.concatenate([start[None], tokens]).T

    return np.asarray(run())
