"""The card templates, shipped in the wheel as `merit_hf.templates`."""
