"""
Whether a network of some structure can be built: numbers come from files, and files are data.

A structure is anything with the fields of model.UNetConfig, model.VAEConfig or model.TextConfig.
"""
import math


def check_unet(config):
    """ValueError for a UNet that cannot be built."""
    check_numbers(config, (*config.channels, config.in_channels, config.out_channels, config.context_dim, config.head_dim,
                           config.stem_heads, config.sample_size))
    attended = [c for c, attention in zip(config.channels, config.attention_levels) if attention] + [config.channels[-1]]
    if len(config.attention_levels) != len(config.channels) or any(c % config.head_dim for c in attended):
        raise ValueError(f"expected one attention_levels entry per level, and head_dim to divide channels there: {config}")


def check_vae(config):
    """ValueError for an autoencoder that cannot be built."""
    check_numbers(config, (*config.channels, config.latent_channels))
    if not (isinstance(config.scale, (int, float)) and 0 < config.scale < math.inf):
        raise ValueError(f"expected a scale above 0: {config}")


def check_numbers(config, sizes):
    """Whole numbers of a size that a machine can hold, and widths that the group norms divide."""
    whole = all(type(n) is int and 0 < n <= 2**16 for n in (*sizes, config.blocks_per_level, config.norm_groups))
    if not whole or not 0 < len(config.channels) * config.blocks_per_level <= 256:
        raise ValueError(f"expected whole numbers from 1, and at most 256 blocks: {config}")
    if any(c % config.norm_groups for c in config.channels):
        raise ValueError(f"expected norm_groups to divide every width in channels: {config}")


def check_parts(name, unet, vae, text, paths):
    """ValueError, naming the files, unless a base's UNet takes the latents and the text features that its other parts make."""
    if (unet.in_channels, unet.out_channels, unet.context_dim) != (vae.latent_channels, vae.latent_channels, text.width):
        raise ValueError(f"{name}: the UNet takes {unet.in_channels} and gives {unet.out_channels} latent channels, text of "
                         f"width {unet.context_dim}; {paths['vae']} has {vae.latent_channels}, {paths['text_encoder']} "
                         f"{text.width}")


def random_sizes(spec):
    """Settings of UNet, autoencoder and text tower for "random" (none: full size) or "random:W" (multiples of W channels)."""
    width = spec.partition(":")[2] or "320"
    if not width.isdigit() or int(width) % 32 or int(width) < 32:
        raise ValueError(f"base {spec!r}: must be random, or random:W with W a multiple of 32")
    w = int(width)
    if w == 320:
        return {}, {}, {}
    v = max(32, w * 2 // 5 // 32 * 32)
    unet = dict(channels=(w, 2 * w, 4 * w, 4 * w), context_dim=64, head_dim=32 if w % 64 else 64, sample_size=8)
    return unet, dict(channels=(v, 2 * v, 4 * v, 4 * v), blocks_per_level=1), dict(width=64, heads=1, layers=2)
