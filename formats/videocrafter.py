"""
VideoCrafter2's published files: model.ckpt, which holds all parts, its port to diffusers' names, and VADER's adapters.
Its UNet is ModelScope's with a frame rate embedding; the few names that differ are brought to ModelScope's.
"""
from formats import names

UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.model.", "first_stage_model."  # the parts of model.ckpt
TO_MODELSCOPE = [("init_attn.0.", "input_blocks.0.1."), (".0.op.", ".op."), ("fps_embedding.0.", "fps_embedding.linear_1."),
                 ("fps_embedding.2.", "fps_embedding.linear_2.")]
ADAPTER = "base_model.model."  # PEFT's prefix, which VADER has before UNET, since it adapts the whole model
ADAPTER_ALPHA = 8  # PEFT's default: VADER sets none, and its files do not say it


def unet_tensors(tensors, config):
    """Tensors under model.ckpt's names, UNET taken off, or under the port's -> under ours. config: its structure."""
    modelscope = {names.replace_all(name, TO_MODELSCOPE): t for name, t in tensors.items()}
    return names.unet_from_official(modelscope, config)


def adapter_tensors(tensors, config):
    """Those of a VADER file -> those of an adapter file of ours; {} if it is none."""
    paths = names.of_part(tensors, ADAPTER + UNET)
    return {ADAPTER + name: t for name, t in unet_tensors(paths, config).items()}


def structures(content, unet_class, vae_class):
    """The config.json beside a model.ckpt, with the arguments of its classes -> structures of its UNet and autoencoder."""
    unet, vae = content["unet"], content["vae"]
    names.expect(content, {"use_scale": True, "scale_b": .7, "linear_start": .00085, "linear_end": .012, "timesteps": 1000})
    names.expect(unet, {"fps_cond": True, "addition_attention": True, "temporal_conv": True, "temporal_attention": True,
                        "temporal_selfatt_only": True, "use_linear": True, "use_relative_position": False,
                        "use_causal_attention": False, "transformer_depth": 1})
    names.expect(vae, {"double_z": True, "in_channels": 3, "out_ch": 3, "attn_resolutions": []})
    channels = tuple(unet["model_channels"] * factor for factor in unet["channel_mult"])
    of_unet = unet_class(
        in_channels=unet["in_channels"], out_channels=unet["out_channels"], channels=channels,
        blocks_per_level=unet["num_res_blocks"], context_dim=unet["context_dim"], head_dim=unet["num_head_channels"],
        attention_levels=tuple(2**i in unet["attention_resolutions"] for i in range(len(channels))))
    of_vae = vae_class(
        channels=tuple(vae["ch"] * factor for factor in vae["ch_mult"]), blocks_per_level=vae["num_res_blocks"],
        latent_channels=vae["z_channels"], scale=content.get("scale_factor", vae_class.scale))
    return of_unet, of_vae


def port_structure(content, unet_class):
    """The config.json of the port -> the structure of its UNet."""
    names.expect(content, {"_class_name": "UNet3DVideoCrafterConditionModel", "fps_cond": True})
    return names.unet_from_diffusers(content | {"_class_name": "UNet3DConditionModel"}, unet_class)
