"""The miniature world: a task on which thinking raises the reward, small enough to train from scratch on a laptop."""
