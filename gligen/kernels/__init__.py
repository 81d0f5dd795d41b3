"""Kernels of our own, for the places where the library's leave time on the table. Imported only when asked for."""
