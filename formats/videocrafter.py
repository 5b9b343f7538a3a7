"""
Names of VideoCrafter2's tensors, in model.ckpt, which holds all parts, in its port to diffusers' names, and in VADER's adapters.
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
