"""symbiotic: train unified multimodal mixture-of-experts models, and compare how they are laid out, fairly."""

__version__ = "0.1.0"
