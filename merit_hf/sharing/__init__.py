"""Plans, claims, contributions and merged models on the Hub, between people who do not know each other."""
