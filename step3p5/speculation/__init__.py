"""Speculative decoding with the model's own MTP layers: drafts by `step3p5.mtp`, verified by the model in one forward."""
