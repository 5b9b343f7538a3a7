"""
What published files call the same tensors, and how they describe the same structure: tables and rules, no modules.
Our names are diffusers'; ModelScope's UNet, LDM's autoencoder and transformers' text tower have others. A structure (`config`)
is anything with the fields of model.UNetConfig or model.VAEConfig.
"""
import re
from itertools import product
from types import SimpleNamespace

import torch

from support.files import first_line, first_names

LORA_TENSOR = re.compile(r"_lora\.(down|up)_linear\.weight$")
UNET_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
               "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VIDEOCRAFTER = [("init_attn.0.", "input_blocks.0.1."), (".0.op.", ".op."), ("fps_embedding.0.", "fps_embedding.linear_1."),
                ("fps_embedding.2.", "fps_embedding.linear_2.")]  # where its names differ from ModelScope's
IN_WHOLE = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model.model."}
CONV1D = re.compile(r"(temp_attentions\.\d+|transformer_in)\.proj_(in|out)\.weight$")  # Linear here and in diffusers
MODELSCOPE = SimpleNamespace(  # the structure of the published UNet, for files that bring no config.json
    in_channels=4, out_channels=4, channels=(320, 640, 1280, 1280), blocks_per_level=2, context_dim=1024, head_dim=64,
    attention_levels=(True, True, True, False), stem_heads=8, norm_groups=32, sample_size=32)


def check_fields(content, built):
    """ValueError unless every field that a published config states is what we build: another activation is another model."""
    for key, value in built.items():
        if key in content and content[key] != value:
            raise ValueError(f"expected {key} {value!r}, found {content[key]!r}")


def replace_all(name, pairs):
    """A name with every old part of the pairs (old, new) replaced by the new one, in their order."""
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def of_part(tensors, prefix):
    """Of a file that holds several parts, the tensors of one under that part's own names; {} if it does not have it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


# -- UNet ------------------------------------------------------------------------------------------------------------

def official_unet_blocks(config):
    """{our block: ModelScope's} (official tools/modules/unet/unet_t2v.py)."""
    n = config.blocks_per_level
    blocks = {"conv_in": "input_blocks.0.0", "transformer_in": "input_blocks.0.1", "conv_norm_out": "out.0", "conv_out": "out.2",
              "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
              "mid_block.resnets.1": "middle_block.3", "mid_block.temp_convs.1": "middle_block.3.temopral_conv"}

    def add_block(ours, j, theirs, attention):
        """Block j of a level: its ResBlock, temporal convolution and attentions are one official block's parts 0, 1, 2."""
        blocks[f"{ours}.resnets.{j}"] = f"{theirs}.0"
        blocks[f"{ours}.temp_convs.{j}"] = f"{theirs}.0.temopral_conv"  # their spelling
        if attention:
            blocks[f"{ours}.attentions.{j}"] = f"{theirs}.1"
            blocks[f"{ours}.temp_attentions.{j}"] = f"{theirs}.2"

    add_block("mid_block", 0, "middle_block", True)
    for i, attention in enumerate(config.attention_levels):
        for j in range(n):
            add_block(f"down_blocks.{i}", j, f"input_blocks.{i * (n + 1) + j + 1}", attention)
        blocks[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * (n + 1)}.op"
    for i, attention in enumerate(reversed(config.attention_levels)):
        for j in range(n + 1):
            add_block(f"up_blocks.{i}", j, f"output_blocks.{i * (n + 1) + j}", attention)
        part = 3 if attention else 1  # the upsampler follows the last block's other parts
        blocks[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{i * (n + 1) + n}.{part}.conv"
    return blocks


def rename(name, blocks, parts):
    """A tensor's name with its block and its part of a block translated; unchanged if its block is not in the table."""
    block = max((b for b in blocks if name.startswith(b + ".")), key=len, default=None)
    if block is None:
        return name
    part, dot, leaf = name[len(block) + 1:].rpartition(".")
    return f"{blocks[block]}.{parts.get(part, part)}{dot}{leaf}"


def unet_to_official(tensors, config):
    """Tensors under our (diffusers') names -> the same under the official names and shapes."""
    blocks = official_unet_blocks(config)
    return {rename(name, blocks, UNET_RESNET): t.unsqueeze(-1) if CONV1D.search(name) else t for name, t in tensors.items()}


def unet_from_official(tensors, config):
    """Inverse of unet_to_official. Unknown names, and diffusers' own, are kept as they are."""
    blocks = {theirs: ours for ours, theirs in official_unet_blocks(config).items()}
    parts = {theirs: ours for ours, theirs in UNET_RESNET.items()}
    renamed = {}
    for name, t in tensors.items():
        ours = rename(name, blocks, parts)
        # In every transformer here the official code may have 1x1 convolutions where we have a Linear.
        flat = ours.endswith(("proj_in.weight", "proj_out.weight")) and t.dim() == 3 and t.shape[-1] == 1
        renamed[ours] = t.squeeze(-1) if flat else t
    return renamed


def unet_from_videocrafter(tensors, config):
    """VideoCrafter2's names, of model.ckpt (without IN_WHOLE's) or its port -> ours: ModelScope's and a frame rate embedding."""
    return unet_from_official({replace_all(name, VIDEOCRAFTER): t for name, t in tensors.items()}, config)


def split_lora(tensors):
    """A fine-tuned official file holds both: -> (base tensors, LoRA tensors)."""
    lora = {k: v for k, v in tensors.items() if LORA_TENSOR.search(k)}
    return {k: v for k, v in tensors.items() if k not in lora}, lora


def unet_to_diffusers(config):
    """A structure -> the config.json that diffusers' UNet3DConditionModel reads, with the one field it has no name for."""
    kinds = ["CrossAttn{}Block3D" if attention else "{}Block3D" for attention in config.attention_levels]
    return {"_class_name": "UNet3DConditionModel", "in_channels": config.in_channels, "out_channels": config.out_channels,
            "block_out_channels": list(config.channels), "layers_per_block": config.blocks_per_level,
            "down_block_types": [kind.format("Down") for kind in kinds],
            "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
            "cross_attention_dim": config.context_dim, "attention_head_dim": config.head_dim,
            "norm_num_groups": config.norm_groups, "norm_eps": 1e-5, "act_fn": "silu", "downsample_padding": 1,
            "mid_block_scale_factor": 1, "sample_size": config.sample_size, "stem_heads": config.stem_heads}


def unet_from_diffusers(content, config_class):
    """Inverse of unet_to_diffusers: a config.json (a dict) -> config_class(...). An exception for another structure."""
    check_fields(content, {"_class_name": "UNet3DConditionModel", "num_attention_heads": None, "time_cond_proj_dim": None})
    config = config_class(
        in_channels=content["in_channels"], out_channels=content["out_channels"],
        channels=tuple(content["block_out_channels"]), blocks_per_level=content["layers_per_block"],
        attention_levels=tuple(kind.startswith("CrossAttn") for kind in content["down_block_types"]),
        context_dim=content["cross_attention_dim"], head_dim=content["attention_head_dim"],
        stem_heads=content.get("stem_heads", 8), norm_groups=content.get("norm_num_groups", 32),
        sample_size=content.get("sample_size") or 32)
    check_fields(content, unet_to_diffusers(config) | {"sample_size": content.get("sample_size")})
    return config


# -- Autoencoder -----------------------------------------------------------------------------------------------------

OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.17


def official_vae_names(config, names):
    """{our tensor name: LDM's} of some of our names (Stable Diffusion's first_stage_model)."""
    top = len(config.channels) - 1
    rules = [(r"(encoder)\.down_blocks\.(\d+)\.resnets\.(\d+)", r"\1.down.\2.block.\3"),
             (r"(encoder)\.down_blocks\.(\d+)\.downsamplers\.0", r"\1.down.\2.downsample"),
             (r"(decoder)\.up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"decoder.up.{top - int(m[2])}.block.{m[3]}"),
             (r"(decoder)\.up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"decoder.up.{top - int(m[2])}.upsample"),
             (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
             (r"mid_block\.attentions\.0", "mid.attn_1"), (r"group_norm", "norm"), (r"to_out\.0", "proj_out"),
             (r"to_([qkv])", r"\1"), (r"conv_shortcut", "nin_shortcut"), (r"conv_norm_out", "norm_out")]
    table = {name: name for name in names}
    for ours, rule in product(table, rules):
        table[ours] = re.sub(*rule, table[ours])
    return table


def vae_from_official(tensors, config, names):
    """LDM's names, with or without first_stage_model., or diffusers' old ones -> ours (names), without what is no autoencoder."""
    prefix = IN_WHOLE["vae"]
    of_whole_model = any(name.startswith(prefix) for name in tensors)
    ours_of = {theirs: ours for ours, theirs in official_vae_names(config, names).items()}
    renamed = {}
    for name, t in tensors.items():
        short = name.removeprefix(prefix)
        if short.startswith("loss.") or of_whole_model and short == name:  # VQGAN_autoencoder.pth's training loss; another part
            continue
        ours = ours_of.get(short, short)
        ours = re.sub(r"(attentions\.0\.)(query|key|value|proj_attn)", lambda m: m[1] + OLD_VAE_ATTENTION[m[2]], ours)
        flat = ".attentions." in ours and t.dim() == 4 and t.shape[2:] == (1, 1)
        renamed[ours] = t[:, :, 0, 0] if flat else t
    return renamed


def vae_to_diffusers(config):
    """A structure -> the config.json that diffusers' AutoencoderKL reads."""
    n = len(config.channels)
    return {"_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "block_out_channels": list(config.channels),
            "layers_per_block": config.blocks_per_level, "latent_channels": config.latent_channels,
            "down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n,
            "norm_num_groups": config.norm_groups, "act_fn": "silu", "scaling_factor": config.scale}


def vae_from_diffusers(content, config_class):
    """Inverse of vae_to_diffusers: a config.json (a dict) -> config_class(...). An exception for another structure."""
    check_fields(content, {"_class_name": "AutoencoderKL"})
    config = config_class(channels=tuple(content["block_out_channels"]), blocks_per_level=content["layers_per_block"],
                          latent_channels=content["latent_channels"], scale=content.get("scaling_factor", config_class.scale),
                          norm_groups=content.get("norm_num_groups", 32))
    check_fields(content, vae_to_diffusers(config))
    return config


# -- Text tower ------------------------------------------------------------------------------------------------------

def text_from_transformers(tensors):
    """transformers' CLIPTextModel, with or without its `text_model.` prefix -> OpenCLIP's names (its qkv are one matrix)."""
    renames = {"embeddings.token_embedding": "token_embedding", "embeddings.position_embedding.weight": "positional_embedding",
               "final_layer_norm": "ln_final", "encoder.layers": "transformer.resblocks",
               "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
               "self_attn.out_proj": "attn.out_proj", "self_attn.q_proj.": "attn.in_proj_"}
    renamed = {}
    for full, t in tensors.items():
        name = replace_all(full.removeprefix("text_model."), renames.items())
        if ".q_proj." in full:
            t = torch.cat([tensors[full.replace(".q_proj.", f".{p}_proj.")] for p in "qkv"])
        if name != "embeddings.position_ids" and not re.search(r"\.[kv]_proj\.", name):  # a buffer that old versions saved
            renamed[name] = t
    return renamed


def text_tower(tensors, path):
    """The tensors of a text tower up to its penultimate block, under OpenCLIP's names, and the number of blocks that is."""
    tensors = of_part(tensors, IN_WHOLE["text_encoder"]) or tensors
    ends_early = any("self_attn.q_proj" in k for k in tensors)  # transformers' text_encoder has no block after the penultimate
    if ends_early:
        try:
            tensors = text_from_transformers(tensors)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path}: not the tensors of transformers' CLIPTextModel ({first_line(error)})") from None
    else:
        others = ("visual.", "text_projection", "logit_scale", "logit_bias")  # the rest of a whole CLIP
        tensors = {k: v for k, v in tensors.items() if not k.startswith(others)}

    blocks = {m[1] for k in tensors if (m := re.match(r"transformer\.resblocks\.(\d+)\.", k))}
    layers = len(blocks) - (0 if ends_early else 1)
    tables = [tensors.get(name) for name in ("token_embedding.weight", "positional_embedding")]
    if layers < 1 or any(t is None or t.dim() != 2 for t in tables):
        raise ValueError(f"{path}: expected the text tower of open_clip or transformers' CLIPTextModel: {first_names(tensors)}")
    return {k: v for k, v in tensors.items() if not k.startswith(f"transformer.resblocks.{layers}.")}, layers
