"""The mathematics: pure functions of tensors. No engine, no configuration, no state."""
