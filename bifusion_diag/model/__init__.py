"""The model: encoders, pooling, decoder, losses, and what they return."""
