"""Which processes train, who starts them, what joins them, and how they are stopped."""
