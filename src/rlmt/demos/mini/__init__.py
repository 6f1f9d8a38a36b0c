"""The miniature world: small enough to train everything from scratch on a laptop, real enough to show thinking pay."""
