"""Small weights of other projects, in the files that those projects write."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping

import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict
from safetensors.numpy import save_file

from kaleido_jax.interop import mdm, t5
from kaleido_jax.models import unet
from kaleido_jax.models.t5 import T5Config, stack_layers
from kaleido_jax.tokens import Vocabulary
from tests.reference_rule import rule_array, shapes_of, weights_of

REFERENCE = pathlib.Path(__file__).parent / "reference"
# As wide as the text that the reference's denoisers read; rows for the shipped vocabulary.
T5_SMALL = T5Config(
    vocab_size=1536,
    emb_dim=48,
    num_heads=2,
    head_dim=8,
    mlp_dim=32,
    num_encoder_layers=1,
    num_decoder_layers=2,
)


def t5_params(cfg: T5Config = T5_SMALL) -> dict:
    """Parameters by our names, of the reference's rule."""
    names = t5.to_huggingface_tensors(_zeros(cfg), cfg)
    state = {name: rule_array(name, tensor.shape, 5) for name, tensor in names.items()}
    return t5.from_huggingface(state, cfg)


def _zeros(cfg: T5Config) -> dict:
    shapes = t5.expected_shapes(cfg)
    return unflatten_dict({path: np.zeros(shape, np.float32) for path, shape in shapes.items()})


def huggingface_folder(
    folder: pathlib.Path, cfg: T5Config = T5_SMALL, shards: int = 3, tokenizer: bool = True
) -> dict[str, np.ndarray]:
    """Writes a T5 as transformers does, in shards; returns its state dictionary."""
    folder.mkdir(parents=True)
    state = t5.to_huggingface(t5_params(cfg), cfg)
    (folder / "config.json").write_text(json.dumps(t5.config_to_huggingface(cfg)))
    if tokenizer:
        Vocabulary.default().save(folder / "spiece.model")
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return state
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    places = {name: files[i % shards] for i, name in enumerate(state)}
    for file in files:
        save_file({n: a for n, a in state.items() if places[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return state


def t5x_orbax(
    folder: pathlib.Path, params: Mapping, ocdbt: bool = False, scanned: bool = False
) -> None:
    """Writes parameters as t5x's Orbax manager does: item `state`, trees `target` and `state`."""
    tree = stack_layers(params) if scanned else dict(params)
    tree = {"target": tree, "state": {"step": np.int32(7), "param_states": {"x": np.zeros(2)}}}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)) as checkpointer:
        checkpointer.save(folder.absolute() / "checkpoint_7" / "state", tree)


def mdm_state(name: str) -> dict[str, np.ndarray]:
    """The state dictionary of a reference file, 'mdm_nested'."""
    with np.load(REFERENCE / f"{name}.npz") as archive:
        return weights_of(dict(archive))


def small_mdm() -> dict[str, np.ndarray]:
    """The state dictionary of a network like the released ones, but narrow.

    It draws 64 pixels as they do; attention is at 16 x 16, as at 64 x 64 it takes gigabytes.
    """
    config = unet.Config(
        resolution_channels=(32, 32, 32),
        num_resnets_per_resolution=(1, 1, 1),
        num_attention_layers=(0, 0, 1),
        conditioning_feature_dim=48,
        conditioning_feature_proj_dim=32,
        masked_cross_attention=False,
        use_attention_ffn=True,
        skip_mid_blocks=True,
        micro_conditioning=(("scale", 64.0),),
    )
    zeros = {path: np.zeros(leaf.shape) for path, leaf in mdm.leaves(config).items()}
    state = mdm.to_mdm(unflatten_dict(zeros), config)
    return {name: rule_array(name, value.shape, 4) for name, value in state.items()}


def mdm_settings(name: str) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """Config and shapes of a reference file."""
    with np.load(REFERENCE / f"{name}.npz") as archive:
        file = dict(archive)
    return json.loads(str(file["config_json"])), shapes_of(file)
