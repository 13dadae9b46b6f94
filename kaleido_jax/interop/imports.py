"""Other projects' weights as folders of ours: ml-mdm's denoisers, T5 of Hugging Face and of t5x.

An import is an export folder (kaleido_jax/bundle.py), perhaps of some parts only: a T5 gives
`text_encoder` and `latent_decoder`, an ml-mdm model `denoiser`. Training starts from any of them
(`init_from`); with a text encoder a denoiser can be sampled. All names and shapes are compared
before anything is written, and tensors are then copied one by one.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from kaleido_jax import bundle
from kaleido_jax import config as config_lib
from kaleido_jax.errors import UserError
from kaleido_jax.interop import mdm, mdm_settings, sources, t5, t5x
from kaleido_jax.models import nested_unet, unet
from kaleido_jax.models.kaleido import KaleidoConfig
from kaleido_jax.models.t5 import T5Config
from kaleido_jax.tensor_files import Tensor
from kaleido_jax.tokens import Vocabulary

# How T5 folders name their SentencePiece model.
TOKENIZERS = ("spiece.model", "tokenizer.model", "sentencepiece.model")
VOKENS = 8192  # SEED's codebook (Fig. 14)
# The released models draw 64 pixels innermost, and see (uint8 - 127) / 128.
INNERMOST_PIXELS, PIXEL_CENTRE, PIXEL_SCALE = 64, 127.0, 128.0
ENCODER, DECODER, DENOISER = "text_encoder", "latent_decoder", "denoiser"

Named = dict[str, Tensor]
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """An import that is known to fit: what will be written, nothing of it read yet.

    Attributes:
      config: of the folder. tensors: by our names. vocabulary: None where it is not known.
      source: what the weights come from, for the model card. notes: what people should know.
    """

    config: ConfigDict
    tensors: Named
    vocabulary: Vocabulary | None
    source: str
    notes: tuple[str, ...] = ()

    def write(
        self,
        folder: pathlib.Path,
        dtype: str | None = None,
        tick: Callable[[int], None] = lambda size: None,
    ) -> pathlib.Path:
        """Writes the folder, holding one tensor at a time.

        Args:
          dtype: of the weights in the file, of bundle.DTYPES; their own by default. bfloat16 also
            makes the networks compute in it.
          tick: called with the bytes of each tensor that is written.
        """
        compute = "bfloat16" if dtype == "bfloat16" else "float32"
        config = ConfigDict(self.config.to_dict())
        for part in (ENCODER, DECODER, DENOISER):
            config.model[part].dtype = compute
        config.model[DENOISER] = _with_dtype(config.model[DENOISER], compute)
        return bundle.write_export(
            folder, config.lock(), self.vocabulary, self.tensors, dtype, self.source, tick
        )


def plan_mdm(
    source: pathlib.Path,
    text_encoder: pathlib.Path | None = None,
    settings: pathlib.Path | None = None,
    tokenizer: pathlib.Path | None = None,
) -> Plan:
    """An ml-mdm model: `vis_model.pth` or its tensors as .safetensors, of any resolutions.

    Args:
      source: a file, or a folder of one.
      text_encoder: a T5 folder of Hugging Face, or an import of a T5; the released models read
        Flan-T5-XL. Without it the import serves training alone.
      settings: an ml-mdm config (YAML or JSON); without it the config is found from the shapes, and
        what shapes do not show is the released models'.
      tokenizer: a SentencePiece model; by default the text encoder's own.

    Raises:
      UserError: weights that cannot be read safely, or with every name that does not fit.
    """
    state = sources.open_state(source)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    stated = (
        mdm_settings.released_settings(shapes)
        if settings is None
        else mdm_settings.read_settings(settings)
    )
    network = mdm.config_from_mdm(stated, shapes)
    tensors = _named(DENOISER, mdm.mdm_tensors(state, network))
    config = _mdm_config(network)
    vocabulary, notes = None, []
    if text_encoder is None:
        notes.append("no text encoder: to sample, import again with --text-encoder FLAN_T5_XL")
    else:
        cfg, encoder = _text_encoder(text_encoder)
        config.model[ENCODER] = _t5_fields(cfg)
        tensors |= encoder
        vocabulary = _tokenizer(text_encoder, tokenizer, 0)
        if vocabulary is None:
            notes.append(f"no {TOKENIZERS[0]}: to sample, import again with --tokenizer FILE")
        _check_rows(vocabulary, cfg.vocab_size, text_encoder)
    KaleidoConfig.from_config(config)
    return Plan(config, tensors, vocabulary, source.name, tuple(notes))


def plan_t5(
    source: pathlib.Path,
    tokenizer: pathlib.Path | None = None,
    vokens: int = VOKENS,
    seed: int = 0,
) -> Plan:
    """A Hugging Face T5 (1.0, 1.1, Flan): a folder with config.json and its weights or shards.

    Args:
      source: the folder. A T5EncoderModel gives a text encoder alone.
      tokenizer: a SentencePiece model; by default the folder's own.
      vokens: visual tokens that the latent decoder's vocabulary gets room for.
      seed: of the new rows (t5.resize_vocabulary).

    Raises:
      UserError: weights that cannot be read safely, or with every name that does not fit.
    """
    cfg, state = _open_huggingface(source)
    decoder = any(name.startswith("decoder.block.") for name in state)
    parts = t5.PARTS if decoder else ("encoder",)
    tensors = t5.huggingface_tensors(state, cfg, parts)
    return _plan_t5(source, cfg, tensors, tokenizer, vokens, seed)


def plan_t5x(
    source: pathlib.Path,
    tokenizer: pathlib.Path | None = None,
    vokens: int = VOKENS,
    seed: int = 0,
) -> Plan:
    """A t5x checkpoint: version 3 or Orbax, scanned or not; arguments as `plan_t5`."""
    tensors = t5x.open_t5x(source)
    return _plan_t5(source, t5.infer_config(_tree(tensors)), tensors, tokenizer, vokens, seed)


def _plan_t5(
    source: pathlib.Path,
    cfg: T5Config,
    tensors: Mapping[Path, Tensor],
    tokenizer: pathlib.Path | None,
    vokens: int,
    seed: int,
) -> Plan:
    vocabulary = _tokenizer(source, tokenizer, vokens)
    _check_rows(vocabulary, cfg.vocab_size, source)
    # T5's own spare rows are where section tokens lie; vokens follow.
    rows = -(-(cfg.vocab_size + vokens) // 128) * 128 if vokens else cfg.vocab_size
    rows = max(cfg.vocab_size, rows if vocabulary is None else vocabulary.size)
    named = _named(ENCODER, _stack(tensors, "encoder"))
    larger = dataclasses.replace(cfg, vocab_size=rows)
    if any(path[0] == "decoder" for path in tensors):
        decoder = t5.resize_vocabulary(_stack(tensors, "decoder"), rows, seed)
        named |= _named(DECODER, decoder)
    config = _base_config()
    config.vocabulary.num_vokens = vokens
    config.model[ENCODER], config.model[DECODER] = _t5_fields(cfg), _t5_fields(larger)
    config.model[DENOISER].inner.conditioning_feature_dim = cfg.emb_dim
    KaleidoConfig.from_config(config)
    notes = () if vocabulary else (f"no {TOKENIZERS[0]}: name a SentencePiece model (--tokenizer)",)
    return Plan(config, named, vocabulary, source.name, notes)


def _open_huggingface(folder: pathlib.Path) -> tuple[T5Config, Named]:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no Hugging Face folder: it has no config.json")
    fields = sources.read_json(folder / "config.json")
    if fields.get("model_type", "t5") not in ("t5", "mt5"):
        raise UserError(f"{folder}/config.json: model_type is {fields['model_type']!r}, not t5")
    try:
        cfg = t5.config_from_huggingface(fields)
    except TypeError as error:
        raise UserError(f"{folder}/config.json: not a T5's: {error}") from error
    return cfg, sources.open_state(folder)


def _text_encoder(folder: pathlib.Path) -> tuple[T5Config, Named]:
    """Config and tensors of a text encoder, from Hugging Face or an import of ours."""
    if not folder.is_dir():
        raise UserError(f"text encoder {folder} is not a folder")
    if not (folder / bundle.MANIFEST).is_file():
        cfg, state = _open_huggingface(folder)
        return cfg, _named(ENCODER, t5.huggingface_tensors(state, cfg, ("encoder",)))
    cfg = T5Config.from_dict(bundle.read_config(folder).model[ENCODER].to_dict())
    tensors = bundle.read_tensors(folder)
    named = {k: v for k, v in tensors.items() if k.startswith(ENCODER)}
    t5.check_params(
        _tree({tuple(name.split("/")[1:]): tensor for name, tensor in named.items()}),
        cfg,
        ("encoder",),
        f"text encoder of {folder}",
    )
    return cfg, named


def _tokenizer(folder: pathlib.Path, given: pathlib.Path | None, vokens: int) -> Vocabulary | None:
    if given is not None:
        return Vocabulary.from_file(given, vokens)
    found = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    return Vocabulary.from_file(found[0], vokens) if found else None


def _check_rows(vocabulary: Vocabulary | None, rows: int, where: pathlib.Path) -> None:
    if vocabulary is not None and vocabulary.num_pieces > rows:
        raise UserError(
            f"the tokenizer has {vocabulary.num_pieces} pieces, more than the {rows} rows of "
            f"{where}: it belongs to another model"
        )


def _base_config() -> ConfigDict:
    return ConfigDict(config_lib.load_config("base").to_dict())


def _mdm_config(network: unet.Config | nested_unet.Config) -> ConfigDict:
    """A plain MDM with this denoiser: no latents, images and schedule as it was trained."""
    config = _base_config()
    config.latents = ()
    config.vocabulary.num_vokens = 0
    config.data.image_size = INNERMOST_PIXELS * network.ratios[0]
    config.data.channels = network.channels
    config.data.pixel_centre, config.data.pixel_scale = PIXEL_CENTRE, PIXEL_SCALE
    config.diffusion.update(mdm_settings.diffusion_settings(len(network.ratios)))
    name = "nested_unet" if isinstance(network, nested_unet.Config) else "unet"
    config.model[DENOISER] = ConfigDict({"name": name} | dataclasses.asdict(network))
    config.model[ENCODER].emb_dim = network.condition_dim
    return config


def _t5_fields(cfg: T5Config) -> ConfigDict:
    return ConfigDict(dataclasses.asdict(cfg))


def _with_dtype(group: ConfigDict, dtype: str) -> ConfigDict:
    """A denoiser's fields with the type of computation, at every resolution."""
    fields: dict[str, Any] = group.to_dict() | {"dtype": dtype}
    if "inner" in fields:
        fields["inner"] = _with_dtype(ConfigDict(fields["inner"]), dtype).to_dict()
    return ConfigDict(fields)


def _stack(tensors: Mapping[Path, Tensor], part: str) -> dict[Path, Tensor]:
    return {path: t for path, t in tensors.items() if path[0] in (part, "token_embedder")}


def _named(part: str, tensors: Mapping[Path, Tensor]) -> Named:
    return {"/".join((part, *path)): tensor for path, tensor in tensors.items()}


def _tree(tensors: Mapping[Path, Tensor]) -> dict[str, Any]:
    from flax.traverse_util import unflatten_dict

    return unflatten_dict(dict(tensors))
