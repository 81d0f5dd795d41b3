"""The miniature of the real system: a small CLIP, autoencoder and latent diffusion base, taught on drawn scenes.

Commands, each of which can be stopped at any time and goes on where it was when called again:

    python -m gligen.miniature clip    # text and image towers that share a space
    python -m gligen.miniature vae     # images <-> latents of unit spread
    python -m gligen.miniature unet    # needs both; --batch-size 512 --steps 20000 on a GPU
    python -m gligen.miniature export --file base.safetensors
    python -m gligen.miniature unpack --file base.safetensors    # the stages again, to train on from what they were

A stage's run lies in OUT/NAME (--out is runs/miniature by default): checkpoint.safetensors, all that is needed to go
on; log.jsonl, the metrics; config.json. `export` makes of the three one file in Stable Diffusion's layout with its
config beside it, which is loaded like any other base; `widen` makes its UNet wider, and `cells` begins an adapter for
maps.

Order of reading: config.py (sizes, recipes), data.py (scenes → batches), stage.py (what the three share as tasks of the
loop in gligen/training/engine), clip.py, vae.py, unet.py (batch → loss, and what is measured), export.py, widen.py,
cells.py.
"""
