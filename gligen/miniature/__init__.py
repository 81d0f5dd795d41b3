"""The miniature of the real system: a small CLIP, autoencoder and latent diffusion base, taught on drawn scenes.

Commands, each of which can be stopped at any time and goes on where it was when called again:

    python -m gligen.miniature clip    # text and picture towers that share a space
    python -m gligen.miniature vae     # pictures <-> latents of unit spread
    python -m gligen.miniature unet    # needs both; --batch-size 512 --steps 20000 on a GPU
    python -m gligen.miniature export --file base.safetensors
    python -m gligen.miniature unpack --file base.safetensors    # the stages again, to train on from what they were

What they write under --out (runs/miniature): STAGE.pt, all that is needed to go on; STAGE.jsonl, the figures. `export`
makes of them one file in Stable Diffusion's layout with its config beside it, which is loaded like any other base.

Order of reading: config.py (sizes, recipes), data.py (scenes → batches), clip.py, vae.py, unet.py (batch → loss, and
what is measured), loop.py (steps, checkpoints), export.py.
"""
