"""Which expert fits: embedding, classification, calibration, artifacts, training."""
