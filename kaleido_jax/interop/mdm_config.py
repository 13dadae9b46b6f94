"""ml-mdm configs to ours, with what a config leaves unsaid read off the weights' shapes.

Understood are ml-mdm's own fields, by level: a flat 'unet'; 'outer', 'mid', .., 'inner' groups
(outermost first, any number); groups nested by 'inner_config'; and the short form where 'outer'
and 'inner' are only strings of channels and the other fields are the inner network's. Fields of
no network (schedules, notes) are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kaleido_jax.errors import UserError
from kaleido_jax.models import nested_unet, unet

Shapes = Mapping[str, Sequence[int]]

COMMON = (
    "num_heads",
    "num_groups_norm",
    "num_groups_attention",
    "dropout",
    "temporal_dim",
    "use_attention_ffn",
)
INNERMOST = ("num_lm_head_layers", "masked_cross_attention", "skip_mid_blocks")
OUTER = ("skip_inner_unet_input", "skip_normalization")
WIDTHS = ("conditioning_feature_dim", "conditioning_feature_proj_dim")
UNSUPPORTED = ("temporal_mode", "interp_conditioning")
FLAGS = (
    "use_attention_ffn",
    "masked_cross_attention",
    "skip_mid_blocks",
    "skip_inner_unet_input",
    "skip_normalization",
)
# The released models are told the size for which each resolution was trained: 64, 256, 1024.
INNERMOST_SCALE = 64.0
SCALE_RATIO = 4.0
# What the short form leaves unsaid and shapes do not show.
SHORT_INNER = {"masked_cross_attention": False}
SHORT_OUTER = {"skip_normalization": True}


def config_from_mdm(
    settings: Mapping[str, Any], shapes: Shapes | None = None
) -> unet.Config | nested_unet.Config:
    """Our config of an ml-mdm config.

    Args:
      settings: the config, in one of the forms above.
      shapes: shapes of the state dictionary by name; what `settings` does not state is read
        off them (without them it takes ml-mdm's default).

    Raises:
      UserError: values that no network can have, or video networks.
    """
    groups = _groups(settings)
    config = None
    for depth in reversed(range(len(groups))):
        stated = groups[depth]
        for name in UNSUPPORTED:
            if stated.get(name):
                raise UserError(f"ml-mdm config: {name} is not supported")
        seen = _infer(shapes, depth * "inner_unet.") if shapes else {}
        fields = _trunk(stated, seen, 0 if config is None else len(groups) - 1 - depth)
        if config is None:
            config = unet.Config(**fields, **_innermost(stated, seen, groups))
        else:
            config = nested_unet.Config(inner=config, **fields, **_outer(stated, seen))
    return config


def _groups(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Settings of each resolution, outermost first."""
    if isinstance(settings.get("outer"), str):
        strings = {
            k: v
            for k, v in settings.items()
            if k in ("outer", "inner") or (k.startswith("mid") and isinstance(v, str))
        }
        groups = [SHORT_OUTER | {"resolution_channels": v} for v in strings.values()]
        rest = {k: v for k, v in settings.items() if k not in strings}
        groups[-1] = SHORT_INNER | {"resolution_channels": settings["inner"]} | rest
        return groups
    if "outer" in settings:
        groups = [v for k, v in settings.items() if isinstance(v, Mapping)]
    else:
        groups = [settings]
        while isinstance(groups[-1].get("inner_config"), Mapping):
            groups.append(groups[-1]["inner_config"])
    return [dict(group) | dict(group.get("resnet_config") or {}) for group in groups]


def _infer(shapes: Shapes, prefix: str) -> dict[str, Any]:
    """What the names and shapes of one resolution's weights say."""
    own = {
        name.removeprefix(prefix): tuple(shape)
        for name, shape in shapes.items()
        if name.startswith(prefix) and not name.startswith(prefix + "inner_unet.")
    }
    levels = _count(own, r"down_blocks\.(\d+)\.")
    if not levels or "temb_layer1.bias" not in own or "conv_in.weight" not in own:
        raise UserError(f"ml-mdm weights: no UNet under {prefix or 'the top'!r}")
    blocks = [f"down_blocks.{i}." for i in range(levels)]
    resnets = [_count(own, re.escape(block) + r"resnets\.(\d+)\.") for block in blocks]
    attentions = [_count(own, re.escape(block) + r"attn\.(\d+)\.") for block in blocks]
    pairs = zip(attentions, resnets, strict=True)
    seen = dict(
        resolution_channels=tuple(own[f"{block}resnets.0.conv1.bias"][0] for block in blocks),
        num_resnets_per_resolution=tuple(resnets),
        num_attention_layers=tuple(a // r if r else 0 for a, r in pairs),
        use_attention_ffn=any(".ffn." in name for name in own),
        temporal_dim=own["temb_layer1.bias"][0],
        channels=own["conv_in.weight"][1],
        micro=sorted({n.split(".")[1] for n in own if n.startswith("cond_layers.")}),
        skip_mid_blocks=not any(name.startswith("mid_blocks.") for name in own),
        num_lm_head_layers=_count(own, r"lm_head\.(\d+)\."),
        skip_inner_unet_input="in_adapter.weight" not in own,
        cross_attention=any("norm_cond" in name for name in own),
        conditioning_feature_proj_dim=0,
        conditioning_feature_dim=own.get("cond_emb.weight", (0, 0))[1],
    )
    if "lm_proj.weight" in own:
        proj, width = own["lm_proj.weight"]
        seen |= {"conditioning_feature_proj_dim": proj, "conditioning_feature_dim": width}
    return seen


def _count(names: Mapping[str, Any], pattern: str) -> int:
    found = [re.match(pattern, name) for name in names]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _trunk(stated: dict[str, Any], seen: dict[str, Any], outside: int) -> dict[str, Any]:
    """Fields of every resolution; `outside` counts the resolutions further in."""
    channels = _numbers(stated.get("resolution_channels")) or seen.get("resolution_channels")
    if not channels:
        raise UserError("ml-mdm config: resolution_channels is missing")
    resnets = _numbers(stated.get("num_resnets_per_resolution"))
    resnets = resnets or seen.get("num_resnets_per_resolution") or (2,)
    fields = {name: stated[name] for name in COMMON if stated.get(name) is not None}
    fields = {name: seen[name] for name in COMMON if name in seen} | fields
    return _flags(fields) | dict(
        channels=seen.get("channels", 3),
        resolution_channels=channels,
        num_resnets_per_resolution=resnets * len(channels) if len(resnets) == 1 else resnets,
        num_attention_layers=_attention(stated, seen, len(channels), outside > 0),
        micro_conditioning=_micro(stated, seen, outside),
    )


def _attention(
    stated: dict[str, Any], seen: dict[str, Any], levels: int, outer: bool
) -> tuple[int, ...]:
    has_levels = stated.get("attention_levels") is not None
    if seen and not (has_levels and stated.get("num_attention_layers") is not None):
        return seen["num_attention_layers"]
    counts = _numbers(stated.get("num_attention_layers")) or (1,)
    counts = counts * levels if len(counts) == 1 else counts
    if has_levels:
        where = _numbers(stated["attention_levels"])
    elif outer:
        where = ()
    else:
        where = range(levels) if "num_attention_layers" in stated else (2, 3)
    return tuple(count if level in where else 0 for level, count in enumerate(counts))


def _micro(
    stated: dict[str, Any], seen: dict[str, Any], outside: int
) -> tuple[tuple[str, float], ...]:
    text = stated.get("micro_conditioning")
    if text:
        pairs = (part.split(":") for part in text.split(","))
        return tuple((name, float(default)) for name, default in pairs)
    for name in seen.get("micro", ()):
        if name != unet.SCALE:
            raise UserError(f"ml-mdm config: micro_conditioning must give a default for {name!r}")
    scale = INNERMOST_SCALE * SCALE_RATIO**outside
    return tuple((name, scale) for name in seen.get("micro", ()))


def _innermost(
    stated: dict[str, Any], seen: dict[str, Any], groups: list[dict[str, Any]]
) -> dict[str, Any]:
    fields = {name: seen[name] for name in (*INNERMOST, *WIDTHS) if name in seen}
    fields |= {name: stated[name] for name in INNERMOST if stated.get(name) is not None}
    for name in WIDTHS:
        # ml-mdm hands the outermost width on; -1 stands for none.
        values = [g[name] for g in (stated, *groups) if (g.get(name) or -1) > 0]
        if values:
            fields[name] = values[0]
    return _flags(fields)


def _outer(stated: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
    fields = {name: seen[name] for name in (*OUTER, "cross_attention") if name in seen}
    fields |= {name: stated[name] for name in OUTER if stated.get(name) is not None}
    return _flags(fields)


def _numbers(value: Any) -> tuple[int, ...]:
    """'1,2' or [1, 2] or None."""
    if isinstance(value, str):
        value = [part for part in value.split(",") if part.strip()]
    return tuple(int(part) for part in value or ())


def _flags(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: bool(v) if name in FLAGS else v for name, v in fields.items()}
