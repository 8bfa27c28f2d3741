"""Speculative decoding with the model's own MTP layers, which `step3p5.mtp` runs; the model verifies in one forward."""
