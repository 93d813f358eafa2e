"""What a model is worth: held-out loss, bits per byte, and what classical methods reach."""
