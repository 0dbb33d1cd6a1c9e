"""`merit verify`: is this the checkpoint of that group of this plan? `verify` orchestrates the levels."""
