"""The residual video autoencoder of Wan 2.2; that of Wan 2.1 is `diffsynth.models.wan_autoencoder`."""
