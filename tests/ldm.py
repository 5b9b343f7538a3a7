"""The autoencoder's tensors as Stable Diffusion's files have them, for tests of reading such files."""
from formats.names import official_vae_names


def vae_to_official(tensors, config):
    """Tensors under our (diffusers') names -> LDM's, where the attention's projections are 1x1 convolutions."""
    official = {}
    for ours, theirs in official_vae_names(config, tensors).items():
        flat = theirs.endswith(("attn_1.q.weight", "attn_1.k.weight", "attn_1.v.weight", "attn_1.proj_out.weight"))
        official[theirs] = tensors[ours][:, :, None, None] if flat else tensors[ours]
    return official
