"""What outputs of a model are worth: pure functions on tensors."""
