"""What a person wants to know before training: findings about the data, and what training will see."""
