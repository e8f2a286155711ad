"""Tests of the loss, the step, checkpoints and the loop."""
