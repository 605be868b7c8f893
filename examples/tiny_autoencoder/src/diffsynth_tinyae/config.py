"""Config of the autoencoder, and the function that infers it from a file's shapes. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TinyAutoencoderConfig:
    """Config of a tiny autoencoder.

    Args:
        latent_channels: channels of the latents.
        width: channels of all other layers.
        encoder_blocks: residual blocks at each resolution of the encoder, full resolution first.
        decoder_blocks: residual blocks at each resolution of the decoder, full resolution last.
    """

    latent_channels: int = 16
    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)

    def __post_init__(self):
        for name in ("encoder_blocks", "decoder_blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # metadata is JSON, which has lists
        if len(self.encoder_blocks) != len(self.decoder_blocks):
            raise ValueError(
                f"encoder_blocks={self.encoder_blocks}, decoder_blocks={self.decoder_blocks}: expected equal lengths"
            )

    @property
    def factor(self):
        """Number of image pixels per latent pixel along one side."""
        return 2 ** (len(self.encoder_blocks) - 1)


TINY = TinyAutoencoderConfig(latent_channels=4, width=4, encoder_blocks=(1, 2, 1), decoder_blocks=(2, 1, 1))


def tiny_inputs(config, generator):
    """Arguments of `TinyAutoencoder.forward`: two images that are not square."""
    import torch

    return {"image": torch.rand(2, 3, 3 * config.factor, 2 * config.factor, generator=generator) * 2 - 1}


def infer_config(shapes):
    """Infer the config of a file from its shapes.

    Raises:
        ValueError: the file is of another network.
    """
    width, latent_channels, *kernel = shapes["decoder.layers.0.weight"]
    if kernel != [3, 3] or shapes["encoder.layers.0.weight"] != (width, 3, 3, 3):
        raise ValueError(
            f"encoder and decoder begin with {shapes['encoder.layers.0.weight']} and "
            f"{shapes['decoder.layers.0.weight']}; expected 3 x 3 convolutions, the first from RGB"
        )
    blocks = {f"{side}_blocks": _blocks(shapes, f"{side}.layers.") for side in ("encoder", "decoder")}
    return TinyAutoencoderConfig(latent_channels=latent_channels, width=width, **blocks)


def _blocks(shapes, prefix):
    """Count the residual blocks between convolutions: one convolution begins each resolution, another ends the last."""
    counts = []
    indices = {int(key.removeprefix(prefix).split(".")[0]) for key in shapes if key.startswith(prefix)}
    for index in sorted(indices):
        if f"{prefix}{index}.weight" in shapes:
            counts.append(0)
        elif f"{prefix}{index}.conv.0.weight" in shapes:
            counts[-1] += 1
    return tuple(counts[:-1])
