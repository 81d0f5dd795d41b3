"""Figures: how well a picture keeps to its request (`scenes`), and by which formulas (`metrics`)."""
