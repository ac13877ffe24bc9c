"""What is made of a finished run: artifacts, their proof, their cards, and the hub they are pushed to."""
