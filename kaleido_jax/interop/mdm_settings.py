"""Settings of ml-mdm around its weights: what the released models state, and our configs as its.

A state dictionary shows every size of a network, but not the switches that have no weights.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

from kaleido_jax.errors import UserError
from kaleido_jax.interop.mdm_config import Shapes
from kaleido_jax.models import nested_unet, unet

# What ml-mdm builds whatever its config says.
FIXED = {"patch_size": 1, "position_features": 0, "num_heads": 8, "num_groups_attention": 32}
# Released models of three resolutions shift their schedules by the square of the ratio.
SHIFT_POWERS = {3: 2.0}
MAX_SETTINGS = 1 << 20  # bytes of a config file


def released_settings(shapes: Shapes) -> dict[str, Any]:
    """What the configs of the released models say beyond their weights, for these shapes.

    The innermost network attends to padding too, and only the networks between do normalise their
    image; num_heads is 8 and time is read at scales 64, 256, 1024 (mdm_config's defaults).

    Args:
      shapes: of a state dictionary by ml-mdm's names.
    """
    depth = max((name.count("inner_unet.") for name in shapes), default=0)
    settings: dict[str, Any] = {"masked_cross_attention": False}
    for level in range(depth, 0, -1):
        settings = {"skip_normalization": level == 1, "inner_config": settings}
    return settings


def read_settings(path: pathlib.Path) -> dict[str, Any]:
    """The network's settings of an ml-mdm config file, YAML or JSON.

    Raises:
      UserError: a file that cannot be read, or holds no `unet_config` and no network itself.
    """
    import yaml

    try:
        if path.stat().st_size > MAX_SETTINGS:
            raise UserError(f"{path} is over 1 MiB; that is no config")
        text = path.read_text("utf-8")
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not an ml-mdm config: {str(error).splitlines()[0]}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: not an ml-mdm config: must be a mapping")
    network = settings.get("unet_config", settings)
    if not isinstance(network, dict) or not ({"resolution_channels", "outer"} & network.keys()):
        raise UserError(f"{path}: not an ml-mdm config: no unet_config with resolution_channels")
    return network


def config_to_mdm(config: unet.Config | nested_unet.Config) -> dict[str, Any]:
    """The `unet_config` of ml-mdm that builds our network, the inverse of `config_from_mdm`.

    Raises:
      UserError: something that ml-mdm cannot build.
    """
    for name, value in FIXED.items():
        if getattr(config, name) != value and not _unused(config, name):
            raise UserError(
                f"{name} is {getattr(config, name)}; ml-mdm can only build networks with {value}"
            )
    attention = any(config.num_attention_layers)
    nested = isinstance(config, nested_unet.Config)
    if nested and attention and not config.cross_attention:
        raise UserError(
            "ml-mdm cannot build an outer network whose attention does not read the text"
        )
    settings: dict[str, Any] = {
        "resolution_channels": list(config.resolution_channels),
        "num_resnets_per_resolution": list(config.num_resnets_per_resolution),
        "attention_levels": [i for i, n in enumerate(config.num_attention_layers) if n],
        "num_attention_layers": list(config.num_attention_layers),
        "temporal_dim": config.time_width,
        "micro_conditioning": _micro(config.micro_conditioning),
        "nesting": False,
        "skip_cond_emb": nested,
        "resnet_config": {
            "num_channels": -1,
            "output_channels": -1,
            "num_groups_norm": config.num_groups_norm,
            "dropout": config.dropout,
            "use_attention_ffn": config.use_attention_ffn,
        },
    }
    inner = config
    while isinstance(inner, nested_unet.Config):
        inner = inner.inner
    # ml-mdm hands the outermost width on, and writes -1 for no projection.
    settings["conditioning_feature_dim"] = inner.conditioning_feature_dim or -1
    settings["conditioning_feature_proj_dim"] = inner.conditioning_feature_proj_dim or -1
    if not nested:
        return settings | {
            "num_lm_head_layers": config.num_lm_head_layers,
            "masked_cross_attention": int(config.masked_cross_attention),
            "skip_mid_blocks": config.skip_mid_blocks,
        }
    return settings | {
        "num_lm_head_layers": 0,
        "masked_cross_attention": 1,
        "skip_mid_blocks": True,
        "skip_inner_unet_input": config.skip_inner_unet_input,
        "skip_normalization": config.skip_normalization,
        "inner_config": config_to_mdm(config.inner) | {"nesting": True},
    }


def _unused(config: unet.Config | nested_unet.Config, name: str) -> bool:
    """Whether a network without attention and learned layers never reads a setting of theirs."""
    if name in ("patch_size", "position_features"):
        return False
    if isinstance(config, nested_unet.Config):
        return not any(config.num_attention_layers)
    layers = name == "num_heads" and config.num_lm_head_layers
    return config.skip_mid_blocks and not any(config.num_attention_layers) and not layers


def _micro(pairs: tuple[tuple[str, float], ...]) -> str | None:
    return ",".join(f"{name}:{default:g}" for name, default in pairs) or None


def diffusion_settings(levels: int) -> dict[str, Any]:
    """Our `config.diffusion` of the released model of so many resolutions."""
    return dict(
        schedule="deepfloyd",
        shifted=True,
        shift_power=SHIFT_POWERS.get(levels, 1.0),
        prediction="v",
        loss_target="eps",
    )
