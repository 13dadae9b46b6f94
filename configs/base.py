"""The paper's 256-pixel model, field by field with its source.

Every other config is a short difference from this one. Nested groups that differ as a whole
(the denoiser, the two halves of T5) are replaced as a whole.
"""

from __future__ import annotations

from ml_collections import ConfigDict


def t5(**changes) -> dict:
    """T5 1.1 XL (App. B.1: "we employ T5-XL"), fields as kaleido_jax.models.t5.T5Config."""
    return (
        dict(
            vocab_size=32128,
            emb_dim=2048,
            num_heads=32,
            head_dim=64,
            mlp_dim=5120,
            num_encoder_layers=24,
            num_decoder_layers=24,
            mlp_activations=("gelu", "linear"),
            logits_via_embedding=False,
            relpos_buckets=32,
            relpos_max_distance=128,
            dropout_rate=0.0,
            dtype="bfloat16",  # App. B.2: mixed_precision_training
            param_dtype="float32",
            scan_layers=False,
            remat_policy="none",
        )
        | changes
    )


def unet(**changes) -> dict:
    """The inner UNet of App. B.1, fields as kaleido_jax.models.unet.Config."""
    return (
        dict(
            resolution_channels=(256, 512, 768),
            num_resnets_per_resolution=(2, 2, 2),
            num_attention_layers=(0, 1, 5),
            num_heads=8,
            temporal_dim=1024,  # emb_channels
            conditioning_feature_dim=2048,  # T5-XL
            conditioning_feature_proj_dim=1024,  # lm_feature_projected_channels
            num_lm_head_layers=2,  # num_lm_attn_layers
            masked_cross_attention=True,
            use_attention_ffn=True,
            micro_conditioning=(),
            dtype="bfloat16",
            remat_policy="none",
            attention="auto",  # ours: flash attention where cuDNN has it; or 'xla', 'cudnn'
        )
        | changes
    )


def for_many_devices(c: ConfigDict) -> None:
    """Shards and compiles a paper-size model for many devices (ours: it does not move losses).

    The paper fits 4 to 8 images on an A100 (App. B.2); `kaleido train --dry-run` says what fits.
    """
    for part in ("text_encoder", "latent_decoder"):
        c.model[part].scan_layers = True  # one layer to compile instead of 24
        c.model[part].remat_policy = "full"
    c.model.denoiser.remat_policy = "full"
    if "inner" in c.model.denoiser:
        c.model.denoiser.inner.remat_policy = "full"
    c.mesh.data, c.mesh.fsdp = 1, -1  # every parameter, gradient and slot over all devices


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    # Which latents z the decoder writes, in order; () is the MDM baseline. App. B.3: combined.
    c.latents = ("text", "bbox", "voken")
    # Workdirs, and folders of `kaleido import` or `kaleido export`, to start from their parts.
    c.init_from = ()

    c.data = ConfigDict()
    c.data.source = ConfigDict(dict(name="webdataset", path=""))
    c.data.image_size = 256
    c.data.channels = 3
    c.data.caption_length = 128  # tokens, EOS included
    c.data.latent_length = 288  # tokens of the combined latents, EOS included
    c.data.pixel_centre = 127.5  # image = (uint8 - centre) / scale
    c.data.pixel_scale = 127.5

    c.vocabulary = ConfigDict()
    c.vocabulary.path = ""  # SentencePiece model; '' is the small one of the package
    c.vocabulary.num_vokens = 8192  # SEED's codebook, Fig. 14

    c.model = ConfigDict()
    c.model.text_encoder = ConfigDict(t5())
    c.model.latent_decoder = ConfigDict(t5(vocab_size=40320))  # Sec. 4.1: vocabulary resized
    c.model.freeze_encoder = True  # Sec. 3.3: "we freeze the context encoder"
    c.model.read_tokens = False  # ours: whether states of z also carry the tokens' embeddings
    c.model.section_tokens = ()  # (first id, count): counts their places from a section's start
    c.model.frozen_storage = "float32"  # ours, of a frozen encoder: or 'bfloat16', 'int8'
    # 'all' (Sec. 3.3), 'last:N' layers or 'lora:RANK': App. C, "partial training".
    c.model.train_decoder = "all"
    # With a part of the decoder: whether embedding and head train too, as new vokens must.
    c.model.train_vocabulary = True
    c.model.lora_alpha = 16.0  # adapters count alpha / RANK (Hu et al. 2021, Section 4.1)
    c.model.lora_kernels = ("query", "key", "value", "out", "wi_0", "wi_1", "wo")
    c.model.denoiser = ConfigDict(
        dict(
            name="nested_unet",
            resolution_channels=(64, 128, 256),
            num_resnets_per_resolution=(2, 2, 1),
            num_attention_layers=(0, 0, 0),
            temporal_dim=1024,
            skip_normalization=True,
            dtype="bfloat16",
            remat_policy="none",
            inner=unet(),
        )
    )

    c.diffusion = ConfigDict()
    c.diffusion.schedule = "cosine"  # App. B.1
    c.diffusion.shifted = True  # 'cosine-shift4' on the outer image
    c.diffusion.shift_power = 1.0
    c.diffusion.prediction = "v"  # ml-mdm's released setting
    c.diffusion.loss_target = "eps"  # ml-mdm's released setting

    c.train = ConfigDict()
    c.train.batch_size = 512  # App. B.2, over all devices
    c.train.accumulate = 1  # ours: parts of a batch that are computed one after the other
    # ml-mdm's mixed batches: parts of the rows by the highest resolution that they train, highest
    # first: (2, 1) trains the outer network on two thirds. () trains all on every row.
    c.train.mixed_ratio = ()
    c.train.num_steps = 400_000  # App. B.2
    c.train.latent_weight = 1.0  # eta of L = L_DM + eta L_AR (Sec. 3.3; value not given)
    c.train.noisy_steps = 0  # ours: of so many steps the first draw only the noisiest times
    c.train.noisy_share = 1.0  # of the batch, for which they do
    c.train.time_logit = ()  # of the others' times (needs a smaller share): (mean, deviation)
    c.train.cond_drop_rate = 0.1  # p_uncond (Sec. 2; value not given)
    c.train.log_every = 100
    c.train.checkpoint_every = 5_000
    c.train.keep_checkpoints = 3
    c.train.sample_every = 10_000  # 0 = never
    c.train.num_samples = 16  # pictures of one sample grid
    # What a run survives (docs/faults.md); none of these is the paper's.
    c.train.max_bad_steps = 10  # dropped updates in a row that stop a run; 0 = never
    c.train.skip_spike = 0.0  # drop a gradient above so many times its mean norm; 0 = never
    c.train.watchdog_seconds = 1_800.0  # a step that takes longer ends the process; 0 = never
    c.train.watchdog_patience = 7_200.0  # the same for compiling, saving and sampling

    c.optim = ConfigDict()
    c.optim.learning_rate = 1e-4  # App. B.2
    c.optim.text_rate = 1.0  # ours: T5's learning rate over the denoiser's
    c.optim.warmup_steps = 10_000  # App. B.2
    c.optim.decay = "constant"  # or 'cosine', to 0 at train.num_steps
    c.optim.b1 = 0.9  # App. B.2
    c.optim.b2 = 0.99  # App. B.2
    c.optim.eps = 1e-8  # App. B.2
    c.optim.weight_decay = 0.0  # App. B.2
    c.optim.clip_norm = 2.0  # App. B.2, global norm
    c.optim.ema_decay = 0.9999  # App. B.2
    c.optim.ema_warmup = False  # True: decay min(ema_decay, (1 + step) / (10 + step))

    c.mesh = ConfigDict()
    c.mesh.preset = ""  # a machine in kaleido_jax.mesh.PRESETS; '' = the sizes below
    c.mesh.data = -1  # -1: all devices that fsdp and tensor leave
    c.mesh.fsdp = 1
    c.mesh.tensor = 1

    # Defaults of sampling: App. E, "DDPM sampling with 250 steps".
    c.sample = ConfigDict()
    c.sample.sampler = "ddpm"
    c.sample.steps = 250
    c.sample.guidance_weight = 7.0  # Fig. 12 to 14
    c.sample.guidance_interval = (0.0, 1.0)  # t outside of it is sampled without guidance
    c.sample.time_grid = "uniform"  # 'trailing', 'logsnr': docs/sampling.md
    c.sample.guidance = "cfg"  # or 'apg'
    c.sample.latent_guidance_weight = -1.0  # negative: one weight for c and z, Eq. 8
    c.sample.guidance_rescale = 0.0
    c.sample.cads_scale = 0.0
    c.sample.threshold = "clip"  # 'none', 'clip' or 'dynamic'
    c.sample.temperature = 1.0
    c.sample.top_k = 0  # 0 = off
    c.sample.top_p = 1.0
    c.sample.constrained = True  # latents by their grammars only
    return c
