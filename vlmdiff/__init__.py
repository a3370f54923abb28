"""VLMDiff: multi-class visual anomaly detection with a caption-conditioned latent diffusion model."""

__version__ = "0.1.0"
