"""A live server beside its model: scrapes of /metrics, windows between them, what the model says, what changed."""
