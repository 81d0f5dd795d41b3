"""Metrics: how well an image keeps to its request (`scenes`), by which formulas (`metrics`), and what they say of the
paper's claims (`claims`), on one page (`results`)."""
