"""Our models in other projects' names: denoisers for ml-mdm, T5 for Hugging Face."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kaleido_jax import bundle as bundle_lib
from kaleido_jax import tensor_files
from kaleido_jax.errors import UserError
from kaleido_jax.interop import mdm, mdm_settings, t5
from kaleido_jax.models import nested_unet, unet
from kaleido_jax.models.kaleido import KaleidoConfig
from kaleido_jax.models.t5 import T5Config, unstack_layers

MDM_WEIGHTS, MDM_TORCH, MDM_CONFIG = "vis_model.safetensors", "vis_model.pth", "model.yaml"
TOKENIZER = "spiece.model"
Tick = Callable[[int], None]


def export_mdm(
    folder: pathlib.Path, bundle: bundle_lib.Bundle, tick: Tick = lambda size: None
) -> pathlib.Path:
    """Writes the denoiser for ml-mdm's tools: vis_model.safetensors, model.yaml, and, where torch
    is installed, vis_model.pth, which its `load` opens.

    Raises:
      UserError: a denoiser that ml-mdm cannot build; the folder exists.
    """
    import yaml

    config = KaleidoConfig.from_config(bundle.config)
    if not isinstance(config.denoiser, (unet.Config, nested_unet.Config)):
        raise UserError(f"the denoiser {config.backbone!r} has no counterpart in ml-mdm")
    network = mdm_settings.config_to_mdm(config.denoiser)
    state = mdm.to_mdm(bundle.params["denoiser"], config.denoiser)
    levels = len(config.denoiser.ratios)
    model = "unet" if levels == 1 else f"nested{levels - 1 if levels > 2 else ''}_unet"
    with bundle_lib.new_folder(folder) as temporary:
        tensor_files.write(temporary / MDM_WEIGHTS, state, None, tick)
        settings = {"vision_model": model, "model": model, "unet_config": network}
        (temporary / MDM_CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")
        _write_torch(temporary / MDM_TORCH, state)
    return folder


def _write_torch(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    try:
        import torch
    except ImportError:
        return
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
    torch.save({"state_dict": tensors}, path)


def export_t5(
    folder: pathlib.Path, bundle: bundle_lib.Bundle, tick: Tick = lambda size: None
) -> pathlib.Path:
    """Writes encoder and decoder in Hugging Face's names, each T5 a folder that it opens.

    Hugging Face's T5 has one embedding for both stacks. Where the encoder's is the beginning of the
    decoder's (they come from one T5, and the embedding was not trained), `t5/` is the whole model;
    otherwise `text_encoder/` and `latent_decoder/` are one stack each.

    Raises:
      UserError: parts that are missing or do not fit the config; the folder exists.
    """
    model = bundle.config.model
    parts = [name for name in ("text_encoder", "latent_decoder") if name in bundle.params]
    if not parts:
        raise UserError("this model holds no T5: neither text_encoder nor latent_decoder")
    trees = {name: unstack_layers(bundle.params[name]) for name in parts}
    configs = {
        name: dataclasses.replace(T5Config.from_dict(model[name].to_dict()), scan_layers=False)
        for name in parts
    }
    with bundle_lib.new_folder(folder) as temporary:
        if _is_one(trees, configs):
            decoder = trees["latent_decoder"]
            tree = {**trees["text_encoder"], **decoder}
            cfg = configs["latent_decoder"]
            _write_t5(temporary / "t5", tree, cfg, t5.PARTS, bundle, tick)
        else:
            for name, stack in (("text_encoder", "encoder"), ("latent_decoder", "decoder")):
                if name in trees:
                    _write_t5(temporary / name, trees[name], configs[name], (stack,), bundle, tick)
    return folder


def _is_one(trees: Mapping[str, Any], configs: Mapping[str, T5Config]) -> bool:
    """Whether encoder and decoder are halves of one T5."""
    if len(trees) < 2:
        return False
    encoder, decoder = configs["text_encoder"], configs["latent_decoder"]
    same = {"vocab_size": decoder.vocab_size, "num_decoder_layers": decoder.num_decoder_layers}
    same |= {"num_encoder_layers": decoder.num_encoder_layers}
    if dataclasses.replace(encoder, **same) != decoder:
        return False
    if encoder.num_encoder_layers != decoder.num_encoder_layers:
        return False
    tables = [
        np.asarray(trees[n]["token_embedder"]["embedding"])
        for n in ("text_encoder", "latent_decoder")
    ]
    return np.array_equal(tables[0], tables[1][: len(tables[0])])


def _write_t5(
    folder: pathlib.Path,
    tree: Mapping[str, Any],
    cfg: T5Config,
    parts: tuple[str, ...],
    bundle: bundle_lib.Bundle,
    tick: Tick,
) -> None:
    folder.mkdir()
    settings = t5.config_to_huggingface(cfg)
    kind = "T5EncoderModel" if parts == ("encoder",) else "T5ForConditionalGeneration"
    settings["architectures"] = [kind]
    tensors = t5.to_huggingface_tensors(tree, cfg, parts)
    tensor_files.write(folder / "model.safetensors", tensors, None, tick)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / TOKENIZER).write_bytes(bundle.vocabulary.model)
