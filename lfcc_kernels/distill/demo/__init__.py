"""The demonstration behind `make demo`: with few labels, a Vision Transformer learns from a CNN."""
