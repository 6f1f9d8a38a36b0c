"""Small worlds made on the spot: `tiny` (random models) and `mini` (a world in which thinking pays)."""
