"""Kaleido: frozen text encoder, latent decoder and denoiser, joined (Sec. 3, Fig. 2).

Parameters: {'text_encoder', 'latent_decoder', 'denoiser'}; without latents there is no decoder
and the model is the MDM baseline.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from kaleido_jax import tokens
from kaleido_jax.errors import UserError
from kaleido_jax.models.t5 import LatentDecoder, T5Config, TextEncoder
from kaleido_jax.trainable import Trainable
from kaleido_jax.types import Conditioning, Pyramid

BACKBONES = ("unet", "nested_unet", "mlp")


@dataclasses.dataclass(frozen=True)
class KaleidoConfig:
    """Configs of the three parts.

    Attributes:
      text_encoder: T5 whose encoder reads the caption.
      latent_decoder: T5 whose decoder writes the latents; None is the MDM baseline.
      backbone: name of the module under `kaleido_jax.models` that holds the denoiser.
      denoiser: that module's Config.
      freeze_encoder: stop gradients at the encoder's states.
      read_tokens: add to each state of the decoder the embedding of the token that was read there
        and a fixed direction for its place. The states alone are trained to foretell the next
        token: a narrow decoder forgets the one that it has read, and which number of a box it was.
      section_tokens: (first id, count) of the tokens that open a latent where there are several;
        `read_tokens` counts places from the last of them, so that a box reads the same after a
        text of any length. () counts from the start.
    """

    text_encoder: T5Config
    latent_decoder: T5Config | None
    backbone: str
    denoiser: Any
    freeze_encoder: bool = True
    read_tokens: bool = False
    section_tokens: tuple[int, ...] = ()

    @property
    def ratios(self) -> tuple[int, ...]:
        """Side of each image of the pyramid over the innermost side, highest first."""
        return self.denoiser.ratios

    @classmethod
    def from_config(cls, config: ConfigDict) -> KaleidoConfig:
        """Reads `config.model` and `config.latents`.

        Raises:
          UserError: unknown fields or backbone, or widths that do not fit together.
        """
        model = config.model
        fields = dict(model.denoiser.to_dict())
        backbone = fields.pop("name")
        if backbone not in BACKBONES:
            raise UserError(
                f"config key 'model.denoiser.name' is {backbone!r}; one of {', '.join(BACKBONES)}"
            )
        module = importlib.import_module(f"kaleido_jax.models.{backbone}")
        encoder = T5Config.from_dict(model.text_encoder.to_dict())
        decoder = _decoder_config(config) if config.latents else None
        denoiser = module.Config.from_dict(fields)
        if decoder is not None and decoder.emb_dim != encoder.emb_dim:
            raise UserError(
                f"config key 'model.latent_decoder.emb_dim' is {decoder.emb_dim}; the encoder's "
                f"and decoder's states are concatenated, so it must be {encoder.emb_dim}"
            )
        innermost = denoiser
        while hasattr(innermost, "inner"):
            innermost = innermost.inner
        if innermost.conditioning_feature_dim != encoder.emb_dim:
            raise UserError(
                "config key 'model.denoiser': conditioning_feature_dim is "
                f"{innermost.conditioning_feature_dim}; it must be the text encoder's emb_dim, "
                f"{encoder.emb_dim}"
            )
        return cls(
            encoder,
            decoder,
            backbone,
            denoiser,
            model.freeze_encoder,
            model.get("read_tokens", False),
            _section_tokens(config),
        )

    def portable(self) -> KaleidoConfig:
        """The same model without attention that only one platform has: for exported programs."""

        def plain(network: Any) -> Any:
            changes = {"attention": "xla"} if hasattr(network, "attention") else {}
            if hasattr(network, "inner"):
                changes["inner"] = plain(network.inner)
            return dataclasses.replace(network, **changes)

        return dataclasses.replace(self, denoiser=plain(self.denoiser))


def _section_tokens(config: ConfigDict) -> tuple[int, ...]:
    sections = tuple(config.model.get("section_tokens", ()))
    if sections:
        whole = all(isinstance(number, int) for number in sections) and len(sections) == 2
        rows = config.model.latent_decoder.vocab_size
        if not whole or not sections[0] >= 0 < sections[1] <= rows - sections[0]:
            raise UserError(
                f"config key 'model.section_tokens' is {sections}; it must be () or (first id, "
                f"count) within the vocabulary of {rows}"
            )
    return sections


def _decoder_config(config: ConfigDict) -> T5Config:
    """The decoder's config, with adapters where `model.train_decoder` asks for them."""
    model = config.model
    decoder = T5Config.from_dict(model.latent_decoder.to_dict())
    if rank := Trainable.from_config(config).rank:
        alpha, kernels = model.lora_alpha, model.lora_kernels
        decoder = dataclasses.replace(
            decoder, lora_rank=rank, lora_alpha=alpha, lora_kernels=kernels
        )
    return decoder


class Kaleido(nn.Module):
    """The joint model; call its methods through `apply(..., method=...)`."""

    cfg: KaleidoConfig

    def setup(self):
        self.text_encoder = TextEncoder(self.cfg.text_encoder)
        if self.cfg.latent_decoder is not None:
            self.latent_decoder = LatentDecoder(self.cfg.latent_decoder)
        module = importlib.import_module(f"kaleido_jax.models.{self.cfg.backbone}")
        self.denoiser = module.Model(self.cfg.denoiser)

    def encode(self, caption_tokens: Int[Array, "b lc"], train: bool = False) -> Conditioning:
        """Encoder states of the caption; no gradient passes where the encoder is frozen."""
        frozen = self.cfg.freeze_encoder
        states = self.text_encoder(caption_tokens, train=train and not frozen)
        if frozen:
            states = jax.lax.stop_gradient(states)
        return Conditioning(states=states, mask=caption_tokens != tokens.PAD)

    def latent_states(
        self, latent_tokens: Int[Array, "b lz"], encoded: Conditioning, train: bool = False
    ) -> tuple[Float[Array, "b lz1 d"], Float[Array, "b lz1 v"], Bool[Array, "b lz1"]]:
        """Runs the decoder over [start, z_1, .., z_N] (one longer than z).

        Returns:
          (states after the final norm, logits, mask). Position n predicts z_{n+1}; the last
          position has read all of z and predicts nothing. A row without latents is masked out.
        """
        present = latent_tokens != tokens.PAD
        mask = jnp.concatenate([present.any(-1, keepdims=True), present], axis=1)
        start = jnp.full_like(latent_tokens[:, :1], tokens.PAD)
        inputs = jnp.concatenate([start, latent_tokens], axis=1)
        # The start token shares id 0 with padding, so the decoder is told what is padding.
        input_mask = mask.at[:, 0].set(True)
        hidden, logits = self.latent_decoder(
            inputs, encoded.states, encoded.mask, input_mask=input_mask, train=train
        )
        if self.cfg.read_tokens:
            directions = _directions(*hidden.shape[1:])[_places(inputs, self.cfg.section_tokens)]
            read = self.latent_decoder.token_embedder(inputs) + directions
            hidden = hidden + read.astype(hidden.dtype)
        return hidden, logits, mask

    def condition(
        self, caption_tokens: Int[Array, "b lc"], latent_tokens: Int[Array, "b lz"] | None
    ) -> Conditioning:
        """Encoder states ‖ decoder states along length, with both masks (Sec. 3.3)."""
        encoded = self.encode(caption_tokens)
        if self.cfg.latent_decoder is None or latent_tokens is None:
            return encoded
        hidden, _, mask = self.latent_states(latent_tokens, encoded)
        return join(encoded, Conditioning(states=hidden, mask=mask))

    def null_condition(self, batch: int, length: int) -> Conditioning:
        """The empty caption and no z, padded to `length`: Eq. (8) drops both."""
        empty = self.encode(jnp.full((1, 1), tokens.EOS, jnp.int32))
        states = jnp.pad(empty.states, ((0, 0), (0, length - 1), (0, 0)))
        states = jnp.broadcast_to(states, (batch, *states.shape[1:]))
        mask = jnp.arange(length)[None] < 1
        return Conditioning(states=states, mask=jnp.broadcast_to(mask, (batch, length)))

    def encode_condition(self, condition: Conditioning) -> Any:
        """The denoiser's own reading of the condition; the same at every sampling step."""
        return self.denoiser.encode_condition(condition.states, condition.mask)

    def denoise(
        self,
        pyramid: Pyramid,
        time_index: Float[Array, "b"],
        encoded_condition: Any,
        micro: Mapping[str, Float[Array, "b"]] | None = None,
        train: bool = False,
    ) -> Pyramid:
        """Predictions at every resolution, of the kind that `config.diffusion` names."""
        return self.denoiser.denoise(
            pyramid, time_index, encoded_condition, micro=micro, train=train
        )

    def decode_step(
        self, token: Int[Array, "b 1"], encoded: Conditioning
    ) -> tuple[Float[Array, "b 1 d"], Float[Array, "b 1 v"]]:
        """One cached decoder step; apply with `mutable=['cache']`."""
        return self.latent_decoder(token, encoded.states, encoded.mask, decode=True)

    def __call__(
        self,
        caption_tokens: Int[Array, "b lc"],
        latent_tokens: Int[Array, "b lz"],
        pyramid: Pyramid,
        time_index: Float[Array, "b"],
    ) -> Pyramid:
        """Touches every parameter once: used to initialise and to count."""
        condition = self.condition(caption_tokens, latent_tokens)
        return self.denoise(pyramid, time_index, self.encode_condition(condition))


def _places(inputs: Int[Array, "b length"], sections: tuple[int, ...]) -> Int[Array, "*b length"]:
    """How far each token is from the last one that opens a section, or from the start."""
    place = jnp.arange(inputs.shape[1])
    if not sections:
        return place
    first, count = sections
    opens = (inputs >= first) & (inputs < first + count)
    return place - jax.lax.cummax(jnp.where(opens, place, 0), axis=1)


def _directions(length: int, width: int) -> Float[Array, "length width"]:
    """A random direction for each place of a sequence; the same for a place at any length."""
    keys = jax.vmap(lambda place: jax.random.fold_in(jax.random.key(0), place))(jnp.arange(length))
    return jax.vmap(lambda key: jax.random.normal(key, (width,)))(keys)


def join(first: Conditioning, second: Conditioning) -> Conditioning:
    """Concatenates two conditions along length."""
    return Conditioning(
        states=jnp.concatenate([first.states, second.states], axis=1),
        mask=jnp.concatenate([first.mask, second.mask], axis=1),
    )


def drop_condition(
    condition: Conditioning, null: Conditioning, drop: Bool[Array, "b"]
) -> Conditioning:
    """Replaces the rows where `drop` is True by the null condition (classifier-free training)."""
    return Conditioning(
        states=jnp.where(drop[:, None, None], null.states, condition.states),
        mask=jnp.where(drop[:, None], null.mask, condition.mask),
    )
