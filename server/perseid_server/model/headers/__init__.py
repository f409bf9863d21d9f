"""Reading what model files say of themselves, without their tensors. Imports no torch."""
