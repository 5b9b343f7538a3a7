"""
Adapters of a transformer (Wan, CogVideoX) under the names that other programs read.

diffusers: a file for `pipe.load_lora_weights`. comfyui: under the names of Wan's own code, which ComfyUI's LoRA loader reads, and
diffusers, too. Both programs take alpha for the rank where a file says nothing, so our scale goes into B.
"""
import re

OURS = re.compile(r"base_model\.model\.((?:transformer_)?blocks\.\d+\..+)\.lora_([AB])\.weight")
COMFYUI = {"attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v", "attn1.to_out.0": "self_attn.o",
           "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k", "attn2.to_v": "cross_attn.v",
           "attn2.to_out.0": "cross_attn.o"}
PUBLISHED = re.compile(r"(transformer|diffusion_model)\.(.+)\.lora_([AB])\.weight")


def to_published(tensors, scale, program):
    """Tensors of an adapter file of ours -> those of a file for diffusers or comfyui. ValueError if they are no transformer's."""
    made = {}
    for name, tensor in tensors.items():
        match = OURS.fullmatch(name)
        if not match:
            raise ValueError(f"{name}: is no transformer's; --to {program} is for Wan and CogVideoX, --to peft for others")
        path, half = match.groups()
        stem = f"transformer.{path}"
        if program == "comfyui":
            block, _, layer = path.partition(".attn")
            if f"attn{layer}" not in COMFYUI or not block.startswith("blocks."):
                raise ValueError(f"{name}: is no layer of Wan's, whose names alone ComfyUI's are known for")
            stem = f"diffusion_model.{block}.{COMFYUI[f'attn{layer}']}"
        made[f"{stem}.lora_{half}.weight"] = tensor.float() * (scale if half == "B" else 1)
    return made


def from_published(tensors):
    """Such a file's tensors under our names; those that are not of one stay as they are."""
    layers = {theirs: ours for ours, theirs in COMFYUI.items()}
    made = {}
    for name, tensor in tensors.items():
        match = PUBLISHED.fullmatch(name)
        if match:
            path = re.sub(r"(self|cross)_attn\.[qkvo]$", lambda layer: layers[layer[0]], match[2])
            name = f"base_model.model.{path}.lora_{match[3]}.weight"
        made[name] = tensor
    return made
