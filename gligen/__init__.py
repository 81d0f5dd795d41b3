"""GLIGEN: grounded text-to-image generation (Li et al., 2023), in pure PyTorch."""
