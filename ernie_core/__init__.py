"""ernie_core: the ERNIE-Image engine. Knows nothing of ComfyUI; importing it starts nothing.

Words used everywhere, one per idea: `sigma` (noise level in [0, 1], 1 = noise), `timestep` (1000 * sigma, only at the
model's door), `velocity` (model output, noise - x0), `x0` (clean estimate), `cfg`, `shift`, `steps`, `seed`,
`latent_BCHW` (128 channels at 1/16, normalised) against `vae_latent` (32 channels at 1/8), `prompt` / `negative`.

Shape letters: `B` batch, `C` latent channels, `H, W` latent grid, `L` image tokens = H * W, `T` text tokens,
`S` joint tokens = L + T, `D` width, `N` heads, `K` head dim, `F` feed-forward width.
"""

VERSION = "0.1.0"  # of the pack; pyproject.toml has the same, a test holds it
