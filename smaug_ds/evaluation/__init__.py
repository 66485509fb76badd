"""What a trained model is worth: metrics on score matrices, and the protocols that fill them."""
