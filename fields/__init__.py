"""What receptive_field.py uses: gradients of logits with respect to the input, and what follows from them."""
